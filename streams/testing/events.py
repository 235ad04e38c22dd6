"""Creates and sends valid events, small by default and different for each id."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from aiokafka import AIOKafkaProducer

from streams.events import Event, InteractionEvent, ReplyEvent
from streams.kafka.clients import started
from streams.kafka.topics import MAX_RECORD_BYTES, Topics, create_topics
from streams.settings import Settings

Raw = tuple[str, bytes | None, bytes | None]
"""Topic, key, value."""
T0 = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def at(seconds: float) -> datetime:
    """`seconds` after `T0`."""
    return T0 + timedelta(seconds=seconds)


def interaction(
    interaction_id: str,
    conversation_id: str = "c",
    *,
    at_s: float = 0.0,
    occurred_at: datetime | None = None,
    model_id: str = "default",
    dim: int = 4,
    memories: int = 3,
    **changes: Any,
) -> InteractionEvent:
    """A logged decision with two retrieved memories; about 12 KB with `dim=384` and `memories=8`."""
    rng = np.random.default_rng(zlib.crc32(interaction_id.encode()))
    fields: dict[str, Any] = {
        "occurred_at": occurred_at or at(at_s),
        "interaction_id": interaction_id,
        "conversation_id": conversation_id,
        "model_id": model_id,
        "weights_version": 3,
        "message": rng.normal(size=dim),
        "history": rng.normal(size=dim),
        "metadata": [0.5, 1.0],
        "situation": rng.normal(size=dim),
        "memories": rng.normal(size=(memories, dim)),
        "memory_ids": [f"m{i}" for i in range(memories)],
        "memory_scores": [0.9, 0.4][:memories],
        "memory_propensities": [0.5, 0.25][:memories],
        "strategy_id": "step_by_step",
        "strategy_ids": ["quick_answer", "step_by_step"],
        "probabilities": [0.75, 0.25],
        "context": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        "confidence": 0.7,
    }
    return InteractionEvent(**fields | changes)


def reply(
    reply_id: str,
    interaction_id: str | None = None,
    conversation_id: str = "c",
    *,
    at_s: float = 1.0,
    occurred_at: datetime | None = None,
    text: str = "Thanks, that worked!",
    **changes: Any,
) -> ReplyEvent:
    """A reply of kind text; for a rating, pass `kind="rating"`, `rating` and `text=""`."""
    return ReplyEvent(
        occurred_at=occurred_at or at(at_s),
        reply_id=reply_id,
        conversation_id=conversation_id,
        interaction_id=interaction_id,
        text=text,
        **changes,
    )


def to_record(settings: Settings, event: Any) -> Raw:
    """The topic, key and value of an interaction or a reply."""
    topics = Topics.of(settings)
    topic = topics.interactions if isinstance(event, InteractionEvent) else topics.replies
    return topic, event.conversation_id.encode(), event.to_bytes()


async def send(settings: Settings, messages: Iterable[Event | Raw]) -> None:
    """Creates the topics and sends messages, in order for each partition; waits for all acknowledgements."""
    await create_topics(settings)
    producer = AIOKafkaProducer(
        bootstrap_servers=settings.kafka_address,
        enable_idempotence=True,
        max_request_size=MAX_RECORD_BYTES,
    )
    async with started(producer):
        waiting = []
        for message in messages:
            topic, key, value = message if isinstance(message, tuple) else to_record(settings, message)
            waiting.append(await producer.send(topic, value, key=key))
        for one in waiting:
            await one
