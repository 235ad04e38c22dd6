"""Sending and reading events in tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from streams.events import Event, InteractionEvent
from streams.kafka.topics import MAX_RECORD_BYTES, Topics, create_topics
from streams.settings import Settings

Raw = tuple[str, bytes | None, bytes | None]
"""Topic, key, value."""


def addressed(settings: Settings, event: Any) -> Raw:
    """An interaction or a reply with its topic and key."""
    topics = Topics.of(settings)
    topic = topics.interactions if isinstance(event, InteractionEvent) else topics.replies
    return topic, event.conversation_id.encode(), event.to_bytes()


async def send(settings: Settings, messages: Iterable[Event | Raw]) -> None:
    """Sends, in order for each partition; returns when all are acknowledged. Creates the topics."""
    await create_topics(settings)
    producer = AIOKafkaProducer(
        bootstrap_servers=settings.kafka_address,
        enable_idempotence=True,
        max_request_size=MAX_RECORD_BYTES,
    )
    await producer.start()
    try:
        waiting = []
        for message in messages:
            topic, key, value = message if isinstance(message, tuple) else addressed(settings, message)
            waiting.append(await producer.send(topic, value, key=key))
        for one in waiting:
            await one
    finally:
        await producer.stop()


async def read_all(settings: Settings, topic: str) -> list[Any]:
    """Every record of a topic up to its present end."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka_address,
        enable_auto_commit=False,
        max_partition_fetch_bytes=MAX_RECORD_BYTES,
    )
    await consumer.start()
    try:
        await consumer._client.force_metadata_update()
        partitions = [TopicPartition(topic, p) for p in sorted(consumer.partitions_for_topic(topic) or ())]
        if not partitions:
            return []
        ends = await consumer.end_offsets(partitions)
        consumer.assign(partitions)
        await consumer.seek_to_beginning(*partitions)
        records: list[Any] = []
        while [tp for tp in partitions if await consumer.position(tp) < ends[tp]]:
            for its_records in (await consumer.getmany(timeout_ms=200)).values():
                records += its_records
        return records
    finally:
        await consumer.stop()


async def lag(settings: Settings, group: str, topic: str) -> int:
    """Records of a topic that a group has not committed."""
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka_address)
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=settings.kafka_address)
    await admin.start()
    await consumer.start()
    try:
        ends = await consumer.end_offsets(list(consumer.assignment()))
        offsets = await admin.list_consumer_group_offsets(group)
        done = {tp: offset.offset for tp, offset in offsets.items()}
        return sum(end - max(0, done.get(tp, 0)) for tp, end in ends.items())
    finally:
        await consumer.stop()
        await admin.close()
