"""Everything on one machine: the supervisor behind `cortex up`, and the embedded Kafka and Redis."""
