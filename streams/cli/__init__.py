"""The command line: `cortex …`, `python -m streams.cli …`."""

from streams.cli.app import app

__all__ = ["app"]
