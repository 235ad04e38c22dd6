"""Reads a one-partition topic from its beginning and goes on reading: how weights and control are followed.

    follower = TopicFollower(settings, "cortex.control", handle)
    await follower.start()              # returns at once; reading goes on in a task
    await follower.catch_up()           # everything committed before this call has been handled
    ...
    await follower.stop()

It outlives brokers that go away, and a client that stops reading without an error: a watchdog compares
where the topic ends with where reading stands and opens a new client. It knows nothing of what it reads.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Self

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition

from streams.connections import REACHABILITY_ERRORS, backoff, kafka_client_options
from streams.kafka.clients import start, started, stop
from streams.kafka.topics import MAX_RECORD_BYTES
from streams.settings import Settings

log = structlog.get_logger(__name__)

Handle = Callable[[list[Any]], Awaitable[None]]
"""Given the records of one fetch, in order. A record is handed over again after an error in the middle."""

PROBE_S = 2.0
"""Seconds between two questions where the topic ends: what `/readyz` knows, and the watchdog's eyes."""
PROBE_TIMEOUT_S = 5.0
STALL_S = 25.0
"""Seconds without progress, with more to read, after which the client is replaced. An open transaction also
holds readers back, and rightly: for at most its timeout, and the ten seconds in which brokers look for it."""


@contextlib.asynccontextmanager
async def reading(
    settings: Settings, partition: TopicPartition, offset: int
) -> AsyncIterator[AIOKafkaConsumer]:
    """A consumer of one partition's committed records, from `offset` on, without a group.

    Raises:
        KafkaError, OSError: the broker does not answer.
    """
    consumer = AIOKafkaConsumer(
        **kafka_client_options(settings),
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        max_partition_fetch_bytes=MAX_RECORD_BYTES,
    )
    async with started(consumer):
        consumer.assign([partition])
        consumer.seek(partition, offset)
        yield consumer


class EndProbe:
    """Asks where partitions end, counting what is not committed yet.

    Read uncommitted on purpose: an open transaction before a committed one hides the latter from the end
    that a committed reader is told.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._consumer: AIOKafkaConsumer | None = None
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
                        self._consumer = await start(AIOKafkaConsumer(**kafka_client_options(self._settings)))
                    return dict(await self._consumer.end_offsets(list(partitions)))
            except BaseException:
                await self.close()
                raise

    async def close(self) -> None:
        """Closes the connection; the next question opens another."""
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await stop(consumer)


class TopicFollower:
    """Hands every record of partition 0 to `handle`, in order, from the first one on."""

    def __init__(
        self,
        settings: Settings,
        topic: str,
        handle: Handle,
        *,
        on_state: Callable[[str | None], None] | None = None,
        stall_s: float = STALL_S,
    ) -> None:
        """
        Args:
            handle: must not raise for what a record holds; what it raises is taken for a server that is away.
            on_state: told why Kafka does not answer, or None when it does; for `/readyz`.
        """
        self.settings = settings
        self.partition = TopicPartition(topic, 0)
        self.position = 0
        """Offset of the next record to handle."""
        self.restarts = 0
        """How often reading was begun anew, after an error or by the watchdog."""
        self._handle = handle
        self._on_state = on_state or (lambda _why: None)
        self._stall_s = stall_s
        self._moved = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._probe = EndProbe(settings)
        self._stalled = False
        self._away = False
        self._busy = False

    async def start(self) -> None:
        """Begins reading in the background; the broker need not answer yet."""
        self._tasks = [asyncio.create_task(self._read_for_ever()), asyncio.create_task(self._watch())]

    async def stop(self) -> None:
        """Ends reading; safe to call twice."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._probe.close()

    async def __aenter__(self) -> TopicFollower:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def end(self) -> int:
        """Offset after the topic's last record, committed or not.

        Raises:
            KafkaError, OSError, TimeoutError: the broker does not answer.
        """
        return (await self._probe.ends([self.partition]))[self.partition]

    async def catch_up(self) -> None:
        """Returns when all that stood in the topic at the time of the call has been handled.

        Waits while the broker is away, and for transactions open at that time (at most their timeout).
        """
        async for _ in backoff():
            try:
                target = await self.end()
                break
            except REACHABILITY_ERRORS as error:
                self._say_away(error)
        async with self._moved:
            await self._moved.wait_for(lambda: self.position >= target)

    async def _read_for_ever(self) -> None:
        async for _ in backoff():
            try:
                await self._read()
            except REACHABILITY_ERRORS as error:
                self._say_away(error)
            except Exception as error:
                log.exception("reading begins anew", topic=self.partition.topic, error=str(error))
            self.restarts += 1

    async def _read(self) -> None:
        async with reading(self.settings, self.partition, self.position) as consumer:
            self._stalled = False
            while not self._stalled:
                batches = await consumer.getmany(self.partition, timeout_ms=100)
                records = batches.get(self.partition, [])
                if records:
                    self._busy = True
                    try:
                        await self._handle(records)
                    finally:
                        self._busy = False
                # Asked of the client, as transaction markers move it too and are handed to nobody.
                position = await consumer.position(self.partition)
                if position != self.position:
                    async with self._moved:
                        self.position = position
                        self._moved.notify_all()

    async def _watch(self) -> None:
        seen, since = -1, time.monotonic()
        while True:
            try:
                end = await self.end()
                if self._away:
                    log.warning("reachable again", topic=self.partition.topic)
                self._away = False
                self._on_state(None)
            except REACHABILITY_ERRORS as error:
                self._say_away(error)
                end = 0
            if self.position != seen or self._busy or self.position >= end:
                seen, since = self.position, time.monotonic()
            elif time.monotonic() - since > self._stall_s:
                log.warning("reading stands still", topic=self.partition.topic, at=seen, end=end)
                self._stalled, since = True, time.monotonic()
            await asyncio.sleep(PROBE_S)

    def _say_away(self, error: BaseException) -> None:
        why = f"Kafka at {self.settings.kafka_address} does not answer ({type(error).__name__}: {error})"
        say = log.debug if self._away else log.warning
        say("unreachable", topic=self.partition.topic, why=why)
        self._away = True
        self._on_state(why)


class StateFollower(abc.ABC):
    """What a one-partition topic adds up to, kept up to date: the life that all such followers share."""

    def __init__(self, settings: Settings, topic: str, on_state: Callable[[str | None], None] | None) -> None:
        self.settings = settings
        self.caught_up = asyncio.Event()
        """Set once all that stood in the topic at the start has been read."""
        self._topic = TopicFollower(settings, topic, self._handle, on_state=on_state)
        self._starting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begins to read; the broker need not answer yet."""
        await self._topic.start()
        self._starting = asyncio.create_task(self._start())

    async def stop(self) -> None:
        """Ends reading; safe to call twice."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        await self._topic.stop()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def catch_up(self) -> None:
        """Returns when everything committed before this call is known."""
        await self._topic.catch_up()

    async def _start(self) -> None:
        await self._topic.catch_up()
        self.caught_up.set()

    @abc.abstractmethod
    async def _handle(self, records: list[Any]) -> None:
        """See `Handle`."""
