"""The HTTP port of each worker where none is set; a module of its own, so that `--help` loads nothing."""

WORKER_PORTS = {"inference": 8080, "joiner": 8181, "trainer": 8182}
"""Apart from 8080 and those after it, which `cortex up` gives to inference workers."""
