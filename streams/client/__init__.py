"""The client for agents: `from streams.client import CortexClient`."""

from streams.client.client import CortexClient

__all__ = ["CortexClient"]
