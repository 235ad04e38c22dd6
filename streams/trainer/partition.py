"""One partition of the experiences topic in a trainer's hands, from taking it over to giving it up.

Whoever owns a partition holds its transactional producer; opening it fences the former owner, whatever
that one is still doing. Effects have one order: learn → (weights, dead letters, consumed offset) in one
Kafka transaction. A crash at any point therefore continues at the newest version and at the first
experience that it has not learned.

Two positions make that exact. The group's committed offset says where to read on: no higher than the first
experience that is still to be learned for any model. Each model's manifest says what that model has
learned (`consumed`), so that reading some of it again, on behalf of another model, changes nothing.

Any failure is met like a crash: this object is thrown away and the partition opened anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import redis
import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import ProducerFenced
from aiokafka.partitioner import murmur2

from cortex_core.errors import CortexError, InputError, WeightsError
from cortex_core.weights import WeightsSnapshot
from streams.connections import kafka_client_options
from streams.events import DeadLetter, ExperienceEvent, parse, version_of
from streams.failures import answered, is_systemic
from streams.kafka.clients import start, stop
from streams.kafka.dead_letters import dead_letter
from streams.kafka.topics import MAX_RECORD_BYTES, Topics
from streams.replay_store import RedisReplayBuffer
from streams.trainer.learner import ModelLearner, Resume
from streams.trainer.metrics import Metrics
from streams.weights.records import publish

if TYPE_CHECKING:
    from streams.settings import Settings
    from streams.weights.control import ControlFollower, Rollback
    from streams.weights.follower import WeightsFollower

log = structlog.get_logger(__name__)

Version = tuple[ModelLearner, WeightsSnapshot, bytes]
"""A learner, its next version, and what the next owner must know beyond it."""
Letter = tuple[bytes | None, DeadLetter]
"""With the key that it came under."""
TRANSACTION_TIMEOUT_MS = 10_000
"""A trainer that dies inside a transaction holds back every reader of the weights for so long, at most."""
PUBLISH_TIMEOUT_S = 20.0
MODELS_LOADED = 32
"""Models per partition that stay in memory; the least recently used leaves once it is published."""


class LearningError(CortexError):
    """Learning failed for a reason that is neither the experience's shape nor a server that is away."""

    def __init__(self, offset: int, why: str) -> None:
        super().__init__(f"learning from the experience at offset {offset} failed: {why}")
        self.offset = offset


@dataclass(frozen=True, slots=True)
class Tools:
    """What all partitions of one trainer share."""

    settings: Settings
    follower: WeightsFollower
    controls: ControlFollower
    cache: redis.Redis
    metrics: Metrics
    in_thread: Callable[..., Awaitable[Any]]
    """Runs a function in the one learning thread."""
    own: deque[str] = field(default_factory=lambda: deque(maxlen=1_000))
    """sha256 of the versions that this process published last; they need no check."""


def home_partition(model_id: str, partitions: int) -> int:
    """The partition that a model's experiences go to: Kafka's default partitioner on the key."""
    return int((murmur2(model_id.encode()) & 0x7FFFFFFF) % partitions)


