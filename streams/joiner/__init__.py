"""The joiner: a Faust agent that joins interactions and replies. `faust -A streams.joiner worker` runs it.

Nothing is imported with the package: `streams.joiner.app` is what Faust, `cortex joiner` and tests load.
"""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name == "app":  # the module; Faust looks inside it for the app of the same name
        return importlib.import_module("streams.joiner.app")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
