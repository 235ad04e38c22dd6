"""Reads topics without a consumer group: commits nothing and causes no rebalance.

    async with reading(settings, [topic]) as consumer:              # all partitions, from their beginnings
        async for record in records_to_end(consumer, settings): ...  # all records up to the present end

`Watchdog` detects a client that stops reading without an error; `EndProbe` queries the ends of partitions.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Hashable, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from aiokafka import AIOKafkaConsumer, TopicPartition

from cortex_core.errors import UnavailableError
from streams.connections import PROBE_TIMEOUT_S, kafka_client_options
from streams.kafka.clients import started
from streams.kafka.topics import MAX_RECORD_BYTES
from streams.settings import Settings

K = TypeVar("K", bound=Hashable)

PROBE_S = 2.0
"""Seconds between queries of the topics' end offsets: for `/readyz`, the lag, and the watchdogs."""
STALL_S = 30.0
"""Seconds without progress, with more to read, after which a client counts as stalled. More than an open
transaction can block readers: for its timeout of 10 s, plus the brokers' 10 s between checks for it."""


@contextlib.asynccontextmanager
async def reading(
    settings: Settings,
    topics: Iterable[str] = (),
    start: Mapping[TopicPartition, int] | None = None,
    *,
    committed_only: bool = True,
    fetch_bytes: int = MAX_RECORD_BYTES,
) -> AsyncIterator[AIOKafkaConsumer]:
    """A consumer without a group.

    Args:
        topics: topics to read with all their partitions, from the beginning unless the caller seeks.
        start: instead of topics, the partitions to read with the first offset of each.
        committed_only: whether to omit records of open and aborted transactions.
        fetch_bytes: of each partition, at most, in one fetch; a larger record comes alone.

    Raises:
        KafkaError, OSError: the broker does not answer, or has no such topic.
    """
    consumer = AIOKafkaConsumer(
        *topics,
        **kafka_client_options(settings),
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed" if committed_only else "read_uncommitted",
        max_partition_fetch_bytes=fetch_bytes,
    )
    async with started(consumer):
        # aiokafka 0.14: `stop` raises CancelledError if a task that `start` created has not run yet.
        await asyncio.sleep(0)
        if start:
            consumer.assign(list(start))
            for partition, offset in start.items():
                consumer.seek(partition, offset)
        yield consumer


async def records_to_end(consumer: AIOKafkaConsumer, settings: Settings) -> AsyncIterator[Any]:
    """All records from the consumer's positions to the ends of its partitions at the time of the call.

    Raises:
        UnavailableError: no record came for `STALL_S` although there are more.
        KafkaError, OSError: the broker does not answer.
    """
    ends = await consumer.end_offsets(sorted(consumer.assignment()))
    watchdog: Watchdog[TopicPartition] = Watchdog()
    while True:
        positions = {tp: await consumer.position(tp) for tp in ends}
        if all(positions[tp] >= end for tp, end in ends.items()):
            return
        if stalled := watchdog.stalled(positions, ends):
            raise UnavailableError(
                f"Kafka at {settings.kafka_address} sent nothing of {stalled[0].topic} for {STALL_S:g} s"
            )
        for tp, records in (await consumer.getmany(timeout_ms=500)).items():
            for record in records:
                if record.offset < ends[tp]:
                    yield record


class Watchdog(Generic[K]):
    """Detects stalled partitions: their position does not advance although there is more to read."""

    def __init__(self, seconds: float = STALL_S) -> None:
        self._seconds = seconds
        self._moved: dict[K, tuple[int, float]] = {}

    def stalled(self, positions: Mapping[K, int], ends: Mapping[K, int]) -> list[K]:
        """The partitions that have not advanced for the given time. To be called about every second.

        Args:
            positions: the next offset to read of each partition.
            ends: the offset after the last record of each.
        """
        now = time.monotonic()
        moved, self._moved = self._moved, {}
        for each, position in positions.items():
            before, since = moved.get(each, (-1, now))
            stuck = position == before and position < ends[each]
            self._moved[each] = (position, since if stuck else now)
        return [each for each, (_, since) in self._moved.items() if now - since > self._seconds]

    def reset(self) -> None:
        """Restarts the measurement, after a known reason not to advance."""
        self._moved.clear()


class EndProbe:
    """Queries the ends of partitions, including uncommitted records.

    The end that a reader of committed records gets excludes committed transactions after an open one.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._open = contextlib.AsyncExitStack()
        self._consumer: Any = None
        self._topics: set[str] = set()
        self._lock = asyncio.Lock()

    async def ends(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        """Offset after the last record of each.

        Raises:
            KafkaError, OSError (TimeoutError too): the broker does not answer in time.
        """
        async with self._lock:
            try:
                async with asyncio.timeout(PROBE_TIMEOUT_S):
                    if self._consumer is None:
                        client = reading(self._settings, committed_only=False)
                        self._consumer = await self._open.enter_async_context(client)
                    return dict(await self._consumer.end_offsets(list(partitions)))
            except BaseException:
                await self.close()
                raise

    async def topic_ends(self, topic: str) -> dict[TopicPartition, int]:
        """Offset after the last record of each of the topic's partitions; added ones appear in some minutes.

        Raises:
            KafkaError, OSError (TimeoutError too): the broker does not answer in time.
        """
        if topic not in self._topics:  # asked for one partition, the client learns of all
            await self.ends([TopicPartition(topic, 0)])
            self._topics.add(topic)
        partitions = self._consumer.partitions_for_topic(topic) if self._consumer else {0}
        return await self.ends([TopicPartition(topic, p) for p in sorted(partitions)])

    async def close(self) -> None:
        """Closes the connection; the next query opens another."""
        self._consumer = None
        self._topics.clear()
        await self._open.aclose()
