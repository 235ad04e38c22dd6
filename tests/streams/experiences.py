"""Experiences as a joiner publishes them, and the results that a trainer publishes."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import numpy as np
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient

from cortex_core.arrays import DoubleArray
from cortex_core.metadata import METADATA_KEYS
from cortex_core.strategy_registry import StrategyRegistry
from cortex_core.weights import WeightsManifest
from streams.connections import kafka_client_options, redis_client
from streams.events import DeadLetter, ExperienceEvent, InteractionEvent, parse, version_header
from streams.kafka.clients import started
from streams.kafka.follower import TopicFollower
from streams.kafka.groups import committed_offsets
from streams.kafka.topics import Topics, partition_of
from streams.replay_store import RedisReplayBuffer, ReplayWrite
from streams.settings import Settings
from streams.testing import async_wait_for
from streams.weights.records import MANIFEST, decode_key
from tests.streams.kafka_helpers import read_all

DIM = 384
START = datetime(2026, 1, 1, tzinfo=UTC)


def experience(
    name: str, *, model_id: str = "m", revision: int = 1, reward: float = 0.8, **changes: Any
) -> ExperienceEvent:
    """An experience with every feature; the same name gives the same features."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))

    def unit(*shape: int) -> DoubleArray:
        vectors = rng.normal(size=(*shape, DIM))
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        return vectors

    strategies = list(StrategyRegistry().ids)
    occurred_at = START + timedelta(milliseconds=int(rng.integers(1_000_000)))
    message = unit()
    interaction: dict[str, Any] = {
        "interaction_id": name,
        "conversation_id": f"c-{name}",
        "model_id": model_id,
        "weights_version": 0,
        "occurred_at": occurred_at,
        "message": message,
        "history": unit(),
        "metadata": [0.0] * len(METADATA_KEYS),
        "situation": message,
        "memories": unit(4),
        "memory_ids": ["a", "b", "c", "d"],
        "memory_scores": [0.5, 0.4],
        "memory_propensities": [0.5, 0.5],
        "strategy_id": strategies[int(rng.integers(len(strategies)))],
        "strategy_ids": strategies,
        "probabilities": [1 / len(strategies)] * len(strategies),
        "context": [0.5] * 7,
        "confidence": 0.5,
    }
    return ExperienceEvent(
        occurred_at=occurred_at,
        interaction=InteractionEvent(**interaction | changes),
        revision=revision,
        outcome="reply" if revision else "no_reply",
        reward=reward if revision else 0.0,
        reply_ids=[f"r-{name}-{i}" for i in range(revision)],
        replied_at=occurred_at + timedelta(seconds=1) if revision else None,
    )


def remember(settings: Settings, events: Iterable[ExperienceEvent]) -> None:
    """Adds them to replay, as the joiner does before it publishes them."""
    with redis_client(settings) as client:
        for event in events:
            buffer = RedisReplayBuffer.of(settings, event.interaction.model_id, client)
            at, name = event.occurred_at.timestamp(), event.interaction.interaction_id
            buffer.write([ReplayWrite(name, at, event.revision, event.to_bytes())])


async def publish_experiences(
    settings: Settings, events: Iterable[ExperienceEvent], *, every_s: float = 0.0
) -> None:
    """Adds experiences to replay, then sends them, in order."""
    producer = AIOKafkaProducer(**kafka_client_options(settings), enable_idempotence=True)
    await producer.start()
    try:
        for event in events:
            await asyncio.to_thread(remember, settings, [event])
            await producer.send_and_wait(
                Topics.of(settings).experiences,
                event.to_bytes(),
                key=event.interaction.model_id.encode(),
                headers=version_header(event.revision),
            )
            if every_s:
                await asyncio.sleep(every_s)
    finally:
        await producer.stop()


async def send_raw(
    settings: Settings,
    key: bytes | None,
    value: bytes | None,
    partition: int | None = None,
    headers: Sequence[tuple[str, bytes]] = (),
) -> None:
    """Sends any bytes to the experiences topic."""
    producer = AIOKafkaProducer(**kafka_client_options(settings))
    await producer.start()
    try:
        topic = Topics.of(settings).experiences
        await producer.send_and_wait(topic, value, key=key, partition=partition, headers=[*headers])
    finally:
        await producer.stop()


class WeightsWatch:
    """Records every version by model, in the order of the log."""

    def __init__(self, settings: Settings) -> None:
        self.seen: dict[str, list[WeightsManifest]] = {}
        self.follower = TopicFollower(settings, Topics.of(settings).weights, self._note)

    async def _note(self, records: list[Any]) -> None:
        for record in records:
            model_id, _, part = decode_key(record.key)
            if part == MANIFEST and record.value is not None:
                manifest = WeightsManifest.model_validate_json(record.value)
                self.seen.setdefault(model_id, []).append(manifest)

    def newest(self, model_id: str = "m") -> WeightsManifest:
        """The newest version; there must be one."""
        return self.seen[model_id][-1]

    async def learned(self, interactions: int, model_id: str = "m") -> None:
        """Waits until the newest version has learned from so many experiences."""
        await async_wait_for(
            lambda: model_id in self.seen and self.newest(model_id).interactions >= interactions,
            f"{model_id} to have learned from {interactions} experiences",
        )

    async def check(self) -> None:
        """Checks that versions are consecutive, and that none has learned less than its parent."""
        await self.follower.catch_up()
        for manifests in self.seen.values():
            assert [m.version for m in manifests] == list(range(1, len(manifests) + 1))
            for before, after in pairwise(manifests):
                assert after.parent == before.version
                assert after.interactions >= before.interactions
                assert all(after.consumed[p] >= o for p, o in before.consumed.items())


async def dead_letters(settings: Settings) -> list[DeadLetter]:
    """Every dead letter."""
    records = await read_all(settings, Topics.of(settings).dead_letters)
    return [parse(DeadLetter, r.value) for r in records]


async def committed(settings: Settings) -> dict[int, int]:
    """The trainers' committed offset of each partition that has one."""
    async with started(AIOKafkaAdminClient(**kafka_client_options(settings))) as admin:
        offsets = await committed_offsets(admin, settings.trainer_group)
    return {tp.partition: offset for tp, offset in offsets.items()}


def ends(settings: Settings, events: Iterable[ExperienceEvent]) -> dict[int, int]:
    """The end offset of each partition of a topic with exactly these experiences."""
    out: dict[int, int] = {}
    for event in events:
        p = partition_of(event.interaction.model_id, settings.partitions)
        out[p] = out.get(p, 0) + 1
    return out
