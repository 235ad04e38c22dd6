"""What tests of service, inference worker and client share: topics read whole, versions published."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import torch
from aiokafka import AIOKafkaProducer

from cortex_core.model import CortexModel
from cortex_core.weights import WeightsSnapshot
from streams.connections import kafka_client_options
from streams.events import InteractionEvent, ReplyEvent, parse
from streams.inference.app import create_app
from streams.inference.service import DEPENDENCIES, Service
from streams.kafka.topics import MAX_RECORD_BYTES, Topics, create_topics
from streams.settings import Settings
from streams.weights.architecture import model_config
from streams.weights.records import publish
from streams.worker import Worker
from tests.streams.kafka_helpers import read_all


async def interactions(settings: Settings) -> list[InteractionEvent]:
    """All interactions in Kafka, in order within a conversation."""
    return [
        parse(InteractionEvent, r.value) for r in await read_all(settings, Topics.of(settings).interactions)
    ]


async def replies(settings: Settings) -> list[ReplyEvent]:
    """All replies in Kafka, in order within a conversation."""
    return [parse(ReplyEvent, r.value) for r in await read_all(settings, Topics.of(settings).replies)]


def version(settings: Settings, number: int, model_id: str = "default") -> WeightsSnapshot:
    """A version of a model whose Situation Encoder is unlike that of any other number."""
    model = CortexModel.create(model_config(settings), model_id)
    chance = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for weights in model.encoder.parameters():
            weights.add_(torch.randn(weights.shape, generator=chance), alpha=0.1)
    return WeightsSnapshot.of(
        model, model_id=model_id, version=number, parent=number - 1 or None, consumed={"x-0": 10 * number}
    )


def decided_by(event: InteractionEvent, model: CortexModel) -> bool:
    """Whether this model gives what the event logged, on nothing but the features in the event."""
    again = model.decide(
        event.message.astype(np.float32),
        event.history.astype(np.float32),
        np.array(event.metadata, dtype=np.float32),
        None,
        rng=seeded(event.interaction_id),
    )
    return bool((again.situation.astype(np.float16) == event.situation).all())


@asynccontextmanager
async def publishing(settings: Settings) -> AsyncIterator[AIOKafkaProducer]:
    """A transactional producer as a trainer has one."""
    await create_topics(settings)
    producer = AIOKafkaProducer(
        **kafka_client_options(settings),
        transactional_id=f"{settings.topic_prefix}-test",
        max_request_size=MAX_RECORD_BYTES,
    )
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


async def publish_versions(settings: Settings, *snapshots: WeightsSnapshot) -> None:
    """Publishes versions, each in its own transaction."""
    async with publishing(settings) as producer:
        for snapshot in snapshots:
            async with producer.transaction():
                await publish(producer, settings, snapshot)


@asynccontextmanager
async def served(settings: Settings) -> AsyncIterator[tuple[Service, httpx.AsyncClient]]:
    """A service that is ready, and an HTTP client of its application in this process."""
    service = Service(settings)
    app = create_app(service, Worker("inference", settings, DEPENDENCIES))
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as http:
        try:
            await service.start()
            yield service, http
        finally:
            await service.stop()


@asynccontextmanager
async def listening(settings: Settings) -> AsyncIterator[str]:
    """The url of a service that is ready, on a real socket of this process."""
    service, worker = Service(settings), Worker("inference", settings, DEPENDENCIES)
    try:
        async with worker.serving(create_app(service, worker)) as port:
            await service.start()
            yield f"http://127.0.0.1:{port}"
    finally:
        await service.stop()


def seeded(interaction_id: str) -> np.random.Generator:
    """The chance that a decision with this id meets."""
    digest = hashlib.blake2b(interaction_id.encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def body(**fields: Any) -> dict[str, Any]:
    """A usable decide request with these fields on top."""
    return {"conversation_id": "c-1", "message": "How do I deploy billing?"} | fields


def raw(**fields: Any) -> bytes:
    """The same as bytes, with NaN and Infinity as Python writes them."""
    return json.dumps(body(**fields)).encode()


JSON = {"Content-Type": "application/json"}
