"""The workers around the learner (joiner, trainer, inference), and the client for agents.

Agents need only `from streams import CortexClient`. Names load on first use, so that importing this package
is fast and does not load torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {"CortexClient": "client", "Settings": "settings"}

__all__ = sorted(_MODULES)  # noqa: PLE0605 - one table of names and their modules


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'streams' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"streams.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
