"""The publisher on a real Kafka: acknowledgements, refusals, and the replacement of a broken producer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from cortex_core.errors import InputError, UnavailableError
from streams.connections import kafka_client_options
from streams.kafka.publisher import MAX_VALUE, Message, Publisher
from streams.kafka.topics import Topics
from streams.settings import Settings
from streams.testing import async_wait_for
from tests.streams.kafka_helpers import read_all

pytestmark = pytest.mark.integration


@asynccontextmanager
async def publisher(settings: Settings) -> AsyncIterator[tuple[Publisher, list[str | None]]]:
    states: list[str | None] = []
    it = Publisher(settings, states.append)
    try:
        await it.start()
        yield it, states
    finally:
        await it.stop()


async def values(settings: Settings) -> list[bytes]:
    return [r.value for r in await read_all(settings, Topics.of(settings).replies)]


async def limit(settings: Settings, size: int) -> None:
    """Limits batches of the replies topic to `size` bytes."""
    admin = AIOKafkaAdminClient(**kafka_client_options(settings))
    await admin.start()
    try:
        resource = ConfigResource(
            ConfigResourceType.TOPIC, Topics.of(settings).replies, {"max.message.bytes": str(size)}
        )
        await admin.alter_configs([resource])
    finally:
        await admin.close()


async def test_acknowledged_events_are_stored_in_order(settings: Settings) -> None:
    topic = Topics.of(settings).replies
    async with publisher(settings) as (it, states):
        assert states == [None]
        sent = [it.begin(topic, b"c", str(i).encode()) for i in range(50)]
        await asyncio.gather(*(it.wait(delivery) for delivery in sent))
        assert await values(settings) == [str(i).encode() for i in range(50)]
        with pytest.raises(InputError, match="at most"):
            it.begin(topic, b"c", b"x" * (MAX_VALUE + 1))
    with pytest.raises(UnavailableError, match="stopping"):
        it.begin(topic, b"c", b"late")


async def test_send_uses_kafka_batches_and_keeps_the_order(settings: Settings) -> None:
    topic = Topics.of(settings).replies
    keys = [b"c", b"d", b"e"]
    async with publisher(settings) as (it, _):
        sizes = [10] * 300 + [3_000_000, 10, 400_000, 400_000, 400_000, 999_990, 10]
        sent = [(keys[n % 3], f"{n} ".encode().ljust(size, b".")) for n, size in enumerate(sizes)]
        await it.send(Message(topic, key, value) for key, value in sent)
        await it.wait(it.begin(topic, b"c", b"alone"))
        await it.send([])
        found = await read_all(settings, topic)
        for key in keys:
            its = [r.value for r in found if r.key == key]
            assert its == [v for k, v in [*sent, (b"c", b"alone")] if k == key]
            assert len({r.partition for r in found if r.key == key}) == 1
        with pytest.raises(InputError, match="at most"):
            await it.send([Message(topic, b"c", b"small"), Message(topic, b"c", b"x" * (MAX_VALUE + 1))])
        assert len(await values(settings)) == len(sent) + 1
    with pytest.raises(UnavailableError, match="stopping"):
        await it.send([Message(topic, b"c", b"late")])


async def test_a_refused_event_affects_no_other(settings: Settings) -> None:
    topic = Topics.of(settings).replies
    async with publisher(settings) as (it, states):
        await it.wait(it.begin(topic, b"c", b"before"))
        await limit(settings, 2_000)

        async def refused() -> str:
            try:
                await it.wait(it.begin(topic, b"c", b"x" * 5_000))
            except (InputError, UnavailableError) as error:  # unavailable while the producer is replaced
                return str(error)
            return ""

        # The broker applies the new limit after a moment.
        said = await async_wait_for(refused, "the broker to refuse")
        assert "MessageSizeTooLargeError" in said
        assert "max.message.bytes" in said
        # The old producer would have a gap in its sequence numbers, and all its batches would be refused.
        await async_wait_for(lambda: it.unavailable is None, "a new producer")
        with pytest.raises(InputError, match=r"max\.message\.bytes"):
            await it.send([Message(topic, b"c", b"x" * 1_500)] * 2)
        await async_wait_for(lambda: it.unavailable is None, "a new producer")
        for i in range(3):
            await it.wait(it.begin(topic, b"c", f"after {i}".encode()))
        assert states[-1] is None
        assert any(states)
        small = [v for v in await values(settings) if len(v) < 100]
        assert small == [b"before", b"after 0", b"after 1", b"after 2"]
