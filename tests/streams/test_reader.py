"""Reading topics without a group, and detecting a stalled client."""

from __future__ import annotations

import pytest
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import UnknownTopicOrPartitionError

from cortex_core.errors import UnavailableError
from streams.connections import kafka_client_options
from streams.kafka import reader
from streams.kafka.reader import EndProbe, Watchdog, reading, records_to_end
from streams.kafka.topics import Topics, create_topics
from streams.settings import Settings


async def test_it_reads_what_is_committed_from_any_offset_to_the_present_end(settings: Settings) -> None:
    await create_topics(settings)
    topic = Topics.of(settings).replies
    first, second = TopicPartition(topic, 0), TopicPartition(topic, 1)
    producer = AIOKafkaProducer(bootstrap_servers=settings.kafka_address, transactional_id=topic)
    await producer.start()
    try:
        async with producer.transaction():
            for n in range(4):
                await producer.send(topic, b"%d" % n, partition=n % 2)
        await producer.begin_transaction()
        await producer.send_and_wait(topic, b"open", partition=0)

        async with reading(settings, [topic]) as consumer:
            assert sorted([r.value async for r in records_to_end(consumer, settings)]) == [
                b"0",
                b"1",
                b"2",
                b"3",
            ]
        async with reading(settings, start={second: 1}) as consumer:
            assert [r.value async for r in records_to_end(consumer, settings)] == [b"3"]
        async with reading(settings, start={first: 2}, committed_only=False) as consumer:
            assert [r.value async for r in records_to_end(consumer, settings)] == [b"open"]
        probe = EndProbe(settings)
        assert await probe.ends([first, second]) == {first: 4, second: 3}  # with the markers of a commit
        await probe.close()
    finally:
        await producer.stop()


async def test_a_topic_that_does_not_exist_is_an_error(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # For so long aiokafka asks again, in case that the topic is new; 15 s would show no more.
    options = kafka_client_options(settings) | {"request_timeout_ms": 1_000}
    monkeypatch.setattr(reader, "kafka_client_options", lambda _: options)
    with pytest.raises(UnknownTopicOrPartitionError):
        async with reading(settings, ["no-such-topic"]):
            pass


async def test_no_records_before_the_end_is_an_error(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "STALL_S", 0.2)
    monkeypatch.setattr(Watchdog.__init__, "__defaults__", (0.2,))
    await create_topics(settings)
    topic = Topics.of(settings).replies
    producer = AIOKafkaProducer(bootstrap_servers=settings.kafka_address)
    await producer.start()
    await producer.send_and_wait(topic, b"never read", partition=0)
    await producer.stop()
    async with reading(settings, [topic]) as consumer:
        consumer.pause(TopicPartition(topic, 0))
        with pytest.raises(UnavailableError, match=topic):
            [record async for record in records_to_end(consumer, settings)]


def test_the_watchdog_names_the_stalled_partitions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("streams.kafka.reader.time.monotonic", lambda: now)
    watchdog: Watchdog[str] = Watchdog(30.0)
    ends = {"moves": 100, "stalls": 100, "is done": 5, "grows": 6}
    for step in range(8):
        now = 5.0 * step
        grows = 6 if step < 5 else 7  # it was at its end until now
        positions = {"moves": step, "stalls": 7, "is done": 5, "grows": 6}
        stalled = watchdog.stalled(positions, ends | {"grows": grows})
        assert stalled == (["stalls"] if now > 30 else [])
    watchdog.reset()
    assert watchdog.stalled({"stalls": 7}, ends) == []
