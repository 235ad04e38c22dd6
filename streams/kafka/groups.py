"""A consumer group's committed offsets, read without joining the group."""

from __future__ import annotations

from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from streams.connections import backoff


async def committed_offsets(admin: AIOKafkaAdminClient, group: str) -> dict[TopicPartition, int]:
    """The group's committed offset of each partition; partitions without one are left out.

    Raises:
        KafkaError, OSError: the broker does not answer.
    """
    async for attempt in backoff():
        try:
            await admin.find_coordinator(group)
            break
        except KafkaError as error:
            # A new broker first creates the topic for the groups' offsets.
            if not error.retriable or attempt == 20:
                raise
    offsets = await admin.list_consumer_group_offsets(group)
    return {partition: at.offset for partition, at in offsets.items() if at.offset >= 0}
