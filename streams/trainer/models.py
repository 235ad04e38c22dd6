"""The models of one partition that are in memory: loading, the next version of each, unloading.

A model takes some megabytes, and a partition can have any number of models: the least recently used are
unloaded once they are published. `streams.trainer.partition` publishes them.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import redis
import structlog

from cortex_core.errors import CortexError, WeightsError
from cortex_core.weights import WeightsSnapshot
from streams.failures import error_text, is_systemic
from streams.replay_store import RedisReplayBuffer
from streams.trainer.context import TrainerContext
from streams.trainer.learner import ModelLearner, optimizer_key
from streams.trainer.replay import Misfit

log = structlog.get_logger(__name__)

Version = tuple[ModelLearner, WeightsSnapshot, bytes]
"""A learner, its next version, and that version's encoded `Resume`."""
MODELS_LOADED = 32
"""Models per partition that stay in memory."""


class LearningError(CortexError):
    """Learning failed, and neither the experience's shape nor an unavailable server is the cause."""

    def __init__(self, offset: int, why: str) -> None:
        super().__init__(f"learning from the experience at offset {offset} failed: {why}")
        self.offset = offset


class LoadedModels:
    """The learners of one partition, by model_id, in order of their last use."""

    def __init__(self, context: TrainerContext, partition: str) -> None:
        """
        Args:
            partition: "topic-partition", as in a manifest's `consumed`.
        """
        self._context = context
        self._partition = partition
        # No LRUCache: a model with unpublished experiences must not be evicted.
        self._learners: OrderedDict[str, ModelLearner] = OrderedDict()
        self.end = 0
        """Offset after the last known record of the partition. What a model has learned up to a later one was
        in a topic of this name that was deleted."""
        self._learned: dict[str, int] = {}
        """Model → offset after the last experience that was learned since the model was loaded."""

    def get(self, model_id: str) -> ModelLearner | None:
        """The model's learner, if it is in memory."""
        return self._learners.get(model_id)

    def ids(self) -> list[str]:
        """Ids of the models in memory."""
        return list(self._learners)

    async def load(self, model_id: str) -> ModelLearner:
        """The model's learner; continues from the newest version if it is not in memory.

        Raises:
            KafkaError, redis.RedisError, OSError: a server does not answer.
        """
        learner = self._learners.get(model_id)
        if learner is None:
            learner = await self._context.follower.use(model_id, partial(self._open, model_id))
            learner = learner or await self._open(model_id, None, b"")
            self._learners[model_id] = learner
        self._learners.move_to_end(model_id)
        return learner

    async def _open(self, model_id: str, newest: WeightsSnapshot | None, resume: bytes) -> ModelLearner:
        settings, cache = self._context.settings, self._context.cache
        buffer = RedisReplayBuffer.of(settings, model_id, cache)
        opening = partial(ModelLearner.open, settings, model_id, newest, resume, buffer=buffer, cache=cache)
        learner: ModelLearner = await self._context.in_thread(opening)
        return learner

    def discard(self, model_id: str) -> ModelLearner | None:
        """Removes a model from memory without publishing it; the learner it had."""
        self._learned.pop(model_id, None)
        return self._learners.pop(model_id, None)

    async def forget(self, model_id: str, position: int) -> None:
        """Removes a model from memory, and its replay and optimizer from Redis.

        Args:
            position: offset of the partition's next experience; the model begins again there.
        """
        self.discard(model_id)
        self._learned[model_id] = position
        settings, cache = self._context.settings, self._context.cache

        def forget() -> None:
            RedisReplayBuffer.of(settings, model_id, cache).forget()
            cache.delete(optimizer_key(settings, model_id))

        await self._context.in_thread(forget)

    def unload(self) -> None:
        """Removes the least recently used models beyond `MODELS_LOADED`, except unpublished ones."""
        for model_id, learner in list(self._learners.items()):
            if len(self._learners) <= MODELS_LOADED:
                return
            newest = self._context.follower.newest(model_id)
            published = newest.version if newest else 0
            if learner.first_unpublished is None and learner.version == published:
                self.discard(model_id)

    def position(self, learner: ModelLearner) -> int:
        """The first offset of this partition that the model has not learned from."""
        learned, consumed = self._learned.get(learner.model_id, 0), learner.consumed.get(self._partition, 0)
        return max(learned, consumed if consumed <= self.end else 0)

    def mark_learned(self, model_id: str, offset: int) -> None:
        """Records that the model has learned from the experience at this offset."""
        self._learned[model_id] = offset + 1

    def unpublished(self) -> list[ModelLearner]:
        """The learners that have something to publish."""
        return [v for v in self._learners.values() if v.first_unpublished is not None or v.reason != "train"]

    def misfits(self) -> list[tuple[ModelLearner, list[Misfit]]]:
        """The entries that were set aside from replay and are still in it, of each model that has some."""
        found = [(v, [*v.replay.set_aside.values()]) for v in self._learners.values()]
        return [(learner, misfits) for learner, misfits in found if misfits]

    def next_versions(self, position: int) -> list[Version]:
        """The next version of each model with unpublished changes. For the learning thread.

        Args:
            position: offset of the partition's next experience.

        Raises:
            LearningError: the last step of a model failed.
        """
        metrics, versions = self._context.metrics, []
        for learner in self.unpublished():
            started = time.monotonic()
            try:
                update = learner.flush()
            except Exception as error:
                if is_systemic(error):
                    raise
                first = learner.first_unpublished
                raise LearningError(position if first is None else first, error_text(error)) from error
            if update is not None:
                metrics.stepped(learner.model_id, update, time.monotonic() - started)
            try:
                consumed = {self._partition: max(position, self.position(learner))}
                highest = self._context.follower.versions.highest(learner.model_id)
                snapshot, resume = learner.next_version(consumed, highest)
            except WeightsError as error:
                # Training restarts from the last version. The experiences since then stay in replay.
                metrics.refused.labels("not_finite").inc()
                log.error("weights not published", model_id=learner.model_id, error=str(error))
                del self._learners[learner.model_id]
                continue
            versions.append((learner, snapshot, resume))
        return versions

    def save_optimizers(self, versions: Sequence[Version]) -> None:
        """Caches the optimizer states. For the learning thread, while the versions are being published."""
        for learner, snapshot, _ in versions:
            try:
                learner.save_optimizer(self._context.cache, snapshot.manifest.version)
            except redis.RedisError as error:
                log.warning("optimizer not cached", model_id=learner.model_id, error=str(error))
