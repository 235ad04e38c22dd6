"""Reads the input of an audit: topics, replay, weights. Joins no consumer group and changes nothing."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

import redis.asyncio
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from pydantic import ValidationError

from cortex_core.errors import CortexError, InputError, UnavailableError
from cortex_core.requirements import Requirements
from cortex_core.weights import WeightsManifest
from streams.audit.evidence import Evidence, Experience, Interaction, Key, Published, Reply, Version
from streams.connections import async_redis_client, kafka_client_options
from streams.events import DeadLetter, ExperienceEvent, InteractionEvent, ReplyEvent, parse, version_of
from streams.forgotten import Forgotten, read_forgotten
from streams.kafka.clients import started
from streams.kafka.groups import committed_offsets
from streams.kafka.reader import reading, records_to_end
from streams.kafka.topics import Topics
from streams.replay_fit import architecture_key
from streams.replay_store import CHUNK, ReplayKeys, decode
from streams.weights.records import MANIFEST, decode_key

if TYPE_CHECKING:
    from streams.settings import Settings

GRACE_S = 60.0

Position = tuple[str, int, int]
"""Topic, partition, offset."""


async def collect(settings: Settings) -> Evidence:
    """Reads everything, also while workers run.

    Args:
        settings: resolved, with the join window and the replay capacity of the workers.

    Raises:
        UnavailableError: a topic does not exist, or Kafka stopped sending.
        KafkaError, redis.RedisError, OSError: a server does not answer.
    """
    topics = Topics.of(settings)
    evidence = Evidence(
        settings.join_window_s,
        settings.replay_capacity,
        started=time.time(),
        grace_s=min(GRACE_S, settings.join_window_s / 4),
    )
    # Inputs are read last, so that they include the events of all outputs.
    committed = await _committed(settings)
    forgotten = await read_forgotten(settings)
    letters: set[Position] = set()
    async for record in _records(settings, topics.dead_letters):
        try:
            letter = parse(DeadLetter, record.value)
        except InputError:
            continue
        letters.add((letter.topic, letter.partition, letter.offset))
        if letter.topic == topics.experiences:
            evidence.misfits |= _keys(letter)
    fits: dict[str, Requirements] = {}
    async with async_redis_client(settings) as client:
        await _replay(settings, client, evidence, fits)
    async for record in _records(settings, topics.experiences):
        _published(record, letters, evidence, fits, forgotten=forgotten)
    evidence.models_forgotten = (await read_forgotten(settings)).models
    async for record in _records(settings, topics.weights):
        if version := _version(record):
            evidence.versions.append(version)
    async with reading(settings, [topics.interactions, topics.replies]) as consumer:
        starts = await consumer.beginning_offsets(sorted(consumer.assignment()))
        truncated = {tp for tp, offset in starts.items() if offset > 0}
        async for record in records_to_end(consumer, settings):
            tp = TopicPartition(record.topic, record.partition)
            if tp in truncated:
                evidence.retained_since = max(evidence.retained_since, record.timestamp / 1000)
                truncated.remove(tp)
            is_committed = record.offset < committed.get(tp, 0)
            _event(record, is_committed, letters, evidence, topics=topics, forgotten=forgotten)
        if truncated:  # partitions whose records have all been deleted
            evidence.retained_since = evidence.started
    return evidence


async def _committed(settings: Settings) -> dict[TopicPartition, int]:
    """The joiners' committed offsets."""
    async with started(AIOKafkaAdminClient(**kafka_client_options(settings))) as admin:
        missing = {spec.name for spec in Topics.of(settings).specs()} - set(await admin.list_topics())
        if missing:
            raise UnavailableError(
                f"{', '.join(sorted(missing))} do not exist at {settings.kafka_address}: set "
                "CORTEX_TOPIC_PREFIX to that of the workers"
            )
        return await committed_offsets(admin, settings.joiner_group)


async def _records(settings: Settings, topic: str) -> AsyncIterator[Any]:
    async with reading(settings, [topic]) as consumer:
        async for record in records_to_end(consumer, settings):
            yield record


