"""What a joiner does, batch by batch: reads both topics, joins, writes, commits. Knows nothing of Faust.

    joining = Joining(settings, worker)
    await joining.start()                        # waits for Kafka and Redis
    batch = await joining.next_batch()           # one task fetches …
    await joining.handle(batch)                  # … another makes the effects and commits, in order
    await joining.stop()

A joiner owns partition i of both topics alike. Offsets are committed only for batches whose effects are all
done, so a crash repeats a batch and loses none. While Redis or Kafka are away `handle` waits and tries
again; nothing is skipped. What cannot be read goes to dead letters, whole, and the joiner goes on.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.errors import CommitFailedError, IllegalStateError, KafkaError
from redis import RedisError

from cortex_core.errors import InputError
from streams.connections import (
    REACHABILITY_ERRORS,
    async_redis_client,
    backoff,
    kafka_client_options,
    until_reachable,
)
from streams.events import DeadLetter
from streams.joiner.effects import Engine, Task
from streams.joiner.metrics import BATCH_S, DEAD_LETTERS, EVENTS, LAG, OUTCOMES, RETRIES
from streams.joiner.records import EventTime, make_join, read_record
from streams.joiner.states import RedisStates
from streams.kafka.clients import start, stop
from streams.kafka.dead_letters import dead_letter
from streams.kafka.publisher import Publisher
from streams.kafka.topics import MAX_RECORD_BYTES, Topics
from streams.replay_store import ReplayWriter
from streams.settings import Settings
from streams.worker import Worker

log = structlog.get_logger(__name__)
T = TypeVar("T")

AWAY: tuple[type[Exception], ...] = (*REACHABILITY_ERRORS, RedisError, TimeoutError)
POLL_MS = 200
"""Longest wait for events before the timer gets its turn."""
REVOKE_S = 5.0
"""How long a rebalance waits for the batch in flight; after that the batch is dropped, and read again."""
PROBE_S = 2.0
"""Seconds between two questions where the topics end: for `/readyz`, the lag, and the watchdog."""
STALL_S = 30.0
"""Seconds without handling anything, with events to read, after which the process ends to start afresh."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Records of one fetch, and how far event time has come with them."""

    generation: int
    """Of the assignment that it was read under; after a rebalance it is dropped and read again."""
    records: Mapping[TopicPartition, Sequence[Any]]
    now: Mapping[int, float]
    """For each partition: everything that occurred before this (Unix seconds) is in this batch or earlier."""


