"""The workers around the learner: joiner, trainer, inference, and what agents import.

`from streams import CortexClient` is an agent's whole import. Names are loaded on first use, so that
importing this package is instant and loads no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {"CortexClient": "client", "Settings": "settings"}

__all__ = sorted(_HOME)  # noqa: PLE0605 - a table, so that a name and its home stand together


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'streams' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"streams.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