def _event(
    record: Any,
    committed: bool,
    letters: set[Position],
    evidence: Evidence,
    *,
    topics: Topics,
    forgotten: Forgotten,
) -> None:
    evidence.uncommitted += not committed
    position = (record.topic, record.partition, record.offset)
    if position in letters:
        evidence.refused += 1
        return
    arrived = record.timestamp / 1000
    try:
        event = (
            parse(ReplyEvent, record.value)
            if record.topic == topics.replies
            else parse(InteractionEvent, record.value)
        )
    except InputError:
        if committed:
            evidence.unreadable.append(f"{record.topic}-{record.partition} @{record.offset}")
        return
    if forgotten.has(event.conversation_id, event.occurred_at.timestamp(), arrived):
        evidence.forgotten += 1
    elif isinstance(event, ReplyEvent):
        evidence.replies.append(Reply.of(event, arrived, committed))
    else:
        evidence.interactions.append(Interaction.of(event, arrived, committed))


def _keys(letter: DeadLetter) -> set[Key]:
    """The experience in a trainer's dead letter, if it is one."""
    try:
        it = parse(ExperienceEvent, base64.b64decode(letter.raw)).interaction
    except ValueError:
        return set()
    return {(it.model_id, it.interaction_id)}


def _published(
    record: Any,
    letters: set[Position],
    evidence: Evidence,
    fits: Mapping[str, Requirements],
    *,
    forgotten: Forgotten,
) -> None:
    position = (record.topic, record.partition, record.offset)
    try:
        event = parse(ExperienceEvent, record.value)
        experience = Experience.of(event, version_of(record.headers, event.revision))
    except InputError:
        if position not in letters:
            evidence.inconsistent.append(f"{record.topic}-{record.partition} @{record.offset}")
        return
    if forgotten.has(event.interaction.conversation_id, experience.at, record.timestamp / 1000):
        return
    if experience.model_id in fits:
        try:
            fits[experience.model_id].check_entry(event.to_entry())
        except InputError:
            evidence.misfits.add(experience.key)
    if known := evidence.published.get(experience.key):
        known.add(experience)
    else:
        evidence.published[experience.key] = Published.of(experience)


def _version(record: Any) -> Version | None:
    """The version of a manifest, 0 of a deleted one; None for chunks and records that followers refuse."""
    try:
        model_id, _, part = decode_key(record.key)
        if part != MANIFEST:
            return None
        if record.value is None:
            return Version(model_id, 0, None, 0, {})
        return Version.of(WeightsManifest.model_validate_json(record.value))
    except (CortexError, ValidationError, RecursionError):
        return None


async def _replay(
    settings: Settings, client: redis.asyncio.Redis, evidence: Evidence, fits: dict[str, Requirements]
) -> None:
    """
    Args:
        fits: gets the requirements of each model whose architecture is known.
    """
    models: Any = await client.smembers(ReplayKeys(settings.topic_prefix, "").models)
    for model_id in sorted(name.decode() for name in models):
        keys = ReplayKeys(settings.topic_prefix, model_id)
        architecture: Any = await client.get(architecture_key(settings.topic_prefix, model_id))
        if architecture is not None:
            fits[model_id] = Requirements.of(json.loads(architecture))
        both = client.pipeline(transaction=True)
        both.zrange(keys.order, 0, -1, withscores=True)
        both.hlen(keys.entries)
        order, count = await both.execute()
        if count != len(order):
            evidence.inconsistent.append(f"{keys.entries} ({count} entries, {len(order)} in {keys.order})")
        for start in range(0, len(order), CHUNK):
            chunk = order[start : start + CHUNK]
            values: Any = await client.hmget(keys.entries, [entry_id for entry_id, _ in chunk])
            for (entry_id, score), value in zip(chunk, values, strict=True):
                _entry(keys, entry_id.decode(), score, value, evidence)


def _entry(keys: ReplayKeys, entry_id: str, score: float, value: bytes | None, evidence: Evidence) -> None:
    if value is None:
        return  # evicted between the two reads
    version, body = decode(value)
    if b'"interaction":{' not in body:
        return  # added by another tool, without an interaction
    try:
        experience = Experience.of(parse(ExperienceEvent, body), version)
    except InputError:
        evidence.inconsistent.append(f"{entry_id} in {keys.entries}")
        return
    if experience.key != (keys.model_id, entry_id) or experience.at != score:
        evidence.inconsistent.append(f"{entry_id} in {keys.entries}")
    evidence.stored[keys.model_id, entry_id] = experience
