"""Reads a one-partition topic from its beginning and goes on reading: how weights and control are followed.

    follower = TopicFollower(settings, topic, handle)
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
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Self

import prometheus_client
import structlog
from aiokafka import TopicPartition

from streams.connections import backoff, explain, retry
from streams.kafka.reader import STALL_S, EndProbe, Watchdog, reading
from streams.settings import Settings

log = structlog.get_logger(__name__)

Handle = Callable[[list[Any]], Awaitable[None]]
"""Given the records of one fetch, in order. A record is handed over again after an error in the middle."""

PROBE_S = 2.0
"""Seconds between two questions where the topic ends: what `/readyz` knows, and the watchdog's eyes."""
REFUSED = prometheus_client.Counter(
    "cortex_records_refused", "Records of the followed topics that could not be used", ["topic", "reason"]
)


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
        self._unavailable = False
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

        Waits while the broker is unavailable, and for transactions open at that time (at most their timeout).

        Raises:
            ConfigError: the broker refuses this process.
        """
        target = await retry(self.end, self.settings, lambda _, why: self._on_state(why))
        async with self._moved:
            await self._moved.wait_for(lambda: self.position >= target)

    async def _read_for_ever(self) -> None:
        async for _ in backoff():
            try:
                await self._read()
            except Exception as error:
                await self._say_unavailable(error)
            self.restarts += 1

    async def _read(self) -> None:
        async with reading(self.settings, start={self.partition: self.position}) as consumer:
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
        watchdog: Watchdog[TopicPartition] = Watchdog(self._stall_s)
        while True:
            end = 0  # unknown: nothing to read is missed
            try:
                end = await self.end()
                if self._unavailable:
                    log.warning("reachable again", topic=self.partition.topic)
                self._unavailable = False
                self._on_state(None)
            except Exception as error:
                await self._say_unavailable(error)
            if self._busy:
                watchdog.reset()
            elif watchdog.stalled({self.partition: self.position}, {self.partition: end}):
                log.warning("reading stands still", topic=self.partition.topic, at=self.position, end=end)
                self._stalled = True
                watchdog.reset()
            await asyncio.sleep(PROBE_S)

    async def _say_unavailable(self, error: Exception) -> None:
        """Logs and shows why reading failed; it goes on, as what is known already is of use without it."""
        meaning = await explain(error, self.settings)
        if meaning is None:
            log.exception("reading failed", topic=self.partition.topic, error=str(error))
            return
        say = log.debug if self._unavailable else log.warning
        say("unavailable", topic=self.partition.topic, why=str(meaning))
        self._unavailable = True
        self._on_state(str(meaning))


class StateFollower(abc.ABC):
    """What a one-partition topic adds up to, kept up to date: the life that all such followers share.

    A record that cannot be used, whatever it raises, is refused: logged, and counted in `refused` and in
    `/metrics`. It costs itself alone.
    """

    def __init__(self, settings: Settings, topic: str, on_state: Callable[[str | None], None] | None) -> None:
        self.settings = settings
        self.caught_up = asyncio.Event()
        """Set once all that stood in the topic at the start has been read."""
        self.refused: Counter[str] = Counter()
        """Records that could not be used, by reason."""
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

    async def until_caught_up(self) -> None:
        """Returns once all that stood in the topic at the start has been read.

        Raises:
            ConfigError: the broker refuses this process.
        """
        assert self._starting is not None, "start() first"
        await asyncio.shield(self._starting)

    async def catch_up(self) -> None:
        """Returns when everything committed before this call is known."""
        await self._topic.catch_up()

    async def _start(self) -> None:
        await self._topic.catch_up()
        self.caught_up.set()

    async def _handle(self, records: list[Any]) -> None:
        for record in records:
            try:
                await self._add(record)
            except Exception as error:
                self._refuse(getattr(error, "reason", "damaged"), record, error)

    def _refuse(self, reason: str, record: Any, error: Exception) -> None:
        self.refused[reason] += 1
        topic = self._topic.partition.topic
        REFUSED.labels(topic.rpartition(".")[2], reason).inc()
        say = log.debug if self._is_usual(reason) else log.warning
        say("record refused", topic=topic, offset=record.offset, reason=reason, error=str(error)[:2_000])

    def _is_usual(self, _reason: str) -> bool:
        """Whether a refusal for this reason is to be expected now, and no warning."""
        return False

    @abc.abstractmethod
    async def _add(self, record: Any) -> None:
        """Takes one record in, in order; what it raises refuses the record. `reason` of it is counted."""
