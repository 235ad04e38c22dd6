"""The joiner: a Faust agent that joins interactions and replies. `faust -A streams.joiner worker` runs it."""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    # Faust asks the package for `app`, more than once, and wants the app and not the module of that name.
    # Made on demand: `import streams.joiner` reads no settings.
    if name == "app":
        globals()[name] = importlib.import_module("streams.joiner.app").app
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
