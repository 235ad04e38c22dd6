"""Waiting for what becomes true, with a deadline; nothing here sleeps for a fixed time."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, overload

T = TypeVar("T")
PATIENCE_S = 120.0
"""Far more than anything takes: a loaded machine is slow, and only what fails waits so long."""


def wait_for(
    predicate: Callable[[], T | None],
    what: str = "it",
    *,
    timeout_s: float = PATIENCE_S,
    every_s: float = 0.02,
) -> T:
    """The first true value of `predicate()`; AssertionError naming `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s} s in vain for {what}; last value: {value!r}")
        time.sleep(every_s)


@overload
async def async_wait_for(
    predicate: Callable[[], Awaitable[T | None]],
    what: str = "it",
    *,
    timeout_s: float = PATIENCE_S,
    every_s: float = 0.02,
) -> T: ...
@overload
async def async_wait_for(
    predicate: Callable[[], T | None],
    what: str = "it",
    *,
    timeout_s: float = PATIENCE_S,
    every_s: float = 0.02,
) -> T: ...
async def async_wait_for(
    predicate: Callable[[], object], what: str = "it", *, timeout_s: float = PATIENCE_S, every_s: float = 0.02
) -> object:
    """Like `wait_for`, on an event loop; `predicate` may be async."""
    deadline = time.monotonic() + timeout_s
    while True:
        result = predicate()
        value = (await result) if inspect.isawaitable(result) else result
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s} s in vain for {what}; last value: {value!r}")
        await asyncio.sleep(every_s)
