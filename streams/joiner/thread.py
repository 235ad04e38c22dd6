"""The thread with the joiner's Kafka client, and its own event loop: heartbeats continue while the agent
computes or waits for Redis.

* `begin`: reading begins at the smaller of the offsets in Kafka and in Redis, and begins there again when
  Redis has lost effects (`streams.joiner.offsets`).
* `fetch`: the next batch.
* A watchdog ends the process if no event is processed although there are more.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.errors import (
    ConsumerStoppedError,
    IllegalStateError,
    KafkaError,
    UnknownTopicOrPartitionError,
)
from faust.transport.consumer import ConsumerThread
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from mode import Service

from cortex_core.errors import ConfigError
from streams.connections import PROBE_TIMEOUT_S, explain, kafka_client_options, retry
from streams.failures import error_text
from streams.joiner.batch import Batch
from streams.joiner.metrics import EXPIRED, LAG
from streams.joiner.records import EventTime
from streams.kafka.clients import start, stop
from streams.kafka.reader import PROBE_S, STALL_S, Watchdog
from streams.kafka.topics import MAX_RECORD_BYTES, Topics

if TYPE_CHECKING:
    from streams.joiner.consumer import BatchConsumer, BatchTransport

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
        """Number of revocations and assignments so far; earlier batches have a lower one."""
        self._topics = Topics.of(self.settings)
        self._published: dict[TP, int] = {}
        """See `Batch.published`."""
        self._restoring: set[int] = set()
        """The partitions with events to be joined again."""
        self._begins: dict[TP, int] = {}
        """The first offset of each partition, for what expires while it waits to be read."""
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

    async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
        self.generation += 1
        await super().on_partitions_assigned(assigned, generation_id)

    async def begin(self, joined: Mapping[TopicPartition, int]) -> None:
        """Continues each assigned partition at the smaller of its committed offset and that in `joined`."""
        await self.call_thread(retry, partial(self._begin, joined), self.settings, self._unavailable)

    async def _begin(self, joined: Mapping[TopicPartition, int]) -> None:
        generation = self.generation
        consumer = self._ensure_consumer()
        assigned = sorted(consumer.assignment())
        begins = await consumer.beginning_offsets(assigned) if assigned else {}
        ends = await consumer.end_offsets(assigned) if assigned else {}
        committed = {tp: await consumer.committed(tp) for tp in assigned}
        if self.generation != generation:
            return
        self._event_time = EventTime((self._topics.interactions, self._topics.replies))
        self._published = {tp: min(committed[tp] or 0, ends[tp]) for tp in assigned}
        for tp in assigned:
            start = min(committed[tp] or 0, joined.get(tp, 0))
            known = [offset for offset in (committed[tp], joined.get(tp)) if offset is not None]
            if expired := begins[tp] - min(known, default=begins[tp]):
                self._expired(tp, expired)
            start = max(start, begins[tp])
            if start < self._published[tp]:
                again = self._published[tp] - start
                log.warning("Redis has lost effects; joining again", partition=shown([tp]), events=again)
            consumer.seek(tp, start)
            consumer.resume(tp)
        self._restoring = {tp.partition for tp in assigned}
        self._end_restoring()
        self._begins = begins

    def _expired(self, tp: TopicPartition, events: int) -> None:
        if events > 0:
            EXPIRED.labels(tp.topic).inc(events)
            log.error(
                "events expired before they were joined",
                partition=shown([tp]),
                events=events,
            )

    async def fetch(self, rewinds: int) -> Batch:
        """The next records; empty if none came within `POLL_MS`."""
        batch: Batch = await self.call_thread(
            retry, partial(self._fetch, rewinds), self.settings, self._unavailable
        )
        return batch

    async def _fetch(self, rewinds: int) -> Batch:
        consumer = self._ensure_consumer()
        fetched = await consumer.getmany(timeout_ms=POLL_MS, max_records=self.settings.join_batch)
        # `getmany` waits during a rebalance and then returns records of the next assignment. The code below
        # does not await, so that the whole batch belongs to one assignment.
        records: list[Any] = []
        for tp in sorted(fetched, key=lambda tp: tp.topic != self._topics.interactions):
            kept = self._restored(tp, fetched[tp]) if tp.partition in self._restoring else fetched[tp]
            if kept:
                self._event_time.advance(tp, kept[-1].timestamp)
                records += kept
        self._end_restoring()
        now = {}
        # In the others no time passes, for it did before.
        for partition in {tp.partition for tp in consumer.assignment()} - self._restoring:
            with contextlib.suppress(IllegalStateError, AssertionError, KeyError):
                now[partition] = self._event_time.of(partition, self._position)
        return Batch(self.consumer, (self.generation, rewinds), records, now, self._published)

    def _restored(self, tp: TopicPartition, records: list[Any]) -> list[Any]:
        """The records that are joined again; the next ones have to wait for those of the other topic: what
        follows from both together is not published yet."""
        published = self._published[tp]
        kept = [record for record in records if record.offset < published]
        if len(kept) < len(records):
            self._ensure_consumer().seek(tp, published)
        return kept

    def _end_restoring(self) -> None:
        consumer = self._ensure_consumer()
        for partition in [*self._restoring]:
            both = [tp for tp in self._published if tp.partition == partition]
            done = [tp for tp in both if (self._next_offset(tp) or 0) >= self._published[tp]]
            if done == both:
                self._restoring.remove(partition)
                consumer.resume(*both)
            else:
                consumer.pause(*done)

    def _position(self, tp: TopicPartition) -> tuple[bool, float | None]:
        """Whether the partition was read to its end, and when the broker last reported that end."""
        consumer = self._ensure_consumer()
        end, polled_ms, position = (
            consumer.highwater(tp),
            consumer.last_poll_timestamp(tp),
            self._next_offset(tp),
        )
        if end is None or polled_ms is None or position is None:
            return False, None
        return position >= end, polled_ms / 1000

    def _next_offset(self, tp: TopicPartition) -> int | None:
        """`consumer.position`, without waiting until there is one."""
        state = self._ensure_consumer()._subscription.subscription.assignment.state_value(tp)
        return state.position if state is not None and state.has_valid_position else None

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
            assigned, generation = list(self._consumer.assignment()), self.generation
            try:
                async with asyncio.timeout(PROBE_TIMEOUT_S):
                    if not assigned:  # Kafka may refuse this process the group
                        await self._consumer.committed(TopicPartition(self._topics.interactions, 0))
                    begins = await self._consumer.beginning_offsets(assigned) if assigned else {}
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
            if self.generation != generation:
                continue  # the metrics of these partitions are another joiner's now
            for tp, end in ends.items():
                position = self._next_offset(tp)
                joined = done[tp] if position is None else min(done[tp], position)
                LAG.labels(tp.topic, str(tp.partition)).set(max(0, end - joined))
                self._expired(tp, begins[tp] - max(done[tp], self._begins.get(tp, 0)))
            self._begins |= begins
            is_reading, progress = self.consumer.is_reading, sum(done.values()) + self.consumer.restored
            if self._unreachable and is_reading:
                self._unreachable = False
                self.worker.ready("kafka")
            # During a rebalance there may be unread events: assume one.
            end = sum(ends.values()) + self.consumer.restored if is_reading else progress + 1
            if self.watchdog.stalled({is_reading: progress}, {is_reading: end}):
                state = f"lag of {end - progress} events" if is_reading else "the group is still rebalancing"
                self._end_process(f"no event was processed for {STALL_S:g} s: {state}")
                return

    def _end_process(self, reason: str) -> None:
        self.parent_loop.call_soon_threadsafe(self.worker.fail, reason)
        # In case the main thread hangs.
        end = threading.Timer(self.settings.shutdown_timeout_s, os._exit, [1])
        end.daemon = True
        end.start()


def shown(partitions: Any) -> list[str]:
    """Topic-partitions as logs show them."""
    return sorted(f"{topic}-{partition}" for topic, partition in partitions)
