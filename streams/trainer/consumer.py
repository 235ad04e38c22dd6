"""Training: experiences off Kafka become new weights versions.

A consumer-group member; each partition it owns is a `PartitionLearner` with a transactional producer of its
own. This module owns the consumer, the rebalances, retries and readiness; it does not learn. Its loop opens
the partitions newly assigned, does what operators asked, reads a batch, and has it learned and published
where that is due.

One reply on an idle system is published at once; under load, versions come every `publish_interval_s`.
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
from streams.failures import answered, configuration_error, is_transient
from streams.kafka.clients import start, stop
from streams.kafka.follower import PROBE_S
from streams.kafka.reader import EndProbe, Watchdog
from streams.kafka.topics import MAX_RECORD_BYTES, Topics, create_topics
from streams.trainer.learner import warm_up
from streams.trainer.metrics import Metrics
from streams.trainer.partition import LearningError, PartitionLearner, Tools
from streams.weights.control import Control, ControlFollower
from streams.weights.follower import WeightsFollower
from streams.worker import Worker

log = structlog.get_logger(__name__)

READ_BATCH = 64
"""Experiences per read."""
IDLE_MS = 200
"""How long a read waits: operators' wishes and SIGTERM are seen after that, at the latest."""
TRIES = 3
"""Failures on one experience alone before it goes to the dead letters."""


