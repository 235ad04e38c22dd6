"""How far the state in Redis has come: the offsets that a joiner reads next, stored beside the state.

Kafka's committed offsets do not show that Redis has lost the effects of committed events (`streams.trail`).
Therefore the joiner writes its offsets to Redis too, after the effects of a batch and before Kafka's commit,
and starts at the smaller of both. What lies between them was published before: its effects are written again,
but not published again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from aiokafka import TopicPartition

from streams.kafka.topics import Topics
from streams.trail import GUARD, Trail

if TYPE_CHECKING:
    import redis.asyncio

# KEYS: the offsets, the trail. ARGV: the trail's acknowledged number, then partition, offsets …
ADVANCE = (
    GUARD.format(key=2, arg=1)
    + """
for i = 2, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i+1]) end
return 1
"""
)


class Offsets(Protocol):
    """A store of the next offset of each partition of both topics."""

    async def load(self) -> dict[TopicPartition, int]:
        """Reads all offsets; from now on, a loss of later writes is detected."""

    async def advance(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Writes the next offsets of some partitions, when the effects of all events before are written.

        Raises:
            WritesLost: the store has lost effects, and no offset was written.
        """


class StoredOffsets:
    """`Offsets` in Redis.

    Keys:

        <prefix>:join-offsets   hash   partition → offset in interactions, space, offset in replies
    """

    def __init__(self, client: redis.asyncio.Redis, prefix: str, trail: Trail) -> None:
        topics = Topics(prefix, 0)
        self.key = f"{prefix}:join-offsets"
        self._topics = (topics.interactions, topics.replies)
        self._client = client
        self._trail = trail
        self._advance = client.register_script(ADVANCE)
        self._known: dict[int, str] = {}

    async def load(self) -> dict[TopicPartition, int]:
        await self._trail.begin()
        found: Any = await self._client.hgetall(self.key)
        self._known = {int(partition): value.decode() for partition, value in found.items()}
        return {
            TopicPartition(topic, partition): offset
            for partition in self._known
            for topic, offset in zip(self._topics, self._offsets(partition), strict=True)
        }

    async def advance(self, offsets: Mapping[TopicPartition, int]) -> None:
        new = {partition: self._offsets(partition) for partition in {tp.partition for tp in offsets}}
        for tp, offset in offsets.items():
            new[tp.partition][self._topics.index(tp.topic)] = offset
        values = {
            partition: f"{interactions} {replies}" for partition, (interactions, replies) in new.items()
        }
        arguments = [each for pair in values.items() for each in pair]
        pipe = self._client.pipeline(transaction=False)
        await self._advance([self.key, self._trail.key], [self._trail.acknowledged, *arguments], client=pipe)
        number = await self._trail.note(pipe)
        advanced, noted = await pipe.execute()
        self._trail.check(min(advanced, noted), number)
        self._known |= values

    def _offsets(self, partition: int) -> list[int]:
        return [int(offset) for offset in self._known.get(partition, "0 0").split()]
