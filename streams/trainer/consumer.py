"""The trainer's Kafka consumer: turns experiences into new weights versions.

A consumer-group member; each partition that it owns is a `PartitionLearner` with its own transactional
producer. This module has the consumer, rebalances, retries and readiness; it does not learn. Its loop opens
newly assigned partitions, applies operator commands, reads a batch, and lets the partitions learn from it
and publish when that is due.

On an idle system, one reply is published at once; under load, a version follows every `publish_interval_s`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import structlog
import torch
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import ProducerFenced
from prometheus_client import REGISTRY, CollectorRegistry

from cortex_core.errors import ConfigError
from streams.connections import (
    async_redis_client,
    backoff,
    kafka_client_options,
    redis_client,
    retry,
    why_unavailable,
)
from streams.failures import configuration_error, error_text, is_transient
from streams.heartbeats import MODELS_REPORTED, Activity, ModelState
from streams.kafka.clients import start, stop
from streams.kafka.reader import PROBE_S, EndProbe, Watchdog
from streams.kafka.topics import MAX_RECORD_BYTES, Topics, create_topics
from streams.trainer.context import TrainerContext
from streams.trainer.learner import warm_up
from streams.trainer.metrics import Metrics
from streams.trainer.models import LearningError
from streams.trainer.partition import PartitionLearner
from streams.weights.control import Control, ControlFollower
from streams.weights.follower import WeightsFollower
from streams.worker import Worker

log = structlog.get_logger(__name__)

READ_BATCH = 64
"""Experiences per read."""
IDLE_MS = 200
"""The longest wait of a read, and so the longest delay before operator commands and SIGTERM are noticed."""
MAX_ATTEMPTS = 3
"""Failures on one isolated experience before it goes to the dead letters."""


class Trainer(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka publishes no types
    """One trainer process."""

    def __init__(self, worker: Worker, registry: CollectorRegistry = REGISTRY) -> None:
        self.worker = worker
        self.settings = settings = worker.settings
        self.topic = Topics.of(settings).experiences
        self.metrics = Metrics(registry)
        worker.notes["misfits"] = lambda: self.metrics.misfits_of
        self._owned: dict[TopicPartition, PartitionLearner] = {}
        self._assigned: set[TopicPartition] = set()
        self._joined = False
        self._retry_at: dict[TopicPartition, float] = {}
        self._attempts: dict[TopicPartition, int] = {}
        self._isolate_until: dict[TopicPartition, int] = {}
        self._failed_at: dict[tuple[TopicPartition, int], int] = {}
        self._poison: dict[TopicPartition, dict[int, str]] = {}
        self._changed_models: set[str] = set()
        self._lock = asyncio.Lock()
        self._stalled = False
        self._probe = EndProbe(settings)
        self._thread = ThreadPoolExecutor(1, "learning", torch.set_num_threads, (settings.torch_threads,))
        self._cache = redis_client(settings)
        self._follower = WeightsFollower(settings, on_state=partial(worker.report, "kafka"))
        self._controls = ControlFollower(settings, self._on_control)
        worker.activity = self._activity
        self._context = TrainerContext(
            settings, self._follower, self._controls, self._cache, self.metrics, self._in_thread
        )

    async def run(self) -> None:
        """Connects, works until shutdown is requested, then publishes what is pending and leaves the group.

        Raises:
            ConfigError: a server refuses this process's configuration; possibly in an `ExceptionGroup`.
        """
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._thread.shutdown, wait=False, cancel_futures=True)
            stack.push_async_callback(self._probe.close)
            async with asyncio.TaskGroup() as group:
                watched = (self._watch_redis, self._watch_kafka, self._follower.until_refused)
                watches = [group.create_task(watch()) for watch in watched]
                if await self._or_shutdown(self._connect(stack)):
                    await self._work()
                for watch in watches:
                    watch.cancel()

    async def _work(self) -> None:
        async for _ in backoff(self.worker.stopping):
            try:
                await self._consume()
            except Exception as error:
                why = await why_unavailable(error, self.settings)
                self.worker.not_ready("kafka", str(why))
                log.warning("restarting the consumer", why=str(why))

    async def on_partitions_revoked(self, revoked: list[TopicPartition]) -> None:
        """Publishes what is pending and releases all partitions, before the group assigns them to others."""
        async with self._lock:
            self._assigned, self._joined = set(), False
            self.worker.not_ready("partitions", "the consumer group is rebalancing")
            await self._close_all()

    async def on_partitions_assigned(self, assigned: list[TopicPartition]) -> None:
        """Stores the assignment; the loop opens the partitions, which can take seconds."""
        self._assigned, self._joined = set(assigned), True
        self._retry_at.clear()
        log.info("partitions assigned", partitions=sorted(tp.partition for tp in assigned))

    async def _connect(self, stack: contextlib.AsyncExitStack) -> None:
        settings, worker = self.settings, self.worker
        await retry(lambda: create_topics(settings), settings, worker.not_ready)
        await stack.enter_async_context(self._follower)
        await stack.enter_async_context(self._controls)
        await self._in_thread(warm_up, settings)
        await self._follower.until_caught_up()
        await self._controls.until_caught_up()
        worker.ready("weights")

    async def _consume(self) -> None:
        """Runs one consumer until shutdown or until it stalls."""
        consumer = AIOKafkaConsumer(
            **kafka_client_options(self.settings),
            group_id=self.settings.trainer_group,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            isolation_level="read_committed",
            session_timeout_ms=int(1000 * self.settings.session_timeout_s),
            heartbeat_interval_ms=int(1000 * self.settings.session_timeout_s / 5),
            max_partition_fetch_bytes=MAX_RECORD_BYTES,
        )
        try:
            await start(consumer)
            consumer.subscribe([self.topic], listener=self)
            self._stalled = False
            while not self.worker.stopping.is_set() and not self._stalled:
                async with self._lock:
                    await self._open_assigned(consumer)
                    await self._apply_controls()
                batches = await consumer.getmany(timeout_ms=self._wait_ms(), max_records=READ_BATCH)
                async with self._lock:
                    for tp, records in batches.items():
                        if tp in self._owned:
                            await self._guarded(tp, PartitionLearner.learn_batch, records)
                    await self._publish_due()
        finally:
            async with self._lock:
                self._assigned, self._joined = set(), False
                await self._close_all()
            await stop(consumer)

    async def _open_assigned(self, consumer: AIOKafkaConsumer) -> None:
        now = time.monotonic()
        due = [tp for tp in self._assigned - self._owned.keys() if now >= self._retry_at.get(tp, 0.0)]
        for tp in due:
            self._owned[tp] = PartitionLearner(
                self._context,
                consumer,
                tp,
                isolate_until=self._isolate_until.get(tp, 0),
                poison=self._poison.get(tp),
            )
        await asyncio.gather(*(self._guarded(tp, PartitionLearner.open) for tp in due))
        if self._joined and self._owned.keys() == self._assigned:
            self.worker.ready("partitions")

    async def _apply_controls(self) -> None:
        changed, self._changed_models = self._changed_models, set()
        for model_id in sorted(changed):
            for tp, partition in list(self._owned.items()):
                if partition.owns(model_id):
                    await self._guarded(tp, PartitionLearner.apply_control, model_id)

    async def _publish_due(self) -> None:
        due = [tp for tp, p in self._owned.items() if p.unpublished and p.due_in() <= 0]
        await asyncio.gather(*(self._guarded(tp, PartitionLearner.publish) for tp in due))

    def _wait_ms(self) -> int:
        waits = [p.due_in() for p in self._owned.values() if p.unpublished]
        waits += [at - time.monotonic() for at in self._retry_at.values()]
        return max(1, min([IDLE_MS, *(int(1000 * w) + 1 for w in waits if w > 0)]))

    async def _guarded(self, tp: TopicPartition, work: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Runs `work` on a partition. If it fails, this partition alone is closed, and opened again later."""
        partition = self._owned[tp]
        retry_s = min(5.0, 0.2 * 2 ** self._attempts.get(tp, 0))
        try:
            await work(partition, *args)
            if partition.last_publish:
                self._attempts.pop(tp, None)
            return
        except ProducerFenced:  # a KafkaError, so it comes first
            self.metrics.fenced.inc()
            log.warning("fenced: another trainer owns this partition", partition=tp.partition)
            retry_s = 2 * self.settings.session_timeout_s  # by then the group has assigned it
        except LearningError as error:
            self._quarantine(tp, partition, error)
        except Exception as error:
            if refused := configuration_error(error, self.settings):
                raise refused from error
            log.warning(
                "partition failed; opening it again",
                partition=tp.partition,
                error=error_text(error),
                exc_info=not is_transient(error),
            )
        self.metrics.failures.inc()
        self._attempts[tp] = self._attempts.get(tp, 0) + 1
        self._retry_at[tp] = time.monotonic() + retry_s
        self.worker.not_ready("partitions", f"partition {tp.partition} is opened again in {retry_s:.1f} s")
        del self._owned[tp]
        await partition.close()

    def _quarantine(self, tp: TopicPartition, partition: PartitionLearner, error: LearningError) -> None:
        """Isolates the experience that makes learning fail, retries it, and finally marks it as poison."""
        log.error("learning failed", partition=tp.partition, error=str(error))
        isolated = error.offset < partition.isolate_until
        self._isolate_until[tp] = max(error.offset + 1, self._isolate_until.get(tp, 0))
        if isolated:
            failures = self._failed_at[tp, error.offset] = self._failed_at.get((tp, error.offset), 0) + 1
            if failures >= MAX_ATTEMPTS:
                self._poison.setdefault(tp, {})[error.offset] = str(error)

    async def _close_all(self) -> None:
        for tp, partition in list(self._owned.items()):
            if partition.is_open:
                with contextlib.suppress(ConfigError):  # the loop raises it too
                    await self._guarded(tp, PartitionLearner.publish)
            await partition.close()
        self._owned.clear()
        self.metrics.lag.clear()

    async def _watch_kafka(self) -> None:
        """Measures the lag, and detects a consumer that stops reading although there is more to read."""
        watchdog: Watchdog[TopicPartition] = Watchdog()
        while True:
            await asyncio.sleep(PROBE_S)
            if not (owned := list(self._owned)):
                continue
            ends = await retry(partial(self._probe.ends, owned), self.settings, self.worker.not_ready)
            positions = {tp: partition.position for tp, partition in self._owned.items() if tp in ends}
            for tp, position in positions.items():
                self.metrics.lag.labels(str(tp.partition)).set(max(0, ends[tp] - position))
            for tp in watchdog.stalled(positions, ends):
                log.error("consumer stalled", partition=tp.partition, offset=positions[tp], end=ends[tp])
                self._stalled = True

    async def _watch_redis(self) -> None:
        async with async_redis_client(self.settings) as client:
            while True:
                await retry(client.ping, self.settings, self.worker.not_ready)
                self.worker.ready("redis")
                await asyncio.sleep(PROBE_S)

    def _activity(self) -> Activity:
        """The partitions and models of this trainer, for its heartbeat: first the models in memory."""
        owned = list(self._owned.values())
        loaded = [model_id for partition in owned for model_id in partition.models.ids()]
        others = [*self._controls.models()[:MODELS_REPORTED], *self._follower.models()[:MODELS_REPORTED]]
        models: dict[str, ModelState] = {}
        for model_id in [*loaded, *others]:
            if len(models) < MODELS_REPORTED and any(partition.owns(model_id) for partition in owned):
                newest, control = self._follower.newest(model_id), self._controls.of(model_id)
                version = newest.version if newest else 0
                models[model_id] = ModelState(version, control.pinned, control.paused)
        return Activity([p.name for p in owned], models, len(self._follower.models()))

    async def _on_control(self, model_id: str, _control: Control) -> None:
        self._changed_models.add(model_id)

    async def _in_thread(self, work: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    async def _or_shutdown(self, work: Any) -> bool:
        """Waits for `work` or for a shutdown request; returns whether `work` completed."""
        task = asyncio.ensure_future(work)
        stopping = asyncio.create_task(self.worker.stopping.wait())
        try:
            await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
            return bool(task.done())
        finally:
            for each in (task, stopping):
                each.cancel()
            await asyncio.gather(task, stopping, return_exceptions=True)
