"""Kafka for all workers: topics, producers, consumers without a group, dead letters. Imports no worker."""
