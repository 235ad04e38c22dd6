"""Waiting for what becomes true, with a deadline; nothing here sleeps for a fixed time."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, overload

T = TypeVar("T")


def wait_for(
    predicate: Callable[[], T | None], timeout_s: float = 30.0, what: str = "it", every_s: float = 0.02
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
    timeout_s: float = 30.0,
    what: str = "it",
    every_s: float = 0.02,
) -> T: ...
@overload
async def async_wait_for(
    predicate: Callable[[], T | None], timeout_s: float = 30.0, what: str = "it", every_s: float = 0.02
) -> T: ...
async def async_wait_for(
    predicate: Callable[[], object], timeout_s: float = 30.0, what: str = "it", every_s: float = 0.02
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
