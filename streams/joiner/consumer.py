"""Faust's consumer, in batches: one message is one fetch, and only what the agent says is done is committed.

Faust as it comes hands over record by record, and commits what it counts as acknowledged. The classes here
replace just that, through Faust's own seams: a `Transport` names the `Consumer`, which makes the thread that
runs the Kafka client.

* A fetched batch crosses the conductor, the topic and the stream as one message (`Batch`). The next one is
  fetched when it is done or dropped: nothing is committed past a record that is still in hand.
* `wait_empty`, which Faust calls at a rebalance and at the end, gives the batch in hand a limited time. What
  is not done by then is dropped: the partitions' next owner reads it again.
* Kafka refuses the commit of a member that has lost its place in the group.
* The thread has an event loop of its own: heartbeats go on while the agent computes or waits for Redis, and
  the process ends when nothing is handled although there is something to read.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Mapping
from typing import Any, cast

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.errors import ConsumerStoppedError, IllegalStateError, KafkaError
from faust import Topic
from faust.tables.manager import TableManager
from faust.transport.consumer import ConsumerThread
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, ConsumerMessage
from mode import Service

from streams.connections import PROBE_TIMEOUT_S, kafka_client_options, retry
from streams.joiner.batch import REVOKED, Batch
from streams.joiner.metrics import LAG
from streams.joiner.records import EventTime
from streams.kafka.clients import start, stop
from streams.kafka.reader import STALL_S, Watchdog
from streams.kafka.topics import MAX_RECORD_BYTES, Topics
from streams.settings import Settings
from streams.worker import Worker

log = structlog.get_logger(__name__)

POLL_MS = 200
"""Longest wait of one fetch; after it event time has advanced, although nothing was sent."""
REVOKE_S = 5.0
"""How long a rebalance waits for the batch in hand."""
PROBE_S = 2.0
"""Seconds between two questions where the topics end: for `/readyz`, the lag, and the watchdog."""


class BatchThread(driver.AIOKafkaConsumerThread):
    """The thread with the Kafka client. What begins with an underscore runs in it."""

    transport: BatchTransport
    consumer: BatchConsumer

    def __post_init__(self) -> None:
        super().__post_init__()
        self.settings = self.transport.settings
        self.worker = self.transport.worker
        self.generation = 0
        """Counts revocations: what was fetched before the last one carries less."""
        self._topics = Topics.of(self.settings)
        self._event_time = EventTime((self._topics.interactions, self._topics.replies))
        self._unreachable = False
        # Over all partitions: with a backlog, one may wait long for its turn.
        self.watchdog: Watchdog[bool] = Watchdog(STALL_S)

    async def on_start(self) -> None:
        """Joins the group, waiting for a broker that is unavailable as long as it takes."""
        result = await self.wait(retry(self._connect, self.settings, self._unavailable))
        self._consumer, self.time_started = result.result, time.monotonic()

    async def _connect(self) -> AIOKafkaConsumer:
        session_ms = int(1000 * self.settings.session_timeout_s)
        consumer = AIOKafkaConsumer(
            **kafka_client_options(self.settings),
            group_id=self.app.conf.id,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            # Range over two topics of equal partition counts: partition i of both goes to one member.
            partition_assignment_strategy=[RangePartitionAssignor],
            session_timeout_ms=session_ms,
            heartbeat_interval_ms=max(200, session_ms // 4),
            rebalance_timeout_ms=int(1000 * 2 * REVOKE_S),
            # Waiting for Redis is no reason to leave the group; a process that hangs is ended by `_watch`.
            max_poll_interval_ms=24 * 3_600_000,
            max_partition_fetch_bytes=MAX_RECORD_BYTES,
            fetch_max_wait_ms=POLL_MS,
        )
        return await start(consumer)

    async def on_thread_stop(self) -> None:
        # Not the driver's, which stops the client without a limit.
        await ConsumerThread.on_thread_stop(self)
        if self._consumer is not None:
            await stop(self._consumer)

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        # Before anything is awaited, and so before anything of the next assignment can be fetched.
        self.generation += 1
        self._event_time = EventTime((self._topics.interactions, self._topics.replies))
        await super().on_partitions_revoked(revoked)

    async def fetch(self) -> Batch:
        """The next records, or none after `POLL_MS`."""
        batch: Batch = await self.call_thread(retry, self._fetch, self.settings, self._unavailable)
        return batch

    async def _fetch(self) -> Batch:
        consumer = self._ensure_consumer()
        fetched = await consumer.getmany(timeout_ms=POLL_MS, max_records=self.settings.join_batch)
        # `getmany` waits through a rebalance and comes back with records of the next assignment. Nothing is
        # awaited from here on, so that all of the batch is of one.
        for tp, records in fetched.items():
            if records:
                self._event_time.saw(tp, records[-1].timestamp)
        now = {}
        for partition in {tp.partition for tp in consumer.assignment()}:
            with contextlib.suppress(IllegalStateError, AssertionError, KeyError):
                now[partition] = self._event_time.of(partition, self._position)
        order = sorted(fetched, key=lambda tp: tp.topic != self._topics.interactions)
        return Batch(self.consumer, self.generation, [r for tp in order for r in fetched[tp]], now)

    def _position(self, tp: TopicPartition) -> tuple[bool, float | None]:
        """Whether all of it was read, and when the broker last said so."""
        consumer = self._ensure_consumer()
        end, asked_ms = consumer.highwater(tp), consumer.last_poll_timestamp(tp)
        # `consumer.position` would wait for one where there is none yet.
        state = consumer._subscription.subscription.assignment.state_value(tp)
        if end is None or asked_ms is None or not state.has_valid_position:
            return False, None
        return state.position >= end, asked_ms / 1000

    async def _commit(self, offsets: Mapping[TP, int]) -> bool:
        # Faust's own ends the app when it fails; here the agent decides.
        await self._ensure_consumer().commit(offsets)
        return True

    def _unavailable(self, server: str, why: str) -> None:
        self._unreachable = True
        self.worker.not_ready(server, why)

    @Service.task
    async def _watch(self) -> None:
        """Asks where the topics end; ends the process when reading has stalled, or the main thread hangs."""
        while not self.should_stop:
            await self.sleep(PROBE_S)
            if self._consumer is None:
                continue
            assigned = list(self._consumer.assignment())
            try:
                async with asyncio.timeout(PROBE_TIMEOUT_S):
                    ends = await self._consumer.end_offsets(assigned) if assigned else {}
                    done = {tp: await self._consumer.committed(tp) or 0 for tp in assigned}
            except ConsumerStoppedError:
                return
            except (KafkaError, OSError) as error:
                why = f"Kafka at {self.settings.kafka_address} does not answer ({type(error).__name__})"
                self._unavailable("kafka", why)
                self.watchdog.reset()
                continue
            for tp, end in ends.items():
                LAG.labels(tp.topic, str(tp.partition)).set(max(0, end - done[tp]))
            is_reading, position = self.consumer.is_reading, sum(done.values())
            if self._unreachable and is_reading:
                self._unreachable = False
                self.worker.ready("kafka")
            # Where the group goes on rebalancing, there may be anything to read.
            end = sum(ends.values()) if is_reading else position + 1
            if self.watchdog.stalled({is_reading: position}, {is_reading: end}):
                what = f"{end - position} events wait" if is_reading else "the group goes on rebalancing"
                self._end_process(f"{what}, and nothing was handled for {STALL_S:g} s")
                return

    def _end_process(self, why: str) -> None:
        self.parent_loop.call_soon_threadsafe(self.worker.fail, why)
        # The main thread may be what hangs.
        end = threading.Timer(self.settings.shutdown_timeout_s, os._exit, [1])
        end.daemon = True
        end.start()


class BatchConsumer(driver.Consumer):
    """Hands batches to the conductor, and commits what it is told. Runs on the app's event loop."""

    transport: BatchTransport
    _thread: BatchThread

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = self.transport.settings
        self.worker = self.transport.worker
        self.event_time: Mapping[int, float] = {}
        """For each partition: all that was sent before this (Unix seconds) is done."""
        self._lost = -1
        """The last generation of which a commit was refused: a rebalance follows."""
        self._limit: asyncio.Timeout | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    def _new_consumer_thread(self) -> BatchThread:
        return BatchThread(self, loop=self.loop, beacon=self.beacon)

    @property
    def is_reading(self) -> bool:
        """Whether the group is settled and its partitions are read."""
        return self.can_resume_flow.is_set()

    # -- from Kafka to the agent ---------------------------------------------------------------------------

    async def _drain_messages(self, fetcher: Any) -> None:
        try:
            while not (self.should_stop or fetcher.should_stop):
                await self.wait(self.can_resume_flow.wait())
                batch = await self._thread.fetch()
                while batch.records and self.owns(batch) and not batch.done.is_set():
                    await self.wait(self.can_resume_flow.wait())
                    await self.wait_first(self._hand_over(batch), self.suspend_flow.wait())
                if self.owns(batch):
                    self.event_time = batch.event_time
        except (asyncio.CancelledError, ConsumerStoppedError):
            if not self.app.should_stop:
                raise

    async def _hand_over(self, batch: Batch) -> None:
        first = batch.records[0]
        message = ConsumerMessage(
            topic=first.topic,
            partition=first.partition,
            offset=first.offset,
            timestamp=first.timestamp / 1000,
            timestamp_type=first.timestamp_type,
            headers=None,
            key=None,
            value=cast(bytes, batch),  # the topic's raw serializer hands on whatever it is given
            checksum=None,
            tp=TP(first.topic, first.partition),
            generation_id=self.app.consumer_generation_id,
        )
        await self.callback(message)
        await batch.done.wait()

    # -- the batch in hand ---------------------------------------------------------------------------------

    def owns(self, batch: Batch) -> bool:
        is_current = self._lost < batch.generation == self._thread.generation
        return is_current and not (self.should_stop or self.app.should_stop)

    def attempt_begins(self, limit: asyncio.Timeout) -> None:
        self._limit = limit
        self._idle.clear()

    def attempt_ended(self, batch: Batch, error: Exception | None) -> None:
        self._limit = None
        self._idle.set()
        if error is None:
            self.worker.ready("redis")
        elif isinstance(error, REVOKED):
            self._lost = batch.generation

    def unavailable(self, server: str, why: str) -> None:
        self.worker.not_ready(server, why)
        self._thread.thread_loop.call_soon_threadsafe(self._thread.watchdog.reset)

    async def commit_done(self, offsets: Mapping[TopicPartition, int]) -> None:
        await self._commit(cast(Mapping[TP, int], offsets))

    async def wait_empty(self) -> None:
        """Waits for the batch in hand, within limits."""
        if self._limit is not None:
            allowed = 0.6 * self.settings.shutdown_timeout_s if self.app.should_stop else REVOKE_S
            self._limit.reschedule(self.loop.time() + allowed)
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
            log.info("partitions revoked", partitions=_shown(revoked))
        await super().on_partitions_revoked(revoked)
        for topic, partition in revoked:
            with contextlib.suppress(KeyError):
                LAG.remove(topic, str(partition))

    async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
        await super().on_partitions_assigned(assigned, generation_id)
        log.info("partitions assigned", partitions=_shown(assigned))

    async def perform_seek(self) -> None:
        """Does nothing: the Kafka client begins every assignment at the committed offsets by itself."""

    def close(self) -> None:
        """Does nothing: the thread closes its client. Faust would, from another thread, if a rebalance meets
        the end."""

    def verify_event_path(self, now: float, tp: TP) -> None:
        """Does nothing: the watchdog is `_watch`. Faust's compares two kinds of clock."""


class BatchTransport(driver.Transport):
    """Faust's transport for Kafka, with batches."""

    Consumer = BatchConsumer

    def __init__(self, app: Any, settings: Settings, worker: Worker) -> None:
        super().__init__(app.conf.broker_consumer, app)
        self.settings = settings
        self.worker = worker


class JoinedTopic(Topic):
    """Faust's topic; of two names, it shows both where `faust agents` asks for its name."""

    def get_topic_name(self) -> str:
        return ", ".join(self.topics)


class NoTables(TableManager):
    """Faust's table manager, which also resumes reading after a rebalance; without its second's sleep."""

    async def on_start(self) -> None:
        await self._update_channels()
        await self.recovery.start()


def _shown(partitions: Any) -> list[str]:
    return sorted(f"{topic}-{partition}" for topic, partition in partitions)
