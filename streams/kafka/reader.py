"""Reading topics without a consumer group: nothing is committed, and nobody else is disturbed.

    async with reading(settings, [topic]) as consumer:              # all partitions, from their beginnings
        async for record in records_to_end(consumer, settings): ...  # what stands there now

`Watchdog` notices a client that stops reading without an error; `EndProbe` asks where partitions end.
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

STALL_S = 30.0
"""Seconds without progress, with more to read, after which reading counts as stalled. An open transaction
holds readers back too, and rightly: for its timeout of 10 s, and the 10 s in which brokers look for it."""


@contextlib.asynccontextmanager
async def reading(
    settings: Settings,
    topics: Iterable[str] = (),
    start: Mapping[TopicPartition, int] | None = None,
    *,
    committed_only: bool = True,
) -> AsyncIterator[AIOKafkaConsumer]:
    """A consumer without a group.

    Args:
        topics: read with all their partitions, from the beginning unless the caller seeks.
        start: instead of topics, the partitions to read, each from its offset on.
        committed_only: whether records of open and aborted transactions are left out.

    Raises:
        KafkaError, OSError: the broker does not answer, or has no such topic.
    """
    consumer = AIOKafkaConsumer(
        *topics,
        **kafka_client_options(settings),
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed" if committed_only else "read_uncommitted",
        max_partition_fetch_bytes=MAX_RECORD_BYTES,
    )
    async with started(consumer):
        # aiokafka 0.14: `stop` raises CancelledError where a task that `start` made has not begun to run.
        await asyncio.sleep(0)
        if start:
            consumer.assign(list(start))
            for partition, offset in start.items():
                consumer.seek(partition, offset)
        yield consumer


async def records_to_end(consumer: AIOKafkaConsumer, settings: Settings) -> AsyncIterator[Any]:
    """Every record from where the consumer stands to where its partitions end at the time of the call.

    Raises:
        UnavailableError: nothing came for `STALL_S` although there is more.
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
    """Tells where reading stands still: its position does not move although there is more to read."""

    def __init__(self, seconds: float = STALL_S) -> None:
        self._seconds = seconds
        self._moved: dict[K, tuple[int, float]] = {}

    def stalled(self, positions: Mapping[K, int], ends: Mapping[K, int]) -> list[K]:
        """Those that have not moved for so long. To be asked every second or so.

        Args:
            positions: the next offset to read of each partition.
            ends: the offset after the last record of each.
        """
        now = time.monotonic()
        moved, self._moved = self._moved, {}
        for each, position in positions.items():
            before, since = moved.get(each, (-1, now))
            stands = position == before and position < ends[each]
            self._moved[each] = (position, since if stands else now)
        return [each for each, (_, since) in self._moved.items() if now - since > self._seconds]

    def reset(self) -> None:
        """Begins anew: there was a reason to stand still, and it is gone."""
        self._moved.clear()


class EndProbe:
    """Asks where partitions end, counting what is not committed yet.

    An open transaction before a committed one hides the latter from the end that a reader of committed
    records is told.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._open = contextlib.AsyncExitStack()
        self._consumer: Any = None
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

    async def close(self) -> None:
        """Closes the connection; the next question opens another."""
        self._consumer = None
        await self._open.aclose()
