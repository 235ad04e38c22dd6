"""The two compacted topics: weights versions and operator commands."""
