"""What tests of service, inference worker and client share: topics read whole, versions published."""

from __future__ import annotations

import asyncio
import contextlib
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
    worker = Worker("inference", settings, DEPENDENCIES)
    service = Service(settings, worker.report)
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


async def exchange(url: str, *parts: bytes) -> bytes:
    """What the server at this url sends, until it closes the connection, after these bytes."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
        return await reader.read()
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


ANSWER = {
    "interaction_id": "i",
    "conversation_id": "c",
    "model_id": "default",
    "weights_version": 3,
    "strategy": {
        "id": "quick_answer",
        "name": "Quick",
        "description": "",
        "prompt_framing": "",
        "reasoning_style": "direct",
        "response_format": "prose",
        "tool_permissions": ["read"],
    },
    "probabilities": {"quick_answer": 1.0},
    "memories": [],
    "confidence": 0.9,
    "action": "proceed",
}


@asynccontextmanager
async def scripted(
    *statuses: int, retry_after: str | None = None
) -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
    """A server that gives these statuses in turn, the last one for ever; 0 cuts the connection.

    It keeps the bodies that it was sent. Errors have this header Retry-After.
    """
    bodies: list[dict[str, Any]] = []
    ended: list[asyncio.Event] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ended.append(end := asyncio.Event())
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
                bodies.append(json.loads(await reader.readexactly(int(lines[b"content-length"]))))
                status = statuses[min(len(bodies), len(statuses)) - 1]
                if not status:
                    break
                error = {"error": {"type": "x", "message": f"said {status}"}}
                content = json.dumps(ANSWER if status == 200 else error).encode()
                pause = f"Retry-After: {retry_after}\r\n" if retry_after and status >= 400 else ""
                answer_head = f"HTTP/1.1 {status} x\r\n{pause}Content-Length: {len(content)}\r\n\r\n"
                writer.write(answer_head.encode() + content)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
            end.set()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", bodies
        await asyncio.gather(*(end.wait() for end in ended))
