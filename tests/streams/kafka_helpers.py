"""Reading topics whole, and a group's lag, in tests."""

from __future__ import annotations

from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient

from streams.kafka.topics import MAX_RECORD_BYTES
from streams.settings import Settings


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
