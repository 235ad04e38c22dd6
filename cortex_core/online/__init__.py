"""The parts of an online training step; the entry point is `cortex_core.online_trainer`."""
