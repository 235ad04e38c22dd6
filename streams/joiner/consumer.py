"""A Faust consumer for batches: one Faust message is one fetch, and only the agent commits offsets.

Faust's own consumer delivers single records and commits those that it counts as acknowledged. The classes
here replace that through Faust's extension points: a `Transport` names the `Consumer`, which creates the
thread that runs the Kafka client.

* A fetched batch passes the conductor, the topic and the stream as one message (`Batch`). The next one is
  fetched when it is committed or dropped: no commit includes a record in progress.
* `wait_empty`, which Faust calls at a rebalance and at shutdown, gives the batch in progress a limited time,
  after which it is dropped: the next owner of the partitions reads it again.
* Kafka refuses the commit of a member that was removed from the group.
* The thread has its own event loop: heartbeats continue while the agent computes or waits for Redis, and the
  process ends if no event is processed although there are more.
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
from aiokafka.errors import (
    ConsumerStoppedError,
    IllegalStateError,
    KafkaError,
    UnknownTopicOrPartitionError,
)
from faust import Topic
from faust.tables.manager import TableManager
from faust.transport.consumer import ConsumerThread
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, ConsumerMessage
from mode import Service

from cortex_core.errors import ConfigError
from streams.connections import PROBE_TIMEOUT_S, explain, kafka_client_options, retry
from streams.failures import error_text
from streams.joiner.batch import REVOKED, Batch
from streams.joiner.metrics import LAG
from streams.joiner.records import EventTime
from streams.kafka.clients import start, stop
from streams.kafka.reader import PROBE_S, STALL_S, Watchdog
from streams.kafka.topics import MAX_RECORD_BYTES, Topics
from streams.settings import Settings
from streams.worker import Worker

log = structlog.get_logger(__name__)

POLL_MS = 200
"""The longest wait of a fetch. Event time advances at least so often, also without new events."""
REVOKE_S = 5.0
"""How long a rebalance waits for the batch in progress."""


class BatchThread(driver.AIOKafkaConsumerThread):
    """The thread with the Kafka client. Methods whose names begin with an underscore run in it."""

    transport: BatchTransport
    consumer: BatchConsumer

    def __post_init__(self) -> None:
        super().__post_init__()
        self.settings = self.transport.settings
        self.worker = self.transport.worker
        self.generation = 0
        """Number of revocations so far; batches fetched before the last one have a lower generation."""
        self._topics = Topics.of(self.settings)
        self._event_time = EventTime((self._topics.interactions, self._topics.replies))
        self._unreachable = False
        # Over all partitions together: under a backlog, a single one can wait long for its turn.
        self.watchdog: Watchdog[bool] = Watchdog(STALL_S)

    async def on_start(self) -> None:
        """Joins the group; waits without a limit for an unavailable broker."""
        result = await self.wait(retry(self._connect, self.settings, self._unavailable))
        self._consumer, self.time_started = result.result, time.monotonic()

    async def _connect(self) -> AIOKafkaConsumer:
        session_ms = int(1000 * self.settings.session_timeout_s)
        consumer = AIOKafkaConsumer(
            **kafka_client_options(self.settings),
            group_id=self.app.conf.id,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            # Both topics have equally many partitions: range assigns partition i of both to one member.
            partition_assignment_strategy=[RangePartitionAssignor],
            session_timeout_ms=session_ms,
            heartbeat_interval_ms=max(200, session_ms // 4),
            rebalance_timeout_ms=int(1000 * 2 * REVOKE_S),
            # Waiting for Redis must not remove the member from the group; `_watch` ends a hanging process.
            max_poll_interval_ms=24 * 3_600_000,
            max_partition_fetch_bytes=MAX_RECORD_BYTES,
            fetch_max_wait_ms=POLL_MS,
        )
        await start(consumer)
        # A broker may not know topics yet that were just created; joining then would assign no partitions.
        if missing := {*self._event_time.topics} - await consumer.topics():
            await stop(consumer)
            raise UnknownTopicOrPartitionError(f"no topic {', '.join(sorted(missing))}")
        return consumer

    async def on_thread_stop(self) -> None:
        # Skips the driver's method, which stops the client without a timeout.
        await ConsumerThread.on_thread_stop(self)
        if self._consumer is not None:
            await stop(self._consumer)

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        # Before the first await, and so before a record of the next assignment can be fetched.
        self.generation += 1
        self._event_time = EventTime((self._topics.interactions, self._topics.replies))
        await super().on_partitions_revoked(revoked)

    async def fetch(self) -> Batch:
        """The next records; empty if none came within `POLL_MS`."""
        batch: Batch = await self.call_thread(retry, self._fetch, self.settings, self._unavailable)
        return batch

    async def _fetch(self) -> Batch:
        consumer = self._ensure_consumer()
        fetched = await consumer.getmany(timeout_ms=POLL_MS, max_records=self.settings.join_batch)
        # `getmany` waits during a rebalance and then returns records of the next assignment. The code below
        # does not await, so that the whole batch belongs to one assignment.
        for tp, records in fetched.items():
            if records:
                self._event_time.advance(tp, records[-1].timestamp)
        now = {}
        for partition in {tp.partition for tp in consumer.assignment()}:
            with contextlib.suppress(IllegalStateError, AssertionError, KeyError):
                now[partition] = self._event_time.of(partition, self._position)
        order = sorted(fetched, key=lambda tp: tp.topic != self._topics.interactions)
        return Batch(self.consumer, self.generation, [r for tp in order for r in fetched[tp]], now)

    def _position(self, tp: TopicPartition) -> tuple[bool, float | None]:
        """Whether the partition was read to its end, and when the broker last reported that end."""
        consumer = self._ensure_consumer()
        end, polled_ms = consumer.highwater(tp), consumer.last_poll_timestamp(tp)
        # `consumer.position` would wait until there is a position.
        state = consumer._subscription.subscription.assignment.state_value(tp)
        if end is None or polled_ms is None or not state.has_valid_position:
            return False, None
        return state.position >= end, polled_ms / 1000

    async def _commit(self, offsets: Mapping[TP, int]) -> bool:
        # Faust's method ends the app if the commit fails; here the agent handles the error.
        await self._ensure_consumer().commit(offsets)
        return True

    def _unavailable(self, server: str, reason: str) -> None:
        self._unreachable = True
        self.worker.not_ready(server, reason)

    @Service.task
    async def _watch(self) -> None:
        """Queries the topics' ends; ends the process if reading has stalled, the main thread hangs, or Kafka
        refuses the configuration."""
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
                meaning = await explain(error, self.settings)
                if isinstance(meaning, ConfigError):
                    self.parent_loop.call_soon_threadsafe(self.worker.refuse, meaning)
                    return
                self._unavailable("kafka", str(meaning or error_text(error)))
                self.watchdog.reset()
                continue
            known = self._consumer._client.cluster
            if missing := [t for t in self._event_time.topics if not known.partitions_for_topic(t)]:
                self._unavailable("kafka", f"no topic {', '.join(missing)}: `cortex topics create`")
                self.watchdog.reset()
                continue
            for tp, end in ends.items():
                LAG.labels(tp.topic, str(tp.partition)).set(max(0, end - done[tp]))
            is_reading, position = self.consumer.is_reading, sum(done.values())
            if self._unreachable and is_reading:
                self._unreachable = False
                self.worker.ready("kafka")
            # During a rebalance there may be unread events: assume one.
            end = sum(ends.values()) if is_reading else position + 1
            if self.watchdog.stalled({is_reading: position}, {is_reading: end}):
                state = f"lag of {end - position} events" if is_reading else "the group is still rebalancing"
                self._end_process(f"no event was processed for {STALL_S:g} s: {state}")
                return

    def _end_process(self, reason: str) -> None:
        self.parent_loop.call_soon_threadsafe(self.worker.fail, reason)
        # In case the main thread hangs.
        end = threading.Timer(self.settings.shutdown_timeout_s, os._exit, [1])
        end.daemon = True
        end.start()


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
        self._refused_generation = -1
        """The last generation whose commit was refused: a rebalance follows."""
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
                batch = await self._thread.fetch()
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
        is_current = self._refused_generation < batch.generation == self._thread.generation
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
            self._refused_generation = batch.generation

    def unavailable(self, server: str, reason: str) -> None:
        self.worker.not_ready(server, reason)
        self._thread.thread_loop.call_soon_threadsafe(self._thread.watchdog.reset)

    async def commit_done(self, offsets: Mapping[TopicPartition, int]) -> None:
        await self._commit(cast(Mapping[TP, int], offsets))

    async def wait_empty(self) -> None:
        """Waits for the batch in progress, for a limited time."""
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
        """Does nothing: the Kafka client itself starts each assignment at the committed offsets."""

    def close(self) -> None:
        """Does nothing: the thread closes its client. Faust's method would close it from another thread if a
        rebalance coincides with the shutdown."""

    def verify_event_path(self, now: float, tp: TP) -> None:
        """Does nothing: `_watch` is the watchdog. Faust's compares times of two different clocks."""


class BatchTransport(driver.Transport):
    """Faust's transport for Kafka, with `BatchConsumer`."""

    Consumer = BatchConsumer

    def __init__(self, app: Any, settings: Settings, worker: Worker) -> None:
        super().__init__(app.conf.broker_consumer, app)
        self.settings = settings
        self.worker = worker


class JoinedTopic(Topic):
    """Faust's topic; `faust agents` shows all its names, not only the first."""

    def get_topic_name(self) -> str:
        return ", ".join(self.topics)


class NoTables(TableManager):
    """Faust's table manager, which also resumes reading after a rebalance, without its delay of a second."""

    async def on_start(self) -> None:
        await self._update_channels()
        await self.recovery.start()


def _shown(partitions: Any) -> list[str]:
    return sorted(f"{topic}-{partition}" for topic, partition in partitions)
