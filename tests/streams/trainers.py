"""Trainers in this process, for tests: torch is loaded once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import redis
from prometheus_client import CollectorRegistry

from cortex_core.weights import WeightsSnapshot
from streams.kafka.topics import create_topics
from streams.replay_store import RedisReplayBuffer
from streams.settings import Settings
from streams.testing import async_wait_for
from streams.trainer.app import DEPENDENCIES
from streams.trainer.consumer import Trainer
from streams.trainer.learner import ModelLearner
from streams.worker import Worker
from tests.streams.experiences import WeightsWatch, committed


def for_trainers(settings: Settings) -> Settings:
    """Settings with four partitions, a group of the test's own, and a session timeout of three seconds."""
    group = f"{settings.topic_prefix}-trainer"
    return settings.model_copy(update={"session_timeout_s": 3.0, "trainer_group": group, "partitions": 4})


def opened(
    settings: Settings,
    model_id: str,
    newest: WeightsSnapshot | None,
    resume: bytes,
    client: redis.Redis,
) -> ModelLearner:
    """The learner of a model on its replay buffer, as a trainer loads it."""
    buffer = RedisReplayBuffer.of(settings, model_id, client)
    return ModelLearner.open(settings, model_id, newest, resume, buffer=buffer, cache=client)


@contextlib.asynccontextmanager
async def watching(settings: Settings) -> AsyncIterator[WeightsWatch]:
    """Creates the topics, and records every version."""
    await create_topics(settings)
    weights = WeightsWatch(settings)
    async with weights.follower:
        yield weights


class Running:
    """A trainer in this process."""

    def __init__(self, settings: Settings) -> None:
        self.registry = CollectorRegistry()
        self.worker = Worker("trainer", settings, DEPENDENCIES)
        self.trainer = Trainer(self.worker, self.registry)

    def count(self, name: str, **labels: str) -> float:
        """Sum of a series over all label sets that hold these labels."""
        return sum(
            sample.value
            for family in self.registry.collect()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def outcomes(self, outcome: str) -> float:
        """Number of experiences with this outcome."""
        return self.count("cortex_trainer_experiences_total", outcome=outcome)

    def partitions(self) -> int:
        """Number of partitions that it owns."""
        return len(self.trainer._owned)

    def loaded(self, model_id: str) -> bool:
        """Whether it has the model in memory."""
        return any(p.models.get(model_id) for p in self.trainer._owned.values())


@contextlib.asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Running]:
    """A trainer that is ready; stopped as by SIGTERM at the end."""
    it = Running(settings)
    task = asyncio.create_task(it.trainer.run())
    try:

        def ready() -> bool:
            assert not task.done(), task.result()
            return not it.worker.missing

        await async_wait_for(ready, "the trainer to be ready")
        yield it
    finally:
        it.worker.stopping.set()  # `stop()` would also set the timer that ends this process
        await task


async def all_committed(settings: Settings, wanted: dict[int, int]) -> None:
    async def reached() -> bool:
        return await committed(settings) == wanted

    await async_wait_for(reached, f"the group to have committed {wanted}", every_s=0.1)