class PartitionLearner:
    """Learns every model whose experiences stand in one partition."""

    def __init__(
        self,
        tools: Tools,
        consumer: AIOKafkaConsumer,
        tp: TopicPartition,
        *,
        careful_until: int = 0,
        poison: dict[int, str] | None = None,
    ) -> None:
        """
        Args:
            careful_until: below this offset each experience is learned and published by itself, so that one
                that makes learning fail is found.
            poison: offset → reason of experiences that are not tried again.
        """
        self.tools = tools
        self.settings = tools.settings
        self.tp = tp
        self.position = 0
        """Offset of the next experience."""
        self.committed = 0
        self.held: dict[str, int] = {}
        """Model that must not learn now → offset of its first experience held back."""
        self.last_publish = 0.0
        self.careful_until = careful_until
        self._consumer = consumer
        self._poison = poison or {}
        self._learners: OrderedDict[str, ModelLearner] = OrderedDict()
        self._seen: dict[str, int] = {}
        self._void_rollbacks: dict[str, int] = {}
        """Model that is not loaded → offset of a rollback that was refused"""
        self._reached = 0
        self._letters: list[Letter] = []
        self._producer: AIOKafkaProducer | None = None
        self._partitions = 0
        self._name = f"{tp.topic}-{tp.partition}"

    async def open(self) -> None:
        """Takes the partition over: fences the former owner, then reads where that one stood.

        Raises:
            KafkaError, OSError: Kafka does not answer; open again later.
        """
        producer = AIOKafkaProducer(
            **kafka_client_options(self.settings),
            transactional_id=f"{self.settings.topic_prefix}-trainer-{self._name}",
            transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
            max_request_size=2 * MAX_RECORD_BYTES,
        )
        async with asyncio.timeout(30.0):
            self._producer = await start(producer)
            # Read once: where partitions are added, the group is assigned anew.
            self._partitions = len(await self._producer.partitions_for(self.tp.topic))
            # What the former owner had committed is visible from here on, and no more can come.
            await self.tools.follower.catch_up()
            await self.tools.controls.catch_up()
            committed = await self._consumer.committed(self.tp)
        # Where retention took the first offsets away, the consumer goes to the first one there is.
        self.position = self.committed = self._reached = int(committed or 0)
        self._consumer.seek(self.tp, self.position)
        for model_id in self.tools.controls.models():
            await self.obey(model_id)
        log.info("partition taken over", partition=self._name, at=self.position)

    async def close(self) -> None:
        """Lets go of it; what is unpublished will be learned again by the next owner."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await stop(producer)

    def is_home_of(self, model_id: str) -> bool:
        """Whether this model's experiences belong here."""
        return bool(home_partition(model_id, self._partitions) == self.tp.partition)

    async def take(self, records: Sequence[Any]) -> None:
        """Learns from these records, and publishes in between whenever that is due."""
        left = [r for r in records if r.offset >= self.position]
        while left:
            careful = left[0].offset < self.careful_until
            batch = left[:1] if careful else left
            for key in {r.key for r in batch}:
                await self._load(key)
            done = await self.tools.in_thread(self._learn, batch, time.monotonic() + self.due_in())
            left = left[done:]
            if careful or (left and self.due_in() <= 0):
                await self.publish()

    def due_in(self) -> float:
        """Seconds until the next version may be published; 0 or less: now."""
        return self.last_publish + self.settings.publish_interval_s - time.monotonic()

    @property
    def unpublished(self) -> bool:
        """Whether there is something to publish."""
        return bool(self._dirty() or self._letters or self._next_offset() != self.committed)

    async def publish(self) -> None:
        """New versions of all models that learned, dead letters and the consumed offset, in one transaction.

        Raises:
            ProducerFenced: another trainer owns this partition by now; nothing of this was published.
            KafkaError, OSError: whether it was published is known to the log alone; open anew.
        """
        assert self._producer is not None
        if not self.unpublished:
            return
        offset = self._next_offset()
        started = time.monotonic()
        versions = await self.tools.in_thread(self._next_versions)
        letters, self._letters = self._letters, []
        stepped = time.monotonic()
        self.tools.own.extend(snapshot.manifest.sha256 for _, snapshot, _ in versions)
        saving = asyncio.ensure_future(self.tools.in_thread(self._save_optimizers, versions))
        try:
            async with asyncio.timeout(PUBLISH_TIMEOUT_S):
                await self._transact(versions, letters, offset)
        except ProducerFenced:
            raise
        except Exception:
            # An open transaction would hold back every reader of the weights until it times out.
            with contextlib.suppress(Exception):
                async with asyncio.timeout(2.0):
                    await self._producer.abort_transaction()
            raise
        finally:
            await saving
        self.last_publish = time.monotonic()
        self.committed = offset
        for learner, snapshot, _ in versions:
            learner.published(snapshot)
            self.tools.metrics.published(snapshot.manifest)
        self.tools.metrics.publish_seconds.observe(self.last_publish - stepped)
        self.tools.metrics.flush_seconds.observe(stepped - started)
        self._unload()

    async def _transact(self, versions: Sequence[Version], letters: Sequence[Letter], offset: int) -> None:
        producer, settings = self._producer, self.settings
        assert producer is not None
        await producer.begin_transaction()
        for _, snapshot, resume in versions:
            await publish(producer, settings, snapshot, resume)
        topic = Topics.of(settings).dead_letters
        sent = [await producer.send(topic, letter.to_bytes(), key=key) for key, letter in letters]
        await asyncio.gather(*sent)
        await producer.send_offsets_to_transaction({self.tp: offset}, settings.trainer_group)
        await producer.commit_transaction()

    async def obey(self, model_id: str) -> None:
        """Does what operators want of the model; nothing where its home is another partition."""
        if not self.is_home_of(model_id):
            return
        control = self.tools.controls.of(model_id)
        rollback = control.rollback
        if rollback is not None and self._is_pending(model_id, rollback):
            learner = await self._load(model_id.encode())
            if learner is not None:
                await self._roll_back(learner, rollback)
                self._unload()
        if control.held:
            learner = self._learners.pop(model_id, None)
            if learner is not None and learner.first_unpublished is not None:
                # Not published: its pinned version must not leave the ring. Learned again when released.
                self.held.setdefault(model_id, learner.first_unpublished)
                self._seen.pop(model_id, None)
        elif model_id in self.held:
            self.position = self.held.pop(model_id)
            self._consumer.seek(self.tp, self.position)
            log.info("model released", model_id=model_id, reads_again_from=self.position)

    def _is_pending(self, model_id: str, rollback: Rollback) -> bool:
        """Whether a rollback is still to be done; refuses it where its version is not kept. Loads nothing."""
        learner, follower = self._learners.get(model_id), self.tools.follower
        done = (
            learner.resume.control_offset
            if learner
            else max(
                Resume.control_offset_in(follower.resume(model_id)), self._void_rollbacks.get(model_id, -1)
            )
        )
        if done >= rollback.offset:
            return False
        if rollback.version in (kept := [m.version for m in follower.history(model_id)]):
            return True
        self._refuse_rollback(
            model_id, rollback, f"version {rollback.version} is not kept; kept are: {kept or 'none'}"
        )
        return False

    def _refuse_rollback(self, model_id: str, rollback: Rollback, why: str) -> None:
        self.tools.metrics.refused.labels("rollback").inc()
        log.error("rollback refused", model_id=model_id, why=why)
        learner = self._learners.get(model_id)
        if learner is not None:  # and its next version says so
            learner.resume.control_offset = rollback.offset
        else:
            self._void_rollbacks[model_id] = rollback.offset

    async def _roll_back(self, learner: ModelLearner, rollback: Rollback) -> None:
        try:
            old = await self.tools.follower.fetch(learner.model_id, rollback.version)
            await self.tools.in_thread(learner.roll_back, old, rollback.offset)
        except WeightsError as error:
            self._refuse_rollback(learner.model_id, rollback, str(error))
            return
        await self.publish()
        log.warning("rolled back", model_id=learner.model_id, to=rollback.version, as_version=learner.version)

    async def _load(self, key: bytes | None) -> ModelLearner | None:
        """The learner of the model with this key; None where the key names none."""
        try:
            model_id = (key or b"").decode()
        except UnicodeDecodeError:
            return None
        learner = self._learners.get(model_id)
        if learner is None and model_id and self.is_home_of(model_id):
            while True:
                newest = self.tools.follower.newest(model_id)
                try:
                    snapshot = await self.tools.follower.fetch(model_id, newest.version) if newest else None
                    break
                except WeightsError as error:  # overwritten between the two: there is a newer one
                    log.info("fetching again", model_id=model_id, why=str(error))
                    await self.tools.follower.catch_up()
            learner = await self.tools.in_thread(
                lambda: ModelLearner.open(
                    self.settings,
                    model_id,
                    snapshot,
                    self.tools.follower.resume(model_id),
                    buffer=RedisReplayBuffer.of(self.settings, model_id, self.tools.cache),
                    cache=self.tools.cache,
                )
            )
            learner.resume.control_offset = max(
                learner.resume.control_offset, self._void_rollbacks.pop(model_id, -1)
            )
            self._learners[model_id] = learner
        if learner is not None:
            self._learners.move_to_end(model_id)
        return learner

    def _learn(self, records: Sequence[Any], deadline: float) -> int:
        """In the learning thread: takes records until the deadline, at least one; how many."""
        for done, record in enumerate(records, 1):
            try:
                self._learn_one(record)
            except InputError as error:
                self._dead_letter(record, str(error))
            except Exception as error:
                if is_systemic(error):
                    raise
                raise LearningError(record.offset, answered(error)) from error
            self.position = record.offset + 1
            self._reached = max(self._reached, self.position)
            if time.monotonic() >= deadline:
                return done
        return len(records)

    def _learn_one(self, record: Any) -> None:
        if record.offset in self._poison:
            raise InputError(self._poison[record.offset])
        try:
            model_id = (record.key or b"").decode()
        except UnicodeDecodeError as error:
            raise InputError(f"the key {record.key!r} is no model_id: {error}") from error
        if self.tools.controls.of(model_id).held:
            self.held.setdefault(model_id, record.offset)
            return
        learner = self._learners.get(model_id)
        if learner is None:
            raise InputError(f"an experience of {model_id!r} belongs on another partition: its key decides")
        if record.offset < max(self._seen.get(model_id, 0), learner.consumed.get(self._name, 0)):
            return  # read again on behalf of another model
        event = parse(ExperienceEvent, record.value)
        if event.interaction.model_id != model_id:
            raise InputError(f"the key says {model_id!r}, the experience {event.interaction.model_id!r}")
        started = time.monotonic()
        outcome, update = learner.learn(event, version_of(record.headers, event), record.offset)
        self._seen[model_id] = record.offset + 1
        self.tools.metrics.learned(model_id, outcome, update, time.monotonic() - started)

    def _next_versions(self) -> list[Version]:
        """In the learning thread: the next version of each model that learned."""
        out = []
        for learner in self._dirty():
            behind = max(
                self.position, self._seen.get(learner.model_id, 0), learner.consumed.get(self._name, 0)
            )
            started = time.monotonic()
            try:
                update = learner.flush()
            except Exception as error:
                if is_systemic(error):
                    raise
                first = learner.first_unpublished
                raise LearningError(self.position if first is None else first, answered(error)) from error
            if update is not None:
                self.tools.metrics.stepped(learner.model_id, update, time.monotonic() - started)
            try:
                snapshot, resume = learner.next_version({self._name: behind})
            except WeightsError as error:
                # Begins again from its last version. Its experiences since then stay in replay.
                self.tools.metrics.refused.labels("not_finite").inc()
                log.error("weights not published", model_id=learner.model_id, error=str(error))
                del self._learners[learner.model_id]
                continue
            out.append((learner, snapshot, resume))
        return out

    def _save_optimizers(self, versions: Sequence[Version]) -> None:
        """In the learning thread, while the versions are on their way."""
        for learner, snapshot, _ in versions:
            try:
                learner.save_optimizer(self.tools.cache, snapshot.manifest.version)
            except redis.RedisError as error:
                log.warning("optimizer not cached", model_id=learner.model_id, error=str(error))

    def _dirty(self) -> list[ModelLearner]:
        return [v for v in self._learners.values() if v.first_unpublished is not None or v.reason != "train"]

    def _next_offset(self) -> int:
        return min([self.position, *self.held.values()])

    def _dead_letter(self, record: Any, reason: str) -> None:
        if record.offset < self._reached:
            return  # read again, and sent the first time
        self.tools.metrics.refused.labels("experience").inc()
        log.warning("experience refused", partition=self._name, offset=record.offset, reason=reason)
        letter = dead_letter(record, reason).model_copy(update={"worker": "trainer"})
        self._letters.append((record.key, letter))

    def _unload(self) -> None:
        for model_id, learner in list(self._learners.items()):
            if len(self._learners) <= MODELS_LOADED:
                return
            newest = self.tools.follower.newest(model_id)
            known = newest.version if newest else 0
            if learner.first_unpublished is None and learner.version == known:
                del self._learners[model_id]
                self._seen.pop(model_id, None)
