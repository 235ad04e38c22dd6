"""What Faust costs a record: as it comes, in batches as the joiner uses it, and left out.

    python -m benchmarks.faust_cost [--records 40000]

Every reader reads the same two topics (8 partitions each, records of 500 bytes), notes each record's key and
commits; nothing else. The figure is the CPU time of its process, all threads, from the first records to the
last, divided by their number. What the joiner's own work costs: `python -m benchmarks.joiner_throughput`.

Servers: CORTEX_KAFKA where set, else the embedded one.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import faust
import uvloop
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from streams.joiner.batch import Batch
from streams.joiner.consumer import BatchTransport, NoTables
from streams.kafka.clients import started
from streams.kafka.topics import Topics, create_topics
from streams.settings import Settings
from streams.testing import kafka_server
from streams.worker import Worker, configure_logs


class Notes:
    """The keys of records that were read, and the CPU time that went by meanwhile."""

    def __init__(self, total: int) -> None:
        self.keys: set[bytes] = set()
        self.total = total
        self.first = 0
        """Records of the first call: what they cost lies before it."""
        self.cpu_s = 0.0
        self.complete = asyncio.Event()

    def add(self, keys: Iterable[bytes | None]) -> None:
        """Notes some records."""
        self.keys.update(key for key in keys if key is not None)
        if not self.first:
            self.first, self.cpu_s = len(self.keys), time.process_time()
        if len(self.keys) == self.total:
            self.cpu_s = time.process_time() - self.cpu_s
            self.complete.set()

    @property
    def us_a_record(self) -> float:
        """Microseconds of CPU a record."""
        return 1e6 * self.cpu_s / (self.total - self.first)


def app_of(settings: Settings, **options: Any) -> faust.App:
    return faust.App(
        settings.joiner_group,
        broker=f"kafka://{settings.kafka_address}",
        web_enabled=False,
        topic_allow_declare=False,
        topic_disable_leader=True,
        autodiscover=False,
        consumer_auto_offset_reset="earliest",
        **options,
    )


async def run_until_complete(app: faust.App, notes: Notes) -> None:
    await app.start()
    await notes.complete.wait()
    await app.stop()


async def as_it_comes(settings: Settings, notes: Notes) -> None:
    """Faust's agent on Faust's consumer, record by record; Faust commits."""
    app = app_of(settings)
    topic = app.topic(*topics_of(settings), key_serializer="raw", value_serializer="raw")

    @app.agent(topic)
    async def note(stream: Any) -> None:
        async for event in stream.events():
            notes.add([event.key])

    await run_until_complete(app, notes)


async def taken(settings: Settings, notes: Notes) -> None:
    """The same, 500 at a time by `stream.take_events`."""
    app = app_of(settings)
    topic = app.topic(*topics_of(settings), key_serializer="raw", value_serializer="raw")

    @app.agent(topic)
    async def note(stream: Any) -> None:
        async for events in stream.take_events(500, within=0.2):
            notes.add(event.key for event in events)

    await run_until_complete(app, notes)


class KafkaAlone:
    """Stores no offsets beside Kafka's: the benchmark writes nothing to Redis that could be lost."""

    async def load(self) -> dict[TopicPartition, int]:
        return {}

    async def advance(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Does nothing."""


async def in_batches(settings: Settings, notes: Notes) -> None:
    """Faust's agent on the joiner's consumer; the agent commits."""
    app = app_of(settings, TableManager=NoTables)
    app.transport = BatchTransport(app, settings, Worker("benchmark", settings), KafkaAlone(), lambda: None)
    topic = app.topic(*topics_of(settings), key_serializer="raw", value_serializer="raw", acks=False)

    @app.agent(topic)
    async def note(batches: AsyncIterable[Batch]) -> None:
        async for batch in batches:
            async for attempt in batch.attempts():
                async with attempt as part:
                    notes.add(record.key for record in part.records)
                    await part.commit()

    await run_until_complete(app, notes)


async def without(settings: Settings, notes: Notes) -> None:
    """aiokafka alone, 500 at a time; the loop commits."""
    consumer = AIOKafkaConsumer(
        *topics_of(settings),
        bootstrap_servers=settings.kafka_address,
        group_id=settings.joiner_group,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
        max_partition_fetch_bytes=8_000_000,
    )
    async with started(consumer):
        while not notes.complete.is_set():
            fetched = await consumer.getmany(timeout_ms=200, max_records=500)
            notes.add(record.key for records in fetched.values() for record in records)
            await consumer.commit({tp: records[-1].offset + 1 for tp, records in fetched.items() if records})


READERS: dict[str, Callable[[Settings, Notes], Awaitable[None]]] = {
    "Faust as it comes": as_it_comes,
    "Faust as it comes, take_events(500)": taken,
    "Faust in batches (the joiner's way)": in_batches,
    "aiokafka without Faust": without,
}


def topics_of(settings: Settings) -> tuple[str, str]:
    topics = Topics.of(settings)
    return topics.interactions, topics.replies


async def fill(settings: Settings, records: int) -> None:
    """Writes the records, half of them to each topic."""
    await create_topics(settings)
    async with started(AIOKafkaProducer(bootstrap_servers=settings.kafka_address)) as producer:
        sent = [
            await producer.send(topics_of(settings)[n % 2], bytes(500), key=b"%d" % n) for n in range(records)
        ]
        for one in sent:
            await one


def main(records: int) -> None:
    """Measures every reader, each in a process of its own."""
    with tempfile.TemporaryDirectory() as name, kafka_server(Path(name)) as kafka:
        prefix = f"bench-{uuid.uuid4().hex[:8]}"
        asyncio.run(fill(settings_of(kafka, prefix), records))
        print("| reader | CPU a record |\n|---|---:|")
        for reader in READERS:
            command = [
                sys.executable,
                "-m",
                __spec__.name,
                f"--records={records}",
                "--one",
                reader,
                kafka,
                prefix,
            ]
            found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            print(f"| {reader} | {float(found.stdout):.1f} µs |", flush=True)


def settings_of(kafka: str, prefix: str) -> Settings:
    return Settings.load(
        kafka=kafka,
        redis_url="redis://127.0.0.1:1/0",  # nobody asks for it
        topic_prefix=prefix,
        joiner_group=f"bench-{uuid.uuid4().hex[:8]}",
        partitions=8,
        port=0,
        log_level="error",
    )


async def measure(records: int, reader: str, kafka: str, prefix: str) -> float:
    """Microseconds of CPU that a record costs one reader."""
    settings, notes = settings_of(kafka, prefix), Notes(records)
    configure_logs(settings)
    await READERS[reader](settings, notes)
    return notes.us_a_record


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--records", type=int, default=40_000)
    parser.add_argument("--one", nargs=3, metavar=("READER", "KAFKA", "PREFIX"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(uvloop.run(measure(arguments.records, *arguments.one)))
    else:
        main(arguments.records)
