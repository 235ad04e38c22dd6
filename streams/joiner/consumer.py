"""A Faust consumer for batches: one Faust message is one fetch, and only the agent commits offsets.

Faust's own consumer delivers single records and commits those that it counts as acknowledged. The classes
here replace that through Faust's extension points: a `Transport` names the `Consumer`, which creates the
thread that runs the Kafka client (`streams.joiner.thread`).

* A fetched batch passes the conductor, the topic and the stream as one message (`Batch`). The next one is
  fetched when it is committed or dropped: no commit includes a record in progress.
* `wait_empty`, which Faust calls at a rebalance and at shutdown, gives the batch in progress a limited time,
  after which it is dropped: the next owner of the partitions reads it again.
* Kafka refuses the commit of a member that was removed from the group.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any, cast

import structlog
from aiokafka.errors import ConsumerStoppedError
from faust import Topic
from faust.tables.manager import TableManager
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, ConsumerMessage

from cortex_core.errors import ConfigError
from streams.connections import retry
from streams.joiner.batch import REVOKED, Batch, Generation, Part
from streams.joiner.metrics import LAG, RESTORED
from streams.joiner.offsets import Offsets
from streams.joiner.thread import REVOKE_S, BatchThread, shown
from streams.settings import Settings
from streams.trail import WritesLost
from streams.worker import Worker

log = structlog.get_logger(__name__)


class BatchConsumer(driver.Consumer):
    """Delivers batches to the conductor and commits the agent's offsets. Runs on the app's event loop."""

    transport: BatchTransport
    _thread: BatchThread

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = self.transport.settings
        self.worker = self.transport.worker
        self.event_time: Mapping[int, float] = {}
        """Of each partition, Unix seconds: the effects of all events sent before are done."""
        self.restored = 0
        """Number of events that were joined again."""
        self._rewinds = 0
        self._begun: Generation | None = None
        """The generation whose reading has begun at the right offsets."""
        self._refused_revocations = -1
        """The number of revocations at the last refused commit: another follows."""
        self._limit: asyncio.Timeout | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    def _new_consumer_thread(self) -> BatchThread:
        return BatchThread(self, loop=self.loop, beacon=self.beacon)

    @property
    def is_reading(self) -> bool:
        """Whether the assigned partitions are read; False during a rebalance."""
        return self.can_resume_flow.is_set()

    # -- from Kafka to the agent ---------------------------------------------------------------------------

    async def _drain_messages(self, fetcher: Any) -> None:
        try:
            while not (self.should_stop or fetcher.should_stop):
                await self.wait(self.can_resume_flow.wait())
                if self._begun != self._generation:
                    await self.wait(self._begin())
                    continue
                batch = await self._thread.fetch(self._rewinds)
                while batch.records and self.owns(batch) and not batch.done.is_set():
                    await self.wait(self.can_resume_flow.wait())
                    await self.wait_first(self._deliver(batch), self.suspend_flow.wait())
                if self.owns(batch):
                    self.event_time = batch.event_time
        except ConfigError as error:
            self.worker.refuse(error)
        except (asyncio.CancelledError, ConsumerStoppedError):
            if not self.app.should_stop:
                raise

    @property
    def _generation(self) -> Generation:
        return self._thread.generation, self._rewinds

    async def _begin(self) -> None:
        generation = self._generation
        await self._thread.begin(await retry(self.transport.offsets.load, self.settings, self.unavailable))
        self.worker.ready("redis")
        self._begun = generation

    def rewind(self, error: WritesLost) -> None:
        """Drops the batch in progress, and reads again what Redis has lost."""
        log.warning("reading again", why=str(error))
        self._rewinds += 1
        self.event_time = {}
        self.transport.clear_cache()

    async def _deliver(self, batch: Batch) -> None:
        first = batch.records[0]
        message = ConsumerMessage(
            topic=first.topic,
            partition=first.partition,
            offset=first.offset,
            timestamp=first.timestamp / 1000,
            timestamp_type=first.timestamp_type,
            headers=None,
            key=None,
            value=cast(bytes, batch),  # the topic's raw serializer passes any object on
            checksum=None,
            tp=TP(first.topic, first.partition),
            generation_id=self.app.consumer_generation_id,
        )
        await self.callback(message)
        await batch.done.wait()

    # -- the batch in progress -----------------------------------------------------------------------------

    def owns(self, batch: Batch) -> bool:
        is_current = batch.generation == self._generation == self._begun
        is_current = is_current and batch.generation[0] > self._refused_revocations
        return is_current and not (self.should_stop or self.app.should_stop)

    def attempt_begins(self, limit: asyncio.Timeout) -> None:
        self._limit = limit
        self._idle.clear()

    def attempt_ended(self, batch: Batch, error: Exception | None) -> None:
        self._limit = None
        self._idle.set()
        if error is None:
            self.worker.ready("redis")
            if self.is_reading and cast(Any, self.app).publisher.unavailable is None:
                self.worker.ready("kafka")
        elif isinstance(error, REVOKED):
            self._refused_revocations = batch.generation[0]
        elif isinstance(error, WritesLost) and self.owns(batch):
            self.rewind(error)

    def unavailable(self, server: str, reason: str) -> None:
        self.worker.not_ready(server, reason)
        self._thread.thread_loop.call_soon_threadsafe(self._thread.watchdog.reset)

    async def commit_done(self, part: Part) -> None:
        await self.transport.offsets.advance(part.offsets)
        # Never back: what follows from the events before Kafka's offset is published.
        new = {tp: offset for tp, offset in part.offsets.items() if offset >= part.batch.published.get(tp, 0)}
        if new:
            await self._commit(cast(Mapping[TP, int], new))
        restored = sum(map(part.batch.is_published, part.records))
        self.restored += restored
        RESTORED.inc(restored)

    async def wait_empty(self) -> None:
        """Waits for the batch in progress, for a limited time."""
        if self._limit is not None:
            allowed = 0.6 * self.settings.shutdown_timeout_s if self.app.should_stop else REVOKE_S
            self._limit.reschedule(self.loop.time() + allowed)
        await self._idle.wait()

    async def idle(self) -> None:
        """Waits until no attempt at a batch is in progress."""
        await self._idle.wait()

    # -- rebalances ----------------------------------------------------------------------------------------

    def stop_flow(self) -> None:
        super().stop_flow()
        self.event_time = {}
        self.worker.not_ready("kafka", "the group is rebalancing")

    def resume_flow(self) -> None:
        super().resume_flow()
        self.worker.ready("kafka")

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        if revoked:
            log.info("partitions revoked", partitions=shown(revoked))
        await super().on_partitions_revoked(revoked)
        for topic, partition in revoked:
            with contextlib.suppress(KeyError):
                LAG.remove(topic, str(partition))

    async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
        await super().on_partitions_assigned(assigned, generation_id)
        log.info("partitions assigned", partitions=shown(assigned))

    async def perform_seek(self) -> None:
        """Does nothing: the Kafka client itself starts each assignment at the committed offsets."""

    def close(self) -> None:
        """Does nothing: the thread closes its client. Faust's method would close it from another thread if a
        rebalance coincides with the shutdown."""

    def verify_event_path(self, now: float, tp: TP) -> None:
        """Does nothing: `_watch` is the watchdog. Faust's compares times of two different clocks."""


class BatchTransport(driver.Transport):
    """Faust's transport for Kafka, with `BatchConsumer`."""

    Consumer = BatchConsumer

    def __init__(
        self,
        app: Any,
        settings: Settings,
        worker: Worker,
        offsets: Offsets,
        clear_cache: Callable[[], None],
    ) -> None:
        super().__init__(app.conf.broker_consumer, app)
        self.settings = settings
        self.worker = worker
        self.offsets = offsets
        self.clear_cache = clear_cache


class JoinedTopic(Topic):
    """Faust's topic; `faust agents` shows all its names, not only the first."""

    def get_topic_name(self) -> str:
        return ", ".join(self.topics)


class NoTables(TableManager):
    """Faust's table manager, which also resumes reading after a rebalance, without its delay of a second."""

    async def on_start(self) -> None:
        await self._update_channels()
        await self.recovery.start()
