"""What the demo sees of the system from outside: topics, replay and the inference workers' answers.

It only reads. What it makes of it stands in `measures.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import httpx
import orjson
from aiokafka import AIOKafkaConsumer, TopicPartition

from streams.connections import kafka_client_options
from streams.demo.measures import ExperienceSeen, VersionSeen
from streams.inference.api import ModelDetail
from streams.kafka.clients import started
from streams.kafka.topics import MAX_RECORD_BYTES, Topics
from streams.settings import Settings

POLL_S = 0.5


@contextlib.asynccontextmanager
async def _reader(
    settings: Settings, topics: Iterable[str]
) -> AsyncIterator[tuple[AIOKafkaConsumer, list[TopicPartition]]]:
    """A consumer without a group on all partitions of the topics."""
    consumer = AIOKafkaConsumer(
        **kafka_client_options(settings),
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        max_partition_fetch_bytes=MAX_RECORD_BYTES,
    )
    async with started(consumer):
        partitions = []
        for topic in topics:
            numbers = consumer.partitions_for_topic(topic) or await _partitions(consumer, topic)
            partitions += [TopicPartition(topic, n) for n in sorted(numbers)]
        consumer.assign(partitions)
        yield consumer, partitions


async def _partitions(consumer: AIOKafkaConsumer, topic: str) -> set[int]:
    consumer._client.add_topic(topic)
    await consumer._client.force_metadata_update()
    return consumer.partitions_for_topic(topic) or set()


async def end_offsets(settings: Settings, *topics: str) -> dict[TopicPartition, int]:
    """The next offset of every partition of the topics."""
    async with _reader(settings, topics) as (consumer, partitions):
        ends: dict[TopicPartition, int] = await consumer.end_offsets(partitions)
        return ends


async def ids_logged(
    settings: Settings, since: Mapping[TopicPartition, int], conversations: str
) -> frozenset[str]:
    """Ids of all interactions and replies in their topics, from the given offsets to the end.

    Args:
        since: first offset to read of each partition.
        conversations: what the ids of the conversations wanted begin with.
    """
    topics = Topics.of(settings)
    names = {topics.interactions: "interaction_id", topics.replies: "reply_id"}
    found: set[str] = set()
    async with _reader(settings, names) as (consumer, partitions):
        ends = await consumer.end_offsets(partitions)
        for partition in partitions:
            consumer.seek(partition, since.get(partition, 0))
        while any([await consumer.position(p) < ends[p] for p in partitions]):
            for partition, records in (await consumer.getmany(timeout_ms=500)).items():
                for record in records:
                    if (record.key or b"").startswith(conversations.encode()):
                        found.add(orjson.loads(record.value)[names[partition.topic]])
    return frozenset(found)


class ExperienceReader:
    """Reads every experience of one model, as they come.

    async with ExperienceReader(settings, model_id) as reader:
        reader.seen
    """

    def __init__(self, settings: Settings, model_id: str) -> None:
        self.settings = settings
        self.topic = Topics.of(settings).experiences
        self.seen: list[ExperienceSeen] = []
        self.reply_ids: set[str] = set()
        """Replies that stand behind some experience."""
        self._key = model_id.encode()
        self._stack = contextlib.AsyncExitStack()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> ExperienceReader:
        consumer, partitions = await self._stack.enter_async_context(_reader(self.settings, [self.topic]))
        for partition, offset in (await consumer.end_offsets(partitions)).items():
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
            revision=value["revision"],
            reply_ids=tuple(value.get("reply_ids", ())),
            replied_at=datetime.fromisoformat(replied_at) if replied_at else None,
            digest=hashlib.blake2b(record.value, digest_size=16).hexdigest(),
        )
        self.seen.append(seen)
        self.reply_ids.update(seen.reply_ids)


@dataclass(slots=True)
class WorkerSeen:
    """One inference worker, as it describes a model."""

    name: str
    url: str
    version: int = 0
    updates: int = 0
    learned: int = 0
    """Experiences and amendments that the served version has learned from."""
    ema_loss: float | None = None
    versions: dict[int, VersionSeen] = field(default_factory=dict)


class WorkerWatch:
    """Asks every inference worker again and again which weights it decides with."""

    def __init__(self, urls: Iterable[str], model_id: str) -> None:
        self.model_id = model_id
        self.workers = [WorkerSeen(f"inference-{n}", url) for n, url in enumerate(urls, 1)]
        self._http = httpx.AsyncClient(timeout=5.0)
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
            await self.look()
            await asyncio.sleep(POLL_S)

    async def look(self) -> None:
        """Asks each worker once; one that does not answer keeps what was known of it."""
        await asyncio.gather(*(self._look_at(worker) for worker in self.workers))

    async def _look_at(self, worker: WorkerSeen) -> None:
        try:
            answer = await self._http.get(f"{worker.url}/v1/models/{self.model_id}")
        except httpx.HTTPError:
            return
        if answer.status_code == 200:
            take(worker, ModelDetail.model_validate_json(answer.content))

    @property
    def newest(self) -> WorkerSeen:
        """The worker that serves the newest version."""
        return max(self.workers, key=lambda w: w.version)


def take(worker: WorkerSeen, model: ModelDetail) -> None:
    """Notes what a worker says of the model."""
    worker.version = model.version
    worker.updates = model.updates
    worker.learned = model.interactions
    worker.ema_loss = model.ema_loss
    for applied in model.versions:
        seen = VersionSeen(applied.version, applied.applied_at, applied.consumed)
        worker.versions.setdefault(applied.version, seen)
