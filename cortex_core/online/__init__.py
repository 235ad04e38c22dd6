"""The parts of one online step. `online_trainer` is the door."""
