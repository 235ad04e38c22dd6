"""The joiner: a Faust agent that joins interactions and replies. `faust -A streams.joiner worker` runs it."""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    # Faust asks the package for its app. Made on demand: `import streams.joiner` reads no settings.
    if name == "app":
        return importlib.import_module("streams.joiner.app").app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
