"""Follows all partitions of a topic from their beginning, as workers follow weights and control.

    follower = TopicFollower(settings, topic, handle)
    await follower.start()              # returns at once; a task reads from now on
    await follower.catch_up()           # everything committed before this call has been handled
    ...
    await follower.stop()

It survives unavailable brokers, added partitions, and a client that stops reading without an error: a
watchdog compares the positions with the ends of the partitions and opens a new client. It does not interpret
the records.
"""

from __future__ import annotations

import abc
import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, Self

import prometheus_client
import structlog
from aiokafka import TopicPartition

from cortex_core.errors import ConfigError
from streams.connections import backoff, explain, retry
from streams.kafka.reader import PROBE_S, STALL_S, EndProbe, Watchdog, reading
from streams.kafka.refusal import Refusal
from streams.settings import Settings

log = structlog.get_logger(__name__)

Handle = Callable[[list[Any]], Awaitable[None]]
"""Called with the records of one fetch of a partition, in order; called with them again if it raises."""

REFUSED = prometheus_client.Counter(
    "cortex_records_refused", "Records of the followed topics that were refused", ["topic", "reason"]
)


class TopicFollower:
    """Calls `handle` with every record, in order within each partition, from the first one on."""

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
            handle: must not raise because of a record's content; its errors are treated as those of Kafka.
            on_state: called with the reason why Kafka is unavailable, or None if it is available.
            stall_s: seconds without progress after which a new client is opened.
        """
        self.settings = settings
        self.topic = topic
        self.positions: dict[TopicPartition, int] = {}
        """Offset of the next record to handle, by partition."""
        self.restarts = 0
        """Number of new clients, after an error or by the watchdog."""
        self._handle = handle
        self._on_state = on_state or (lambda _why: None)
        self._stall_s = stall_s
        self._moved = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._probe = EndProbe(settings)
        self._reopen = False
        self._unavailable = False
        self._busy = False
        self._refusal = Refusal()

    async def start(self) -> None:
        """Starts reading in the background; the broker need not be available yet."""
        self._tasks = [asyncio.create_task(self._read_forever()), asyncio.create_task(self._watch())]

    async def stop(self) -> None:
        """Stops reading; safe to call twice."""
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

    async def ends(self) -> dict[TopicPartition, int]:
        """Offset after each partition's last record, committed or not.

        Raises:
            KafkaError, OSError, TimeoutError: the broker does not answer.
        """
        return await self._probe.topic_ends(self.topic)

    async def catch_up(self) -> None:
        """Returns when all records in the topic at the time of the call have been handled.

        Waits while the broker is unavailable, and for transactions open at that time (at most their timeout).

        Raises:
            ConfigError: the broker refuses the configuration of this process.
        """
        target = await retry(self.ends, self.settings, lambda _, why: self._on_state(why))
        async with self._moved:
            await self._moved.wait_for(
                lambda: all(self.positions.get(tp, 0) >= end for tp, end in target.items())
            )

    async def until_refused(self) -> NoReturn:
        """Waits until Kafka refuses the configuration of this process, if that ever happens.

        Raises:
            ConfigError: it happened.
        """
        await self._refusal.wait()

    async def _read_forever(self) -> None:
        async for _ in backoff():
            try:
                await self._read()
            except Exception as error:
                await self._report_unavailable(error)
            self.restarts += 1

    async def _read(self) -> None:
        start = {tp: self.positions.get(tp, 0) for tp in await self.ends()}
        async with reading(self.settings, start=start) as consumer:
            self.positions = start
            self._reopen = False
            while not self._reopen:
                for records in (await consumer.getmany(timeout_ms=100)).values():
                    self._busy = True
                    try:
                        await self._handle(records)
                    finally:
                        self._busy = False
                # The client's own positions: transaction markers advance them too, and are not returned.
                positions = {tp: await consumer.position(tp) for tp in start}
                if positions != self.positions:
                    async with self._moved:
                        self.positions = positions
                        self._moved.notify_all()

    async def _watch(self) -> None:
        watchdog: Watchdog[TopicPartition] = Watchdog(self._stall_s)
        while True:
            ends: dict[TopicPartition, int] = {}  # unknown, so that the watchdog does not report a stall
            try:
                ends = await self.ends()
                if self._unavailable:
                    log.warning("available again", topic=self.topic)
                self._unavailable = False
                self._on_state(None)
            except Exception as error:
                await self._report_unavailable(error)
            if self._busy:
                watchdog.reset()
            elif stalled := watchdog.stalled({tp: self.positions.get(tp, 0) for tp in ends}, ends):
                log.warning("consumer stalled", topic=self.topic, partition=stalled[0].partition)
                self._reopen = True
                watchdog.reset()
            if self.positions and ends.keys() - self.positions.keys():
                log.info("partitions added", topic=self.topic, partitions=len(ends))
                self._reopen = True
            await asyncio.sleep(PROBE_S)

    async def _report_unavailable(self, error: Exception) -> None:
        """Logs and reports why reading failed. Reading continues: the state read so far remains useful."""
        meaning = await explain(error, self.settings)
        if meaning is None:
            log.exception("reading failed", topic=self.topic, error=str(error))
            return
        if isinstance(meaning, ConfigError):
            self._refusal.set(meaning)
        write = log.debug if self._unavailable else log.warning
        write("unavailable", topic=self.topic, why=str(meaning))
        self._unavailable = True
        self._on_state(str(meaning))


class StateFollower(abc.ABC):
    """Base class: state that is built from a topic and kept up to date.

    A record that raises any error is refused: logged, and counted in `refused` and in `/metrics`. It does not
    affect other records.
    """

    def __init__(self, settings: Settings, topic: str, on_state: Callable[[str | None], None] | None) -> None:
        self.settings = settings
        self.caught_up = asyncio.Event()
        """Set once all records in the topic at the start have been read."""
        self.refused: Counter[str] = Counter()
        """Number of refused records, by reason."""
        self._topic = TopicFollower(settings, topic, self.handle, on_state=on_state)
        self._starting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Starts reading in the background; the broker need not be available yet."""
        await self._topic.start()
        self._starting = asyncio.create_task(self._start())

    async def stop(self) -> None:
        """Stops reading; safe to call twice."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        await self._topic.stop()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def until_caught_up(self) -> None:
        """Returns once all records in the topic at the start have been read.

        Raises:
            ConfigError: the broker refuses the configuration of this process.
        """
        assert self._starting is not None, "start() first"
        await asyncio.shield(self._starting)

    async def until_refused(self) -> NoReturn:
        """Waits until Kafka refuses the configuration of this process, if that ever happens.

        Raises:
            ConfigError: it happened.
        """
        await self._topic.until_refused()

    async def catch_up(self) -> None:
        """Returns when everything committed before this call has been read."""
        await self._topic.catch_up()

    async def _start(self) -> None:
        await self._topic.catch_up()
        self.caught_up.set()

    async def handle(self, records: list[Any]) -> None:
        """Adds records to the state, or refuses them."""
        for record in records:
            try:
                await self._add(record)
            except Exception as error:
                self._refuse(getattr(error, "reason", "damaged"), record, error)

    def _refuse(self, reason: str, record: Any, error: Exception) -> None:
        self._count_refused(reason)
        log.warning(
            "record refused",
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
            reason=reason,
            error=str(error)[:2_000],
        )

    def _count_refused(self, reason: str) -> None:
        self.refused[reason] += 1
        REFUSED.labels(self._topic.topic.rpartition(".")[2], reason).inc()

    @abc.abstractmethod
    async def _add(self, record: Any) -> None:
        """Adds one record to the state. Any error refuses the record; its attribute `reason` is counted."""
