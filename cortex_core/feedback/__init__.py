"""Reading a reply, piece by piece. `cortex_core.feedback_collector` is the way in."""
