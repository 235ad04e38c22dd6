"""Default HTTP port of each worker; a separate module, so that `--help` loads nothing else."""

WORKER_PORTS = {"inference": 8080, "joiner": 8181, "trainer": 8182}
"""`cortex up` uses 8080 and the following ports for inference workers."""
