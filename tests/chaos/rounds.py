"""Rounds of chaos on one stack: load, faults, recovery, and the comparison of all that is stored."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from streams.kafka.topics import partition_of
from streams.local.stack import Stack
from streams.settings import Settings
from streams.testing import async_wait_for
from tests.chaos.checks import deviations, settled
from tests.chaos.faults import Fault, dealt, inject
from tests.chaos.load import Load
from tests.chaos.watch import Recovery, Versions, Watch

log = logging.getLogger("chaos")

PARTITIONS = 4
BURST = 12
"""Conversations, about 80 events, of which joiners process 5 at a time. As many new experiences precede the
fault, at most."""
EACH = 2
"""Processes of each kind of worker."""


@dataclass(slots=True)
class Round:
    """What happened in one round."""

    number: int
    faults: tuple[Fault, ...]
    recovery: Recovery | None = None
    """None: it did not recover."""
    events: int = 0
    """Distinct events in the topics since the first round."""
    republished: int = 0
    """Records of the experiences topic that repeat or amend another one, since the first round."""
    seconds: float = 0.0
    machine_load: float = 0.0
    """The load average of a minute at its end; those of other programs count."""
    unasked: list[str] = field(default_factory=list)
    """Processes that ended without a fault of theirs; `cortex up` restarted them."""
    deviations: list[str] = field(default_factory=list)


def settings_of(data: Path) -> Settings:
    """The defaults of `cortex up`, except for what makes rounds short and their load small.

    Raises:
        ConfigError: an invalid value in the environment.
    """
    return Settings.load(
        data=data,
        topic_prefix="chaos",
        partitions=PARTITIONS,
        port=0,
        encoder="hashing",
        # Interactions without a reply are closed a few rounds later.
        join_window_s=60.0,
        join_batch=5,
        # An audit needs all entries.
        replay_capacity=1_000_000,
        log_format="json",
    )


@dataclass
class Chaos:
    """A running stack, and all that was sent to it."""

    stack: Stack
    load: Load
    versions: Versions
    seed: int
    """Determines the faults, the processes that they hit and what agents do; not the timing."""
    ended: list[str]
    """What `cortex up` reports of processes that ended; emptied after each round."""

    def __post_init__(self) -> None:
        self._faults = dealt(random.Random(self.seed))
        self._number = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, settings: Settings, seed: int, say: Callable[[str], None]) -> AsyncIterator[Chaos]:
        """Starts everything; stops it at the end and keeps the data folder."""
        ended: list[str] = []

        def on_event(text: str) -> None:
            say(text)
            if text.endswith("; restarting it"):
                ended.append(text)

        counts = {"joiners": EACH, "trainers": EACH, "inference": EACH}
        async with Stack(settings, **counts, on_event=on_event) as stack:
            load = Load(stack.settings, stack.inference_urls, models_for_each_trainer(settings))
            versions = Versions(stack.settings)
            async with versions.follower:
                yield cls(stack, load, versions, seed, ended)

    async def play(self, faults: tuple[Fault, ...] = ()) -> Round:
        """Plays the next round, with these faults or else random ones.

        That the stack does not recover, or is never done with what was sent, is a deviation, too.
        """
        self._number += 1
        rng = random.Random(f"{self.seed}, {self._number}")
        it, began = Round(self._number, faults or next(self._faults)), time.monotonic()
        ended: list[str | None] = []
        try:
            async with self.load.running(rng):
                await self._until_all_have_sent()
                watch = Watch(self.stack.settings, self.load, self.versions)
                # The fault falls into the processing of a burst, in a random phase.
                burst = asyncio.create_task(self.load.burst(rng, BURST))
                await watch.stored(rng.randint(1, BURST))
                watch.begin()
                faults_done = asyncio.gather(*(inject(fault, self.stack, rng) for fault in it.faults))
                ended, joined_s, learned_s, _ = await asyncio.gather(
                    faults_done, watch.joined(), watch.learned(), burst
                )
            it.recovery = Recovery(joined_s, learned_s, self.load.longest_s)
            await settled(self.stack)
            it.deviations, report = await deviations(self.stack, self.load, self.versions)
            it.events, it.republished = report.counts["acknowledged"], report.counts["republished"]
        except Exception as error:  # of `async_wait_for`, it names what did not happen
            log.exception("round %s", it.number)
            it.deviations.append(f"{type(error).__name__}: {error}")
        it.unasked = _without(self.ended, ended)
        self.ended.clear()
        it.seconds, it.machine_load = time.monotonic() - began, os.getloadavg()[0]
        return it

    async def _until_all_have_sent(self) -> None:
        partitions = self.stack.settings.partitions

        def all_have() -> bool:
            sent = {partition_of(s.conversation_id, partitions) for s in self.load.recent}
            return len(sent) == partitions

        await async_wait_for(all_have, "a reply in every partition")

    def keep(self, failed: Round) -> Path:
        """Writes what is needed to look into a failed round beside its data."""
        file = self.stack.settings.data / "chaos.json"
        file.write_text(json.dumps({"seed": self.seed, **asdict(failed)}, indent=1))
        return file


def _without(reports: Sequence[str], names: Iterable[str | None]) -> list[str]:
    """The reports of processes that ended, less one of each process that a fault has ended."""
    left = [*reports]
    for name in names:
        if asked := [text for text in left if text.startswith(f"{name} ")]:
            left.remove(asked[0])
    return left


def models_for_each_trainer(settings: Settings) -> list[str]:
    """One model for each trainer: they take the partitions in turn."""
    names = [f"model-{n}" for n in range(100)]
    return [next(m for m in names if partition_of(m, settings.partitions) % EACH == n) for n in range(EACH)]
