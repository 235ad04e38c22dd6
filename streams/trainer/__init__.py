"""The trainer: learns from experiences, publishes weights versions. Its process is `streams.trainer.app`."""
