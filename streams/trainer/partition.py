"""One partition of the experiences topic, from its takeover by this trainer to its release.

The owner of a partition has its transactional producer; opening that producer fences the former owner. The
order of effects is fixed: learn → (weights, dead letters, consumed offset) in one Kafka transaction. After a
crash at any point, the next owner continues with the newest version and the first experience that it has not
learned from.

Two positions make this exact. The group's committed offset says where to continue reading: at most the first
experience that any model has yet to learn from. Each model's manifest says what that model has learned
from (`consumed`), so that reading an experience again for the sake of another model changes nothing.

Any failure is handled like a crash: this object is discarded, and the partition is opened again.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import ProducerFenced

from cortex_core.errors import InputError, WeightsError
from streams.connections import kafka_client_options
from streams.events import DeadLetter, ExperienceEvent, parse, version_of
from streams.failures import error_text, is_systemic
from streams.kafka.clients import start, stop
from streams.kafka.dead_letters import dead_letter
from streams.kafka.topics import MAX_RECORD_BYTES, Topics, partition_of
from streams.replay_store import decode
from streams.trainer.context import TrainerContext
from streams.trainer.learner import MisfitError, ModelLearner, Resume
from streams.trainer.models import LearningError, LoadedModels, Version
from streams.trainer.replay import Misfit
from streams.weights.control import publish_forgotten
from streams.weights.records import SPARE_SLOTS, Tombstone, delete, publish_all

if TYPE_CHECKING:
    from cortex_core.weights import WeightsManifest
    from streams.weights.control import Rollback

log = structlog.get_logger(__name__)

KeyedLetter = tuple[bytes | None, DeadLetter]
"""A dead letter with the key of its record."""
TRANSACTION_TIMEOUT_MS = 10_000
"""The longest time that a trainer which dies within a transaction blocks the readers of the weights."""
PUBLISH_TIMEOUT_S = 20.0


class PartitionLearner:
    """Learns all models whose experiences are in one partition."""

    def __init__(
        self,
        context: TrainerContext,
        consumer: AIOKafkaConsumer,
        tp: TopicPartition,
        *,
        isolate_until: int = 0,
        poison: dict[int, str] | None = None,
    ) -> None:
        """
        Args:
            isolate_until: experiences before this offset are learned and published one at a time, which
                identifies the one that makes learning fail.
            poison: offset → reason, of experiences that go to the dead letters without another attempt.
        """
        self.context = context
        self.settings = context.settings
        self.tp = tp
        self.position = 0
        """Offset of the next experience."""
        self.committed = 0
        self.paused: dict[str, int] = {}
        """Model whose training is paused → offset of the first experience that it has not learned from."""
        self.last_publish = 0.0
        self.isolate_until = isolate_until
        self.name = f"{tp.topic}-{tp.partition}"
        self.models = LoadedModels(context, self.name)
        self._consumer = consumer
        self._poison = poison or {}
        self._refused_rollbacks: dict[str, int] = {}
        """Model that is not in memory → offset of its rollback that was refused."""
        self._highest_position = 0
        self._letters: list[KeyedLetter] = []
        self._misplaced: list[tuple[str, Any]] = []
        """Records of models whose partition is another one, with the model: to be sent there."""
        self._producer: AIOKafkaProducer | None = None
        self._partitions = 0

    async def open(self) -> None:
        """Takes the partition over: fences the former owner, then continues at its committed offset.

        Raises:
            KafkaError, OSError: Kafka does not answer; open again later.
        """
        producer = AIOKafkaProducer(
            **kafka_client_options(self.settings),
            transactional_id=f"{self.settings.topic_prefix}-trainer-{self.name}",
            transaction_timeout_ms=TRANSACTION_TIMEOUT_MS,
            max_request_size=2 * MAX_RECORD_BYTES,
        )
        async with asyncio.timeout(30.0):
            self._producer = await start(producer)
            # Read once: when partitions are added, the group rebalances.
            self._partitions = len(await self._producer.partitions_for(self.tp.topic))
            # The former owner is fenced: all that it committed is visible now, and nothing can follow.
            await self.context.follower.catch_up()
            await self.context.controls.catch_up()
            committed = await self._consumer.committed(self.tp)
            self.models.end = (await self._consumer.end_offsets([self.tp]))[self.tp]
        # If retention has deleted this offset, the consumer continues at the first one that is left.
        self.position = self.committed = self._highest_position = int(committed or 0)
        self._consumer.seek(self.tp, self.position)
        for model_id in self.context.controls.models():
            await self.apply_control(model_id)
        log.info("partition opened", partition=self.name, offset=self.position)

    async def close(self) -> None:
        """Releases the partition; the next owner learns again from what is unpublished."""
        producer, self._producer = self._producer, None
        if producer is not None:
            await stop(producer)

    def owns(self, model_id: str) -> bool:
        """Whether this model's experiences belong to this partition; False until it is open."""
        return self._partitions > 0 and partition_of(model_id, self._partitions) == self.tp.partition

    # --- learning -------------------------------------------------------------------------------------------

    async def learn_batch(self, records: Sequence[Any]) -> None:
        """Learns from the records in order; publishes in between when that is due."""
        left = [r for r in records if r.offset >= self.position]
        self.models.end = max(self.models.end, *(r.offset + 1 for r in left), 0)
        while left:
            isolated = left[0].offset < self.isolate_until
            batch = left[:1] if isolated else left
            for key in {r.key for r in batch}:
                await self._load(key)
            done = await self.context.in_thread(self._learn, batch, time.monotonic() + self.due_in())
            left = left[done:]
            if isolated or (left and self.due_in() <= 0):
                await self.publish()

    async def _load(self, key: bytes | None) -> ModelLearner | None:
        """The learner of the model with this key; None if the key is invalid or of another partition."""
        try:
            model_id = (key or b"").decode()
        except UnicodeDecodeError:
            return None
        if not model_id or not self.owns(model_id):
            return None
        learner = await self.models.load(model_id)
        refused = self._refused_rollbacks.pop(model_id, -1)
        learner.resume.control_offset = max(learner.resume.control_offset, refused)
        return learner

    def _learn(self, records: Sequence[Any], deadline: float) -> int:
        """In the learning thread: learns until the deadline, from at least one record; returns how many."""
        for done, record in enumerate(records, 1):
            try:
                self._learn_one(record)
            except InputError as error:
                self._dead_letter(record, str(error))
            except Exception as error:
                if is_systemic(error):
                    raise
                raise LearningError(record.offset, error_text(error)) from error
            self.position = record.offset + 1
            self._highest_position = max(self._highest_position, self.position)
            if time.monotonic() >= deadline:
                return done
        return len(records)

    def _learn_one(self, record: Any) -> None:
        if record.offset in self._poison:
            raise InputError(self._poison[record.offset])
        try:
            model_id = (record.key or b"").decode()
        except UnicodeDecodeError as error:
            raise InputError(f"the key {record.key!r} is not a valid model_id: {error}") from error
        if not model_id or not self.owns(model_id):
            self._forward(record)
            return
        if self.context.controls.of(model_id).training_paused:
            self.paused.setdefault(model_id, record.offset)
            return
        learner = self.models.get(model_id)
        assert learner is not None, "learn_batch loads it"
        if record.offset < self.models.position(learner):
            return  # read again for the sake of another model
        event = _experience(record)
        started = time.monotonic()
        version = version_of(record.headers, event.revision)
        try:
            outcome, update = learner.learn(event, version, record.offset)
        except MisfitError as error:
            if not learner.replay.refuse(event.interaction.interaction_id, str(error)):
                return  # its replay entry is the dead letter
            if record.offset >= self._highest_position:
                self.context.metrics.misfit(model_id)
            raise
        self.models.mark_learned(model_id, record.offset)
        self.context.metrics.learned(model_id, outcome, update, time.monotonic() - started)

    def _forward(self, record: Any) -> None:
        """Sends an experience to the partition of its model, which changes when partitions are added. It may
        be there already: the same version is learned once."""
        if record.offset >= self._highest_position:
            self._misplaced.append((_experience(record).interaction.model_id, record))

    def _dead_letter(self, record: Any, reason: str) -> None:
        if record.offset < self._highest_position:
            return  # read again; its dead letter was sent the first time
        self.context.metrics.refused.labels("experience").inc()
        log.warning("experience refused", partition=self.name, offset=record.offset, reason=reason)
        letter = dead_letter(record, reason).model_copy(update={"worker": "trainer"})
        self._letters.append((record.key, letter))

    def _misfit_letter(self, model_id: str, misfit: Misfit) -> KeyedLetter:
        """The dead letter of a replay entry; the same one if it is published again after a crash."""
        log.warning("replay entry set aside", model_id=model_id, id=misfit.id, reason=misfit.reason)
        key = model_id.encode()
        record = SimpleNamespace(
            topic=self.tp.topic,
            partition=self.tp.partition,
            offset=-1,
            timestamp=1000 * time.time(),
            key=key,
            value=decode(misfit.value)[1],
        )
        digest = hashlib.blake2b(key + b"\0" + misfit.id.encode(), digest_size=16).hexdigest()
        changes = {"worker": "trainer", "dead_letter_id": f"replay-{digest}"}
        return key, dead_letter(record, f"in replay: {misfit.reason}").model_copy(update=changes)

    # --- publishing -----------------------------------------------------------------------------------------

    def due_in(self) -> float:
        """Seconds until the next version may be published; 0 or less: now."""
        return self.last_publish + self.settings.publish_interval_s - time.monotonic()

    @property
    def is_open(self) -> bool:
        """Whether `open` has started its producer."""
        return self._producer is not None

    @property
    def unpublished(self) -> bool:
        """Whether there is something to publish."""
        changes = self.models.unpublished() or self.models.misfits() or self._letters or self._misplaced
        return bool(changes or self._next_offset() != self.committed)

    async def publish(self) -> None:
        """Publishes new versions of all models that learned, dead letters and the consumed offset together.

        Raises:
            ProducerFenced: another trainer owns this partition now; nothing was published.
            KafkaError, OSError: only the log knows whether it was published; open the partition again.
        """
        assert self._producer is not None
        if not self.unpublished:
            return
        offset = self._next_offset()
        started = time.monotonic()
        versions = await self.context.in_thread(self.models.next_versions, self.position)
        misfits = self.models.misfits()
        letters = self._letters + [
            self._misfit_letter(learner.model_id, it) for learner, its in misfits for it in its if it.value
        ]
        self._letters = []
        misplaced, self._misplaced = self._misplaced, []
        stepped = time.monotonic()
        saving = asyncio.ensure_future(self.context.in_thread(self.models.save_optimizers, versions))
        try:
            async with asyncio.timeout(PUBLISH_TIMEOUT_S):
                await self._publish_transaction(versions, letters, misplaced, offset)
        except ProducerFenced:
            raise
        except Exception:
            # An open transaction blocks all readers of the weights until it times out.
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
            self.context.metrics.published(snapshot.manifest)
        for learner, its in misfits:
            await self.context.in_thread(learner.replay.remove, its)
            self.context.metrics.misfit(learner.model_id, sum(bool(it.value) for it in its))
        self.context.metrics.publish_seconds.observe(self.last_publish - stepped)
        self.context.metrics.flush_seconds.observe(stepped - started)
        self.models.unload()

    async def _publish_transaction(
        self,
        versions: Sequence[Version],
        letters: Sequence[KeyedLetter],
        misplaced: Sequence[tuple[str, Any]],
        offset: int,
    ) -> None:
        producer, settings = self._producer, self.settings
        assert producer is not None
        await producer.begin_transaction()
        await publish_all(producer, settings, [(snapshot, resume) for _, snapshot, resume in versions])
        for _, snapshot, _ in versions:
            await delete(producer, self._overwritten(snapshot.manifest))
        topic = Topics.of(settings).dead_letters
        sent = [await producer.send(topic, letter.to_bytes(), key=key) for key, letter in letters]
        for model_id, record in misplaced:
            partition = partition_of(model_id, self._partitions)
            its = {"key": model_id.encode(), "headers": [*record.headers], "partition": partition}
            sent.append(await producer.send(self.tp.topic, record.value, **its))
        await asyncio.gather(*sent)
        await producer.send_offsets_to_transaction({self.tp: offset}, settings.trainer_group)
        await producer.commit_transaction()

    def _overwritten(self, manifest: WeightsManifest) -> list[Tombstone]:
        """Chunks on the weights topic in its slot, from before there were payloads."""
        slot = manifest.version % (self.settings.weights_kept + SPARE_SLOTS)
        return self.context.follower.versions.chunks_beside(manifest.model_id, slot)

    def _next_offset(self) -> int:
        return min([self.position, *self.paused.values()])

    # --- operator commands ----------------------------------------------------------------------------------

    async def apply_control(self, model_id: str) -> None:
        """Applies the model's operator commands; does nothing for a model of another partition."""
        if not self.owns(model_id):
            return
        control = self.context.controls.of(model_id)
        if control.forget:
            await self._forget(model_id)
            return
        rollback = control.rollback
        if rollback is not None and self._is_pending(model_id, rollback):
            learner = await self._load(model_id.encode())
            if learner is not None:
                await self._roll_back(learner, rollback)
                self.models.unload()
        if control.training_paused:
            learner = self.models.discard(model_id)
            if learner is not None and learner.first_unpublished is not None:
                # Publishing it could overwrite the pinned version. Learned again when training resumes.
                self.paused.setdefault(model_id, learner.first_unpublished)
        elif model_id in self.paused:
            self.position = self.paused.pop(model_id)
            self._consumer.seek(self.tp, self.position)
            log.info("training resumed", model_id=model_id, offset=self.position)

    async def _forget(self, model_id: str) -> None:
        """Deletes all that is known of a model; its next experience starts it anew.

        Redis first: after a crash in between, the command is still there, and is carried out again.
        """
        producer, follower = self._producer, self.context.follower
        assert producer is not None
        self.paused.pop(model_id, None)
        self._refused_rollbacks.pop(model_id, None)
        await self.models.forget(model_id, self.position)
        async with asyncio.timeout(PUBLISH_TIMEOUT_S), producer.transaction():
            await delete(producer, follower.versions.tombstones(model_id))
            await publish_forgotten(producer, self.settings, model_id)
        await follower.catch_up()
        await self.context.controls.catch_up()
        log.warning("model forgotten", model_id=model_id)

    def _is_pending(self, model_id: str, rollback: Rollback) -> bool:
        """Whether a rollback has yet to be done; refuses it if its version is not kept. Loads no model."""
        learner, follower = self.models.get(model_id), self.context.follower
        if learner is not None:
            done = learner.resume.control_offset
        else:
            newest = follower.versions.get(model_id)
            published = Resume.control_offset_in(newest.resume) if newest else -1
            done = max(published, self._refused_rollbacks.get(model_id, -1))
        if done >= rollback.offset:
            return False
        kept = [m.version for m in follower.history(model_id)]
        if rollback.version in kept:
            return True
        why = f"version {rollback.version} is not kept; kept are: {kept or 'none'}"
        self._refuse_rollback(model_id, rollback, why)
        return False

    def _refuse_rollback(self, model_id: str, rollback: Rollback, why: str) -> None:
        self.context.metrics.refused.labels("rollback").inc()
        log.error("rollback refused", model_id=model_id, why=why)
        learner = self.models.get(model_id)
        if learner is not None:  # recorded in its next version
            learner.resume.control_offset = rollback.offset
        else:
            self._refused_rollbacks[model_id] = rollback.offset

    async def _roll_back(self, learner: ModelLearner, rollback: Rollback) -> None:
        try:
            old = await self.context.follower.fetch(learner.model_id, rollback.version)
            await self.context.in_thread(learner.roll_back, old, rollback.offset)
        except WeightsError as error:
            self._refuse_rollback(learner.model_id, rollback, str(error))
            return
        await self.publish()
        log.warning("rolled back", model_id=learner.model_id, to=rollback.version, as_version=learner.version)


def _experience(record: Any) -> ExperienceEvent:
    """Decodes a record of the experiences topic.

    Raises:
        InputError: it is not an experience, or its key is of another model.
    """
    event = parse(ExperienceEvent, record.value)
    if record.key and event.interaction.model_id.encode() != record.key:
        raise InputError(
            f"the key is of model {record.key.decode()!r}, the experience of {event.interaction.model_id!r}"
        )
    return event