class Trainer(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka publishes no types
    """One trainer process."""

    def __init__(self, worker: Worker, registry: CollectorRegistry = REGISTRY) -> None:
        self.worker = worker
        self.settings = settings = worker.settings
        self.topic = Topics.of(settings).experiences
        self.metrics = Metrics(registry)
        self._owned: dict[TopicPartition, PartitionLearner] = {}
        self._assigned: set[TopicPartition] = set()
        self._joined = False
        self._retry_at: dict[TopicPartition, float] = {}
        self._tries: dict[TopicPartition, int] = {}
        self._careful_until: dict[TopicPartition, int] = {}
        self._failed_at: dict[tuple[TopicPartition, int], int] = {}
        self._poison: dict[TopicPartition, dict[int, str]] = {}
        self._asked: set[str] = set()
        self._lock = asyncio.Lock()
        self._stalled = False
        self._probe = EndProbe(settings)
        self._thread = ThreadPoolExecutor(1, "learning", torch.set_num_threads, (settings.torch_threads,))
        self._cache = redis_client(settings)
        self._follower = WeightsFollower(
            settings,
            on_state=partial(worker.report, "kafka"),
            keep_resume=True,
            is_own=lambda manifest: manifest.sha256 in self._tools.own,
        )
        self._controls = ControlFollower(settings, self._on_control)
        self._tools = Tools(
            settings, self._follower, self._controls, self._cache, self.metrics, self._in_thread
        )

    async def run(self) -> None:
        """Connects, works until the worker is told to stop, then publishes what is pending and leaves.

        Raises:
            ConfigError: a server refuses this process; possibly within an `ExceptionGroup`.
        """
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._thread.shutdown, wait=False, cancel_futures=True)
            stack.push_async_callback(self._probe.close)
            async with asyncio.TaskGroup() as group:
                watches = [group.create_task(watch()) for watch in (self._watch_redis, self._watch_kafka)]
                if await self._or_stop(self._connect(stack)):
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
                log.warning("consumer begins anew", why=str(why))

    async def on_partitions_revoked(self, revoked: list[TopicPartition]) -> None:
        """Publishes what is pending and lets go, before the group gives the partitions to others."""
        async with self._lock:
            self._assigned, self._joined = set(), False
            self.worker.not_ready("partitions", "the group is being assigned anew")
            await self._give_up_all()

    async def on_partitions_assigned(self, assigned: list[TopicPartition]) -> None:
        """Notes them; the loop opens them, as that can take a while."""
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
        """One consumer's life."""
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
                    await self._obey()
                batches = await consumer.getmany(timeout_ms=self._wait_ms(), max_records=READ_BATCH)
                async with self._lock:
                    for tp, records in batches.items():
                        if tp in self._owned:
                            await self._surviving(tp, PartitionLearner.take, records)
                    await self._publish_due()
        finally:
            async with self._lock:
                self._assigned, self._joined = set(), False
                await self._give_up_all()
            await stop(consumer)

    async def _open_assigned(self, consumer: AIOKafkaConsumer) -> None:
        now = time.monotonic()
        due = [tp for tp in self._assigned - self._owned.keys() if now >= self._retry_at.get(tp, 0.0)]
        for tp in due:
            self._owned[tp] = PartitionLearner(
                self._tools,
                consumer,
                tp,
                careful_until=self._careful_until.get(tp, 0),
                poison=self._poison.get(tp),
            )
        await asyncio.gather(*(self._surviving(tp, PartitionLearner.open) for tp in due))
        if self._joined and self._owned.keys() == self._assigned:
            self.worker.ready("partitions")

    async def _obey(self) -> None:
        asked, self._asked = self._asked, set()
        for model_id in sorted(asked):
            for tp, partition in list(self._owned.items()):
                if partition.is_home_of(model_id):
                    await self._surviving(tp, PartitionLearner.obey, model_id)

    async def _publish_due(self) -> None:
        due = [tp for tp, p in self._owned.items() if p.unpublished and p.due_in() <= 0]
        await asyncio.gather(*(self._surviving(tp, PartitionLearner.publish) for tp in due))

    def _wait_ms(self) -> int:
        waits = [p.due_in() for p in self._owned.values() if p.unpublished]
        waits += [at - time.monotonic() for at in self._retry_at.values()]
        return max(1, min([IDLE_MS, *(int(1000 * w) + 1 for w in waits if w > 0)]))

    async def _surviving(self, tp: TopicPartition, work: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Does something with a partition; what fails costs that partition a new opening, and no more."""
        partition = self._owned[tp]
        retry_s = min(5.0, 0.2 * 2 ** self._tries.get(tp, 0))
        try:
            await work(partition, *args)
            if partition.last_publish:
                self._tries.pop(tp, None)
            return
        except ProducerFenced:  # a KafkaError, so it comes first
            self.metrics.fenced.inc()
            log.warning("fenced: another trainer owns this partition", partition=tp.partition)
            retry_s = 2 * self.settings.session_timeout_s  # by then the group has said whose it is
        except LearningError as error:
            self._quarantine(tp, partition, error)
        except Exception as error:
            if refused := configuration_error(error, self.settings):
                raise refused from error
            log.warning(
                "partition opened anew",
                partition=tp.partition,
                error=answered(error),
                exc_info=not is_transient(error),
            )
        self.metrics.failures.inc()
        self._tries[tp] = self._tries.get(tp, 0) + 1
        self._retry_at[tp] = time.monotonic() + retry_s
        self.worker.not_ready("partitions", f"partition {tp.partition} is opened anew in {retry_s:.1f} s")
        del self._owned[tp]
        await partition.close()

    def _quarantine(self, tp: TopicPartition, partition: PartitionLearner, error: LearningError) -> None:
        """Finds the one experience that makes learning fail, tries it again, then sets it aside."""
        log.error("learning failed", partition=tp.partition, error=str(error))
        alone = error.offset < partition.careful_until
        self._careful_until[tp] = max(error.offset + 1, self._careful_until.get(tp, 0))
        if alone:
            failures = self._failed_at[tp, error.offset] = self._failed_at.get((tp, error.offset), 0) + 1
            if failures >= TRIES:
                self._poison.setdefault(tp, {})[error.offset] = str(error)

    async def _give_up_all(self) -> None:
        for tp, partition in list(self._owned.items()):
            with contextlib.suppress(ConfigError):  # the loop meets it as well
                await self._surviving(tp, PartitionLearner.publish)
            await partition.close()
        self._owned.clear()
        self.metrics.lag.clear()

    async def _watch_kafka(self) -> None:
        """Lag, and whether reading stands still although there is more."""
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
                log.error("reading stands still", partition=tp.partition, at=positions[tp], end=ends[tp])
                self._stalled = True

    async def _watch_redis(self) -> None:
        async with async_redis_client(self.settings) as client:
            while True:
                await retry(client.ping, self.settings, self.worker.not_ready)
                self.worker.ready("redis")
                await asyncio.sleep(PROBE_S)

    async def _on_control(self, model_id: str, _control: Control) -> None:
        self._asked.add(model_id)

    async def _in_thread(self, work: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    async def _or_stop(self, work: Any) -> bool:
        """Waits for `work`, or for the wish to stop; whether `work` was done."""
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
