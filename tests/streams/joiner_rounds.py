"""Injects faults into two joiners under load and compares their experiences with the brute-force join.

    python -m tests.streams.joiner_rounds --rounds 20 --seed 0

Each round injects one of three faults while events are sent: kill -9 of a joiner, which is replaced; SIGSTOP
of a joiner until the group has reassigned its partitions, then SIGCONT; a third joiner that joins and leaves.
In half of the conversations each reply has its interaction's id; in the others half of the replies have none,
and move if their interaction arrives after them. Events arrive in random order.

Lost: replies missing from their experience. Doubled: replies repeated in an experience or in a wrong one.
Unpublished: experiences whose highest version in the topic differs from replay, or one of whose versions has
different bytes in two records. Exits with 1 unless all three are 0.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import tempfile
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import redis

from streams.events import InteractionEvent, ReplyEvent
from streams.kafka.topics import Topics
from streams.replay_store import RedisReplayBuffer
from streams.settings import Settings
from streams.testing import (
    WorkerProcess,
    async_wait_for,
    end_spawned,
    kafka_server,
    redis_server,
    send,
    spawn_worker,
)
from tests.streams import joined
from tests.streams.kafka_helpers import read_all

CONVERSATIONS = 20
"""Conversations per send, in random order; about 120 events."""


@dataclass(frozen=True)
class Round:
    """The result of a round; compares all events since the first round."""

    fault: str
    events: int
    lost: int
    doubled: int


@dataclass
class Rounds:
    """Rounds on one group of joiners."""

    settings: Settings
    seed: int
    events: list[InteractionEvent | ReplyEvent] = field(default_factory=list)
    joiners: list[WorkerProcess] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.client = redis.Redis.from_url(self.settings.redis_address)
        self.conversations = 0
        self.faults: dict[str, Callable[[], Awaitable[None]]] = {
            "kill -9": self._kill,
            "SIGSTOP past the session": self._stop,
            "a third joins and leaves": self._third,
        }

    async def play(self, number: int) -> Round:
        """Injects a fault while events are sent, and compares the result when all offsets are committed."""
        while len(self.joiners) < 2:
            self.joiners.append(self._spawn())
        for joiner in self.joiners:
            await asyncio.to_thread(joiner.wait_ready)
        name, before = [*self.faults][number % len(self.faults)], len(self.events)
        fault = asyncio.ensure_future(self.faults[name]())
        while not fault.done():
            await self._send()
            await asyncio.wait({fault}, timeout=0.2)
        await fault
        await async_wait_for(lambda: joined.all_committed(self.settings), "all events to be joined")
        got = joined.summary(joined.replay(self.settings, self.client))
        difference = joined.Difference.of(got, joined.expected(self.events))
        return Round(name, len(self.events) - before, difference.lost, difference.doubled)

    async def unpublished(self) -> set[str]:
        """Interaction ids whose experience in the topic is wrong or missing."""
        records = await read_all(self.settings, Topics.of(self.settings).experiences)
        return joined.wrongly_published(records, joined.replay(self.settings, self.client))

    async def _send(self) -> None:
        first, self.conversations = self.conversations, self.conversations + CONVERSATIONS
        events = [
            e for n in range(first, first + CONVERSATIONS) for e in joined.conversation(n, named=n % 2 == 0)
        ]
        self.rng.shuffle(events)
        self.events += events
        await send(self.settings, events)

    def _spawn(self) -> WorkerProcess:
        return spawn_worker("joiner", self.settings, join_batch=self.rng.choice([3, 20, 100]))

    async def _kill(self) -> None:
        victim = self.joiners.pop(self.rng.randrange(len(self.joiners)))
        await self._progress()
        victim.kill()
        self.joiners.append(self._spawn())
        await self._progress()

    async def _stop(self) -> None:
        stopped, other = self.rng.sample(self.joiners, 2)
        await self._progress()
        stopped.signal(signal.SIGSTOP)
        try:
            both_topics = 2 * self.settings.partitions
            await async_wait_for(
                lambda: len(joined.partitions(other)) == both_topics, "the other to own all partitions"
            )
            await self._progress()
        finally:
            stopped.signal(signal.SIGCONT)
        await self._progress()

    async def _third(self) -> None:
        third = self._spawn()
        await asyncio.to_thread(third.wait_ready)
        await self._progress()
        code = await asyncio.to_thread(third.stop)
        assert code == 0, third.log_text()

    async def _progress(self) -> None:
        """Waits for a random number of new experiences."""
        enough = self._experiences + self.rng.randrange(1, 40)
        await async_wait_for(lambda: self._experiences >= enough, "progress")

    @property
    def _experiences(self) -> int:
        return len(RedisReplayBuffer.of(self.settings, "default", self.client).ids())


async def main(rounds: int, seed: int, settings: Settings) -> bool:
    """Plays the rounds; returns whether nothing was lost, doubled or unpublished."""
    run, is_good = Rounds(settings, seed), True
    print(f"| round | {'fault':<24} | events | lost | doubled |")
    print(f"|------:|{'-' * 26}|-------:|-----:|--------:|")
    for n in range(rounds):
        it = await run.play(n)
        is_good = is_good and not (it.lost or it.doubled)
        print(
            f"| {n + 1:>5} | {it.fault:<24} | {it.events:>6} | {it.lost:>4} | {it.doubled:>7} |", flush=True
        )
    unpublished = await run.unpublished()
    wanted = joined.expected(run.events)
    print(
        f"\n{len(run.events)} events, {len(wanted)} experiences with replies; unpublished: {len(unpublished)}"
    )
    codes = [joiner.stop() for joiner in run.joiners]
    return is_good and not unpublished and not any(codes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with kafka_server(folder / "kafka") as kafka, redis_server(folder / "redis") as url:
            own = Settings.load(
                kafka=kafka,
                redis_url=url,
                data=folder,
                topic_prefix=f"rounds-{uuid.uuid4().hex[:8]}",
                partitions=4,
                port=0,
                session_timeout_s=1.0,
                replay_capacity=1_000_000,
            )
            try:
                was_good = asyncio.run(main(arguments.rounds, arguments.seed, own))
            finally:
                end_spawned()
    sys.exit(0 if was_good else 1)
