"""The parts of feedback extraction; the entry point is `cortex_core.feedback_collector`."""
