"""Measures from outside how soon replies are joined, and versions published, after a fault."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import redis.asyncio

from cortex_core.weights import WeightsManifest
from streams.connections import retry
from streams.kafka.follower import TopicFollower
from streams.kafka.reader import reading
from streams.kafka.topics import Topics, partition_of
from streams.replay_store import ReplayKeys
from streams.settings import Settings
from streams.testing import async_wait_for
from streams.weights.records import MANIFEST, decode_key
from tests.chaos.load import Load, Sent

POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Recovery:
    """Seconds from a fault on."""

    joined_s: float
    """Until replies that were sent after it were joined in every partition."""
    learned_s: float
    """Until every model had a version that learned from an experience published after it."""
    call_s: float
    """The longest call of a client in the round."""


class Versions:
    """All versions of the weights topic, in its order; also those that compaction has removed since."""

    def __init__(self, settings: Settings) -> None:
        self.seen: list[tuple[float, WeightsManifest]] = []
        """When it was read, on the monotonic clock, and the version."""
        self.follower = TopicFollower(settings, Topics.of(settings).weights, self._note)

    async def _note(self, records: list[Any]) -> None:
        for record in records:
            if record.value is not None and decode_key(record.key)[2] == MANIFEST:
                manifest = WeightsManifest.model_validate_json(record.value)
                self.seen.append((time.monotonic(), manifest))

    def newest(self) -> dict[str, int]:
        """The newest version of each model."""
        return {manifest.model_id: manifest.version for _, manifest in self.seen}


@dataclass
class Watch:
    """Waits until a stack works again."""

    settings: Settings
    load: Load
    versions: Versions
    began: float = 0.0

    def begin(self) -> None:
        """Measures from now on: right before the fault."""
        self.began = time.monotonic()

    async def stored(self, more: int) -> None:
        """Waits until so many more experiences are in replay."""
        async with redis.asyncio.Redis.from_url(self.settings.redis_address) as client:

            async def count() -> int:
                names = [ReplayKeys(self.settings.topic_prefix, model).order for model in self.load.models]
                return sum([int(await client.zcard(name)) for name in names])

            enough = await count() + more

            async def is_enough() -> bool:
                return await count() >= enough

            await async_wait_for(is_enough, "replies to be joined", every_s=0.002)

    async def joined(self) -> float:
        """Waits until replies are joined in every partition; returns after how many seconds they were."""
        # Partition → when the first reply that was sent after the fault was found in replay.
        first: dict[int, float] = {}
        client = redis.asyncio.Redis.from_url(self.settings.redis_address, socket_timeout=1.0)
        async with client:

            async def all_partitions() -> bool:
                sent = [s for s in self.load.recent if s.at > self.began and self._partition(s) not in first]
                with contextlib.suppress(redis.RedisError, OSError):
                    for it in await self._found(client, sent):
                        first.setdefault(self._partition(it), time.monotonic())
                return len(first) == self.settings.partitions

            await async_wait_for(all_partitions, "replies to be joined in every partition", every_s=POLL_S)
        return max(first.values()) - self.began

    def _partition(self, sent: Sent) -> int:
        return partition_of(sent.conversation_id, self.settings.partitions)

    async def _found(self, client: redis.asyncio.Redis, sent: Sequence[Sent]) -> list[Sent]:
        """Those whose interaction's entry contains them."""
        found = []
        for model_id in {s.model_id for s in sent}:
            its = [s for s in sent if s.model_id == model_id]
            keys = ReplayKeys(self.settings.topic_prefix, model_id)
            values: Any = await client.hmget(keys.entries, [s.interaction_id for s in its])
            found += [s for s, v in zip(its, values, strict=True) if v and s.reply_id.encode() in v]
        return found

    async def learned(self) -> float:
        """Waits until every model has a version of later experiences; returns after how many seconds."""
        ends = await retry(self._ends, self.settings)

        def first() -> list[float]:
            """For each model that has one: when its first such version was read."""
            at: dict[str, float] = {}
            for read, manifest in self.versions.seen:
                if any(n > ends[name] for name, n in manifest.consumed.items()):
                    at.setdefault(manifest.model_id, read)
            return [*at.values()] if len(at) == len(self.load.models) else []

        return max(await async_wait_for(first, "a version of every model", every_s=POLL_S)) - self.began

    async def _ends(self) -> dict[str, int]:
        """The ends of the experiences topic, by the names that versions have for its partitions."""
        async with reading(self.settings, [Topics.of(self.settings).experiences]) as consumer:
            ends = await consumer.end_offsets(sorted(consumer.assignment()))
        return {f"{tp.topic}-{tp.partition}": end for tp, end in ends.items()}
