"""Reading topics whole, and a group's lag, in tests."""

from __future__ import annotations

from typing import Any

from aiokafka.admin import AIOKafkaAdminClient

from streams.kafka.reader import reading, records_to_end
from streams.settings import Settings


async def read_all(settings: Settings, topic: str) -> list[Any]:
    """Every committed record of a topic up to its present end, in order within a partition."""
    async with reading(settings, [topic]) as consumer:
        return [record async for record in records_to_end(consumer, settings)]


async def lag(settings: Settings, group: str, topic: str) -> int:
    """Records of a topic that a group has not committed."""
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka_address)
    await admin.start()
    try:
        async with reading(settings, [topic], committed_only=False) as consumer:
            ends = await consumer.end_offsets(sorted(consumer.assignment()))
        offsets = await admin.list_consumer_group_offsets(group)
        return sum(end - max(0, offsets[tp].offset if tp in offsets else 0) for tp, end in ends.items())
    finally:
        await admin.close()
