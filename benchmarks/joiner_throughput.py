"""Events a second through the real joiner, on a real Kafka and a real Redis.

    python -m benchmarks.joiner_throughput [--events 20000]

For each size of interaction: writes conversations of three turns, each interaction with one named reply,
before the joiner starts; then starts `cortex joiner` as a process and measures from its first committed
offset until it has committed the last. What it does meanwhile is what it always does: parse and check, read
the reply, join, write replay, publish the experience and wait for its acknowledgement, write state, commit.
Beside it, the same topics read by a bare aiokafka loop that does nothing with them.

Servers: CORTEX_KAFKA and CORTEX_REDIS_URL where set, else the embedded ones.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
import uuid
from pathlib import Path

import psutil
from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from redis import Redis

from streams import testing
from streams.events import Event
from streams.kafka.topics import Topics
from streams.settings import Settings
from streams.testing import interaction, reply, send

LONG_REPLY = (
    "Thanks, that worked! I ran it again on the second machine as you said and the service came up at once, "
    "so the missing variable was the reason after all. "
)


async def fill(settings: Settings, events: int, dim: int, memories: int) -> int:
    """Writes the events; returns the size of an interaction in bytes."""
    messages: list[Event] = []
    for n in range(events // 2):
        conversation_id = f"conversation-{n // 3}"
        messages.append(
            interaction(f"interaction-{n}", conversation_id, at_s=n % 3 * 10, dim=dim, memories=memories)
        )
        messages.append(
            reply(f"reply-{n}", f"interaction-{n}", conversation_id, at_s=n % 3 * 10 + 5, text=LONG_REPLY)
        )
    size = len(messages[0].to_bytes())
    await send(settings, messages)
    return size


async def joined_per_s(settings: Settings) -> tuple[float, float]:
    """Runs a joiner over everything, from its first commit on: events a second, and a second of its CPU."""
    topics = Topics.of(settings)
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka_address)
    consumer = AIOKafkaConsumer(topics.interactions, topics.replies, bootstrap_servers=settings.kafka_address)
    await admin.start()
    await consumer.start()
    ends = await consumer.end_offsets(consumer.assignment())
    total = sum(ends.values())

    async def done() -> int:
        try:
            offsets = await admin.list_consumer_group_offsets(settings.joiner_group)
        except KafkaError:  # nobody has joined the group yet
            return 0
        return sum(max(0, offset.offset) for offset in offsets.values())

    joiner = testing.spawn_worker("joiner", settings)
    process = psutil.Process(joiner.pid)
    try:
        while not (first := await done()):
            assert joiner.alive, joiner.log_text()
            await asyncio.sleep(0.02)
        started, cpu = time.perf_counter(), sum(process.cpu_times()[:2])
        while (now := await done()) < total:
            assert joiner.alive, joiner.log_text()
            await asyncio.sleep(0.05)
        seconds, cpu = time.perf_counter() - started, sum(process.cpu_times()[:2]) - cpu
        return (now - first) / seconds, (now - first) / cpu
    finally:
        joiner.stop()
        await consumer.stop()
        await admin.close()


async def read_per_s(settings: Settings) -> float:
    """Reads the same topics and does nothing."""
    topics = Topics.of(settings)
    consumer = AIOKafkaConsumer(
        topics.interactions,
        topics.replies,
        bootstrap_servers=settings.kafka_address,
        auto_offset_reset="earliest",
        max_partition_fetch_bytes=8_000_000,
    )
    await consumer.start()
    try:
        ends = await consumer.end_offsets(consumer.assignment())
        total, seen, started = sum(ends.values()), 0, time.perf_counter()
        while seen < total:
            batches = await consumer.getmany(timeout_ms=1000, max_records=2000)
            seen += sum(len(records) for records in batches.values())
        return float(total / (time.perf_counter() - started))
    finally:
        await consumer.stop()


async def main(events: int, kafka: str, redis_url: str, folder: Path) -> None:
    print("| interaction | events | joiner, events/s | a second of its CPU | bare aiokafka loop, events/s |")
    print(f"|{'---|' * 5}")
    for dim, memories in ((384, 8), (4, 3)):
        settings = Settings.load(
            kafka=kafka,
            redis_url=redis_url,
            data=folder,
            topic_prefix=f"bench-{uuid.uuid4().hex[:8]}",
            joiner_group=f"bench-{uuid.uuid4().hex[:8]}",
            partitions=8,
            port=0,
        )
        size = await fill(settings, events, dim, memories)
        bare = await read_per_s(settings)
        joined, of_cpu = await joined_per_s(settings)
        with Redis.from_url(redis_url) as client:
            stored = client.zcard(f"{settings.topic_prefix}:replay:{{default}}:order")
            assert stored == min(events // 2, settings.replay_capacity), f"{stored} in replay"
            for key in client.scan_iter(f"{settings.topic_prefix}:*", count=1000):
                client.delete(key)
        print(f"| {size:,} bytes | {events:,} | {joined:,.0f} | {of_cpu:,.0f} | {bare:,.0f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--events", type=int, default=20_000)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        with testing.kafka_server(root / "kafka") as kafka, testing.redis_server(root / "redis") as url:
            asyncio.run(main(parser.parse_args().events, kafka, url, root))
