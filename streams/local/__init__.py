"""`cortex up`: the supervisor of all processes on one machine, and the embedded Kafka and Redis."""
