"""What every worker needs of Kafka: topics, publishing, following, dead letters. Knows no worker."""
