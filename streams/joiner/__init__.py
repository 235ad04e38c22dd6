"""The joiner: a Faust agent that joins interactions and replies. `faust -A streams.joiner worker` runs it."""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    # Faust looks up `app` in the package, several times, and expects the app, not the module of that name.
    # Created on demand: `import streams.joiner` reads no settings.
    if name == "app":
        globals()[name] = importlib.import_module("streams.joiner.app").app
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