class Joining(ConsumerRebalanceListener):  # type: ignore[misc]
    """One member of the joiners' group. All methods run on one event loop."""

    def __init__(self, settings: Settings, worker: Worker) -> None:
        self.settings = settings
        self.worker = worker
        self.topics = Topics.of(settings)
        self.join = make_join(settings)
        self._redis = async_redis_client(settings)
        self._states = RedisStates(self._redis, settings.topic_prefix, settings.join_window_s)
        writer = ReplayWriter(self._redis, prefix=settings.topic_prefix, capacity=settings.replay_capacity)
        self.engine = Engine(self.join, self._states, writer, self._publish)
        self._publisher = Publisher(settings, partial(self._need, "kafka"))
        self._consumer: AIOKafkaConsumer | None = None
        self._generation = 0
        self._abandoned = -1
        """Batches of this generation and earlier ones are dropped, also while they are being handled."""
        self._assigned = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._time = EventTime((self.topics.interactions, self.topics.replies))
        self._handled_at = time.monotonic()
        self._waiting_for: str | None = None

    async def start(self) -> None:
        """Connects to both servers, waiting for them as long as it takes, and joins the group.

        Raises:
            ConfigError: topics exist that do not fit.
        """
        need = partial(self.worker.not_ready, "redis")
        await until_reachable("Redis", self.settings.redis_shown, self._ping, on_failure=need)
        self.worker.ready("redis")
        await self._publisher.start()
        self.worker.not_ready("kafka", "joining the group")
        self._consumer = await until_reachable(
            "Kafka",
            self.settings.kafka_address,
            self._connect,
            on_failure=partial(self.worker.not_ready, "kafka"),
        )

    async def _ping(self) -> None:
        await self._redis.ping()

    async def _connect(self) -> AIOKafkaConsumer:
        session_ms = int(1000 * self.settings.session_timeout_s)
        consumer = AIOKafkaConsumer(
            **kafka_client_options(self.settings),
            group_id=self.settings.joiner_group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            # Range over two topics of equal partition counts: partition i of both goes to one member.
            partition_assignment_strategy=[RangePartitionAssignor],
            session_timeout_ms=session_ms,
            heartbeat_interval_ms=max(200, session_ms // 4),
            rebalance_timeout_ms=int(1000 * 2 * REVOKE_S),
            # Waiting for Redis is no reason to leave the group; a hung process is ended by its watchdog.
            max_poll_interval_ms=24 * 3_600_000,
            max_partition_fetch_bytes=MAX_RECORD_BYTES,
            fetch_max_wait_ms=POLL_MS,
        )
        consumer.subscribe([self.topics.interactions, self.topics.replies], listener=self)
        return await start(consumer)

    # -- rebalance -----------------------------------------------------------------------------------------

    async def on_partitions_revoked(self, revoked: Any) -> None:
        """Waits for the batch in flight, within limits; what is queued is dropped and read again."""
        generation, self._generation = self._generation, self._generation + 1
        self._assigned.clear()
        if revoked:
            log.info("partitions revoked", partitions=_shown(revoked))
        self.worker.not_ready("kafka", "the group is rebalancing")
        try:
            async with asyncio.timeout(REVOKE_S):
                await self._idle.wait()
        except TimeoutError:
            log.warning("the batch in flight is dropped, and read again by whoever owns it next")
        self._abandoned = generation
        # Others may change what this one remembers. Here and not on assignment: by the time that is called,
        # records of the new assignment may have been fetched.
        self._states.forget_cache()
        self._time = EventTime((self.topics.interactions, self.topics.replies))
        for topic, partition in revoked:
            with contextlib.suppress(KeyError):
                LAG.remove(topic, str(partition))

    async def on_partitions_assigned(self, assigned: Any) -> None:
        """Ready again."""
        self._handled_at = time.monotonic()
        self._assigned.set()
        self.worker.ready("kafka")
        log.info("partitions assigned", partitions=_shown(assigned))

    # -- fetching ------------------------------------------------------------------------------------------

    async def next_batch(self) -> Batch:
        """The next records, or none after `POLL_MS`; either way a turn for the timer."""
        consumer = self._consumer
        assert consumer is not None, "start() first"
        while True:
            try:
                records = await consumer.getmany(timeout_ms=POLL_MS, max_records=self.settings.join_batch)
            except KafkaError as error:
                log.warning("fetching failed; trying again", error=f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.5)
                continue
            # Taken after and not before: `getmany` waits through a rebalance and comes back with records of
            # the next assignment. It hands over none while partitions are being revoked.
            generation = self._generation
            for tp, its_records in records.items():
                if its_records:
                    self._time.saw(tp, its_records[-1].timestamp)
            now = {}
            for partition in {tp.partition for tp in consumer.assignment()}:
                with contextlib.suppress(IllegalStateError, AssertionError, KeyError):
                    now[partition] = self._time.of(partition, self._where)
            return Batch(generation, records, now)

    def _where(self, tp: TopicPartition) -> tuple[bool, float | None]:
        assert self._consumer is not None
        end, asked_ms = self._consumer.highwater(tp), self._consumer.last_poll_timestamp(tp)
        state = self._consumer._subscription.subscription.assignment.state_value(tp)
        if end is None or asked_ms is None or not state.has_valid_position:
            return False, None
        return state.position >= end, asked_ms / 1000

    # -- handling ------------------------------------------------------------------------------------------

    async def handle(self, batch: Batch) -> None:
        """Makes a batch's effects, in their order, and commits its offsets; or drops it after a rebalance."""
        if batch.generation != self._generation:
            return
        self._idle.clear()
        try:
            with BATCH_S.time():
                await self._handle(batch)
        except _Abandoned:
            pass
        finally:
            self._idle.set()

    async def _handle(self, batch: Batch) -> None:
        tasks: list[tuple[Task, Any]] = []
        letters: list[DeadLetter] = []
        # Interactions first: replies then find theirs, and fewer of them wait.
        order = sorted(batch.records, key=lambda tp: tp.topic != self.topics.interactions)
        for n, record in enumerate(r for tp in order for r in batch.records[tp]):
            if n % 64 == 63:
                await asyncio.sleep(0)  # heartbeats and health go on
            try:
                read = read_record(self.join, self.topics, record)
            except InputError as error:
                letters.append(dead_letter(record, str(error)))
            except Exception as error:  # a reader that fails on one reply costs that reply alone
                letters.append(dead_letter(record, f"reading it failed: {type(error).__name__}: {error}"))
            else:
                tasks.append((Task(read.conversation_id, record.partition, read.step), record))
        if tasks:
            letters += await self._apply(batch, tasks)
        if letters:
            await self._insist(batch, partial(self._send, letters))
        for partition, now in batch.now.items():
            self._count(await self._insist(batch, partial(self._timer, partition, now)))
        offsets = {tp: its[-1].offset + 1 for tp, its in batch.records.items() if its}
        if offsets:
            await self._insist(batch, partial(self._commit, offsets))
            self._handled_at = time.monotonic()

    async def _apply(self, batch: Batch, tasks: list[tuple[Task, Any]]) -> list[DeadLetter]:
        """Joins; what fails for a reason of its own becomes a dead letter, and the others are joined."""
        try:
            self._count(await self._insist(batch, partial(self.engine.apply, [task for task, _ in tasks])))
        except _Abandoned:
            raise
        except Exception as error:
            if len(tasks) == 1:
                log.exception("an event cannot be joined", error=str(error))
                return [dead_letter(tasks[0][1], f"joining it failed: {type(error).__name__}: {error}")]
            log.warning("a batch cannot be joined as one; joining its events one by one", error=str(error))
            return [letter for one in tasks for letter in await self._apply(batch, [one])]
        return []

    async def _timer(self, partition: int, now: float) -> Counter[str]:
        try:
            return await self.engine.timer(partition, now)
        except AWAY:
            raise
        except Exception as error:
            # Events go on; what is due stays due and is tried again with the next batch.
            log.exception("the timer failed", partition=partition, error=str(error))
            return Counter({"timer_failures": 1})

    async def _publish(self, experiences: Sequence[tuple[str, bytes]]) -> None:
        topic = self.topics.experiences
        await self._acknowledged([(topic, model_id.encode(), value) for model_id, value in experiences])

    async def _send(self, letters: Sequence[DeadLetter]) -> None:
        await self._acknowledged(
            [
                (self.topics.dead_letters, base64.b64decode(letter.key or ""), letter.to_bytes())
                for letter in letters
            ]
        )
        for letter in letters:
            DEAD_LETTERS.labels(letter.topic).inc()
            log.warning("dead letter", id=letter.dead_letter_id, reason=letter.reason[:300])

    async def _acknowledged(self, messages: Sequence[tuple[str, bytes, bytes]]) -> None:
        deliveries = [self._publisher.begin(*message) for message in messages]
        for delivery in deliveries:
            await self._publisher.wait(delivery)

    async def _commit(self, offsets: dict[TopicPartition, int]) -> None:
        assert self._consumer is not None
        try:
            await self._consumer.commit(offsets)
        except (CommitFailedError, IllegalStateError) as error:
            # The partitions are another's by now, who reads the batch again; repeating it changes nothing.
            log.info("offsets not committed: the partitions were taken away", error=str(error))
            raise _Abandoned from error

    async def _insist(self, batch: Batch, work: Callable[[], Awaitable[T]]) -> T:
        """Does `work` until both servers have played their part."""
        async for attempt in backoff():
            if batch.generation <= self._abandoned:
                raise _Abandoned
            try:
                result = await work()
            except AWAY as error:
                RETRIES.inc()
                self._waiting_for = f"{type(error).__name__}: {error}"
                if isinstance(error, RedisError):
                    address = self.settings.redis_shown
                    self.worker.not_ready("redis", f"Redis at {address} does not answer ({error})")
                else:
                    address = self.settings.kafka_address
                log.warning("trying again", attempt=attempt, address=address, error=self._waiting_for)
            else:
                if self._waiting_for is not None:
                    self._waiting_for = None
                    self.worker.ready("redis")
                return result
        raise AssertionError("backoff never ends")

    def _count(self, counts: Mapping[str, int]) -> None:
        for name, n in counts.items():
            if name in ("interactions", "replies"):
                EVENTS.labels(name).inc(n)
            elif n:
                OUTCOMES.labels(name).inc(n)

    # -- health --------------------------------------------------------------------------------------------

    def _need(self, name: str, why: str | None) -> None:
        if why is not None:
            self.worker.not_ready(name, why)
        elif self._assigned.is_set():
            self.worker.ready(name)

    async def watch(self) -> None:
        """Asks where the topics end, for as long as it runs; ends the process when reading has stalled."""
        away = False
        while True:
            await asyncio.sleep(PROBE_S)
            if (consumer := self._consumer) is None:
                continue
            assigned = list(consumer.assignment())
            try:
                async with asyncio.timeout(5.0):
                    ends = await consumer.end_offsets(assigned) if assigned else {}
                    done = {tp: await consumer.committed(tp) or 0 for tp in assigned}
            except (KafkaError, OSError, TimeoutError, IllegalStateError) as error:
                away = True
                why = f"Kafka at {self.settings.kafka_address} does not answer ({type(error).__name__})"
                self.worker.not_ready("kafka", why)
                self._handled_at = time.monotonic()
                continue
            if away and self._assigned.is_set():
                away = False
                self.worker.ready("kafka")
            lag = 0
            for tp, end in ends.items():
                LAG.labels(tp.topic, str(tp.partition)).set(max(0, end - done[tp]))
                lag += max(0, end - done[tp])
            if (self._assigned.is_set() and not lag) or self._waiting_for is not None:
                self._handled_at = time.monotonic()
            elif time.monotonic() - self._handled_at > STALL_S:
                what = f"{lag} events wait" if self._assigned.is_set() else "the group goes on rebalancing"
                self.worker.fail(f"{what}, and nothing was handled for {STALL_S:g} s")

    async def stop(self) -> None:
        """Lets the batch in flight finish, leaves the group, closes; safe to call after a failed start."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.6 * self.settings.shutdown_timeout_s):
                await self._idle.wait()
        self._abandoned = self._generation
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await stop(consumer)
        await self._publisher.stop(timeout_s=1.0)
        await self._redis.aclose()


class _Abandoned(Exception):
    """The batch belongs to another by now."""


def _shown(partitions: Any) -> list[str]:
    return sorted(f"{topic}-{partition}" for topic, partition in partitions)
