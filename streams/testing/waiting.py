"""Waits for conditions, with a timeout, instead of sleeping for a fixed time."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, overload

T = TypeVar("T")
DEFAULT_TIMEOUT_S = 120.0
"""Much longer than any condition takes on a loaded machine; only failing tests wait so long."""


def wait_for(
    predicate: Callable[[], T | None],
    what: str = "it",
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    every_s: float = 0.02,
) -> T:
    """Calls `predicate` until its value is true, and returns that value.

    Raises:
        AssertionError: it was not true within `timeout_s`; the message names `what`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"timeout after {timeout_s} s waiting for {what}; last value: {value!r}")
        time.sleep(every_s)


@overload
async def async_wait_for(
    predicate: Callable[[], Awaitable[T | None]],
    what: str = "it",
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    every_s: float = 0.02,
) -> T: ...
@overload
async def async_wait_for(
    predicate: Callable[[], T | None],
    what: str = "it",
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    every_s: float = 0.02,
) -> T: ...
async def async_wait_for(
    predicate: Callable[[], object],
    what: str = "it",
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    every_s: float = 0.02,
) -> object:
    """`wait_for` for event loops; `predicate` may be async."""
    deadline = time.monotonic() + timeout_s
    while True:
        result = predicate()
        value = (await result) if inspect.isawaitable(result) else result
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"timeout after {timeout_s} s waiting for {what}; last value: {value!r}")
        await asyncio.sleep(every_s)
