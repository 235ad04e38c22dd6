"""Weights versions and operator commands: the two compacted topics, written and followed."""
