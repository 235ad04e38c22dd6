"""Observes the system from outside: reads topics, and polls the inference workers."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import httpx
import orjson
from aiokafka import AIOKafkaConsumer, TopicPartition
from pydantic import ValidationError

from streams.demo.measures import ExperienceSeen, VersionSeen
from streams.events import version_of
from streams.inference.api import ModelDetail
from streams.kafka.reader import reading, records_to_end
from streams.kafka.topics import Topics
from streams.settings import Settings

POLL_S = 0.5


async def end_offsets(settings: Settings, *topics: str) -> dict[TopicPartition, int]:
    """The next offset of every partition of the topics."""
    async with reading(settings, topics) as consumer:
        ends: dict[TopicPartition, int] = await consumer.end_offsets(sorted(consumer.assignment()))
        return ends


async def ids_logged(
    settings: Settings, since: Mapping[TopicPartition, int], conversations: str
) -> frozenset[str]:
    """Ids of all interactions and replies in their topics, from the given offsets to the end.

    Args:
        since: first offset to read in each partition.
        conversations: prefix of the conversation ids.
    """
    topics = Topics.of(settings)
    names = {topics.interactions: "interaction_id", topics.replies: "reply_id"}
    found: set[str] = set()
    async with reading(settings, names) as consumer:
        for partition in consumer.assignment():
            consumer.seek(partition, since.get(partition, 0))
        async for record in records_to_end(consumer, settings):
            if (record.key or b"").startswith(conversations.encode()):
                found.add(orjson.loads(record.value)[names[record.topic]])
    return frozenset(found)


class ExperienceReader:
    """Reads all experiences of one model as they arrive.

        async with ExperienceReader(settings, model_id) as reader:
            print(len(reader.seen))

    It begins at the end of the topic as it is on entering.
    """

    def __init__(self, settings: Settings, model_id: str) -> None:
        self.settings = settings
        self.topic = Topics.of(settings).experiences
        self.seen: list[ExperienceSeen] = []
        self.reply_ids: set[str] = set()
        """Ids of all replies that an experience includes."""
        self._key = model_id.encode()
        self._stack = contextlib.AsyncExitStack()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> ExperienceReader:
        consumer = await self._stack.enter_async_context(reading(self.settings, [self.topic]))
        for partition, offset in (await consumer.end_offsets(sorted(consumer.assignment()))).items():
            consumer.seek(partition, offset)
        self._task = asyncio.create_task(self._read(consumer))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._stack.aclose()

    async def _read(self, consumer: AIOKafkaConsumer) -> None:
        while True:
            for partition, records in (await consumer.getmany(timeout_ms=200)).items():
                for record in records:
                    if record.key == self._key:
                        self._add(partition.partition, record)

    def _add(self, partition: int, record: Any) -> None:
        value = orjson.loads(record.value)
        replied_at = value.get("replied_at")
        seen = ExperienceSeen(
            partition=partition,
            offset=record.offset,
            interaction_id=value["interaction"]["interaction_id"],
            version=version_of(record.headers, value["revision"]),
            revision=value["revision"],
            reply_ids=tuple(value.get("reply_ids", ())),
            replied_at=datetime.fromisoformat(replied_at) if replied_at else None,
            digest=hashlib.blake2b(record.value, digest_size=16).hexdigest(),
        )
        self.seen.append(seen)
        self.reply_ids.update(seen.reply_ids)


@dataclass(slots=True)
class WorkerState:
    """The state of a model in one inference worker."""

    name: str
    url: str
    version: int = 0
    updates: int = 0
    learned: int = 0
    """Experiences and amendments that the served version has learned from."""
    ema_loss: float | None = None
    versions: dict[int, VersionSeen] = field(default_factory=dict)


class WorkerWatch:
    """Polls every inference worker for the weights version that it serves."""

    def __init__(self, settings: Settings, urls: Iterable[str], model_id: str) -> None:
        self.model_id = model_id
        self.workers = [WorkerState(f"inference-{n}", url) for n, url in enumerate(urls, 1)]
        self._http = httpx.AsyncClient(timeout=5.0, headers=settings.authorization)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> WorkerWatch:
        self._task = asyncio.create_task(self._poll())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._http.aclose()

    async def _poll(self) -> None:
        while True:
            await self.poll_once()
            await asyncio.sleep(POLL_S)

    async def poll_once(self) -> None:
        """Polls each worker once; a worker that does not answer keeps its last state."""
        await asyncio.gather(*(self._poll_worker(worker) for worker in self.workers))

    async def _poll_worker(self, worker: WorkerState) -> None:
        # No answer, or one of something else that listens on the port: the worker keeps its last state.
        with contextlib.suppress(httpx.HTTPError, ValidationError):
            answer = await self._http.get(f"{worker.url}/v1/models/{self.model_id}")
            if answer.status_code == 200:
                update(worker, ModelDetail.model_validate_json(answer.content))

    @property
    def newest(self) -> WorkerState:
        """The worker that serves the newest version."""
        return max(self.workers, key=lambda w: w.version)


def update(worker: WorkerState, model: ModelDetail) -> None:
    """Updates a worker's state from its answer."""
    worker.version = model.version
    worker.updates = model.updates
    worker.learned = model.interactions
    worker.ema_loss = model.ema_loss
    for applied in model.versions:
        seen = VersionSeen(applied.version, applied.applied_at, applied.consumed)
        worker.versions.setdefault(applied.version, seen)
