"""The faults: kill -9, SIGSTOP for longer than a session, and SIGTERM, of any process of a stack."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from streams.local.processes import Child
from streams.local.stack import Stack
from streams.testing import async_wait_for

Action = Literal["kill -9", "SIGSTOP", "restart"]
Kind = Literal["joiner", "trainer", "inference", "kafka", "redis"]
ACTIONS: tuple[Action, ...] = ("kill -9", "SIGSTOP", "restart")
KINDS: tuple[Kind, ...] = ("joiner", "trainer", "inference", "kafka", "redis")
SIGNALS = {"kill -9": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP, "restart": signal.SIGTERM}
SECOND = 0.25
"""Probability that a round has a second fault at the same time."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault, of one process of a kind."""

    action: Action
    kind: Kind

    def __str__(self) -> str:
        return f"{self.action} {self.kind}"


def dealt(rng: random.Random) -> Iterator[tuple[Fault, ...]]:
    """The faults of each round: every kind of fault comes equally often, in random order."""

    def deck() -> Iterator[Fault]:
        while True:
            faults = [Fault(action, kind) for action in ACTIONS for kind in KINDS]
            rng.shuffle(faults)
            yield from faults

    cards = deck()
    while True:
        first = next(cards)
        second = next(cards) if rng.random() < SECOND else None
        if second is None:
            yield (first,)
        elif first.kind != second.kind:
            yield first, second
        else:
            yield (first,)
            yield (second,)


async def inject(fault: Fault, stack: Stack, rng: random.Random) -> str | None:
    """Does it; returns once the process runs again, as `cortex up` restarts what has ended.

    Returns:
        The name of the process if it has ended, else None.
    """
    name = rng.choice(sorted(children(stack, fault.kind)))
    child = children(stack, fault.kind)[name]
    child.signal(SIGNALS[fault.action])
    if fault.action == "SIGSTOP":
        try:
            # The fault itself, not a wait: long enough that the group has given its partitions to others.
            await asyncio.sleep(1.25 * stack.settings.session_timeout_s)
        finally:
            child.signal(signal.SIGCONT)
        return None
    await async_wait_for(lambda: not child.alive, f"{name} to end")
    await async_wait_for(lambda: children(stack, fault.kind)[name] is not child, f"{name} to be restarted")
    return name


def children(stack: Stack, kind: Kind) -> dict[str, Child]:
    """The processes of a kind by name, of servers that have been started."""
    if kind in ("kafka", "redis"):
        return {s.name: s.child for s in stack.servers if s.name == kind and s.child is not None}
    return {w.name: w.child for w in stack.workers if w.kind == kind}
