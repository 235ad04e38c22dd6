"""CPU of one joiner an event, on a real Kafka and a real Redis, beside a loop that only decodes the events.

    python -m benchmarks.joiner_throughput [--events 20000] [--runs 3] [--seed 0] [--cases 2] [--profile]

Conversations of three turns stand in the topics before a joiner starts: each turn is an interaction and the
user's reply. The replies are those of `data/feedback_test.txt` with their embeddings (all-MiniLM-L6-v2),
drawn with `--seed`; some two in five say nothing explicit about the answer, and half of them do not name
their interaction. Then `cortex joiner` runs as a process of its own, from its first committed offset until it
has committed the last, doing all that it always does: decode and check, read the reply, join, write replay,
publish the experience and wait for its acknowledgement, write state, commit. Each run has a consumer group of
its own and an empty Redis. Beside it, in the same run, a bare aiokafka loop reads the same events and decodes
them with orjson.

Processor time is that of the joiner's process alone, all its threads; the table gives medians over the runs.
`--profile` samples the first run with py-spy and prints where its processor time went, by the innermost
function of ours or of a client library.

Servers: CORTEX_KAFKA and CORTEX_REDIS_URL where set, else the embedded ones.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import numpy as np
import orjson
import psutil
from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from redis import Redis

from benchmarks.feedback_data import load
from benchmarks.sentences import embed
from cortex_core.arrays import FloatArray
from cortex_core.feedback_collector import FeedbackCollector
from streams import testing
from streams.events import Event, utc_now
from streams.kafka.topics import MAX_RECORD_BYTES, Topics
from streams.settings import Settings
from streams.testing import interaction, reply, send


@dataclass(frozen=True)
class Case:
    """One kind of traffic."""

    name: str
    dim: int
    memories: int
    embedded: bool
    """Whether replies carry the embedding of their text."""


CASES = (
    Case("12 KB interactions, replies with embeddings", 384, 8, embedded=True),
    Case("small interactions, replies as text alone", 4, 3, embedded=False),
)


@dataclass(frozen=True)
class Cost:
    """What one run took an event."""

    cpu_us: float
    events_per_s: float


async def fill(settings: Settings, case: Case, events: int, seed: int) -> tuple[int, int, float]:
    """Writes the events; the sizes of an interaction and a reply, and the share of unexplicit replies."""
    rng = random.Random(seed)
    texts = [r.text for r in load("test")]
    vectors: Sequence[FloatArray | None] = [None] * len(texts)
    if case.embedded:
        vectors = list(embed(texts))
    collector = FeedbackCollector()
    pairs = list(zip(texts, vectors, strict=True))
    silent = [not collector.extract(text, embedding=vector).explicit for text, vector in pairs]
    messages: list[Event] = []
    drawn = []
    start = utc_now() - timedelta(seconds=60)
    for n in range(events // 2):
        conversation_id, at = f"conversation-{n // 3}", start + timedelta(seconds=n % 3 * 10)
        asked, said = rng.randrange(len(texts)), rng.randrange(len(texts))
        drawn.append(said)
        name = f"interaction-{n}"
        about: dict[str, Any] = {} if vectors[asked] is None else {"message": vectors[asked]}
        messages.append(
            interaction(name, conversation_id, occurred_at=at, dim=case.dim, memories=case.memories, **about)
        )
        messages.append(
            reply(
                f"reply-{n}",
                rng.choice((name, None)),
                conversation_id,
                occurred_at=at + timedelta(seconds=5),
                text=texts[said],
                embedding=vectors[said],
            )
        )
    await send(settings, messages)
    sizes = [len(m.to_bytes()) for m in messages[:200]]
    return (
        int(statistics.mean(sizes[::2])),
        int(statistics.mean(sizes[1::2])),
        statistics.mean(silent[i] for i in drawn),
    )


async def joined(settings: Settings, profile: Path | None = None) -> Cost:
    """Runs a joiner over everything, and measures it from its first commit on."""
    topics = Topics.of(settings)
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka_address)
    consumer = AIOKafkaConsumer(topics.interactions, topics.replies, bootstrap_servers=settings.kafka_address)
    await admin.start()
    await consumer.start()
    total = sum((await consumer.end_offsets(consumer.assignment())).values())

    async def done() -> int:
        try:
            offsets = await admin.list_consumer_group_offsets(settings.joiner_group)
        except KafkaError:  # nobody has joined the group yet
            return 0
        return sum(max(0, offset.offset) for offset in offsets.values())

    joiner = testing.spawn_worker("joiner", settings)
    process = psutil.Process(joiner.pid)
    sampler: asyncio.subprocess.Process | None = None
    try:
        while not (first := await done()):
            assert joiner.alive, joiner.log_text()
            await asyncio.sleep(0.02)
        if profile is not None:
            options = ["--format", "raw", "--rate", "200", "--full-filenames", "--output", str(profile)]
            command = ["py-spy", "record", *options, "--pid", str(joiner.pid)]
            sampler = await asyncio.create_subprocess_exec(*command, stdout=DEVNULL, stderr=DEVNULL)
        started, cpu = time.perf_counter(), sum(process.cpu_times()[:2])
        while (now := await done()) < total:
            assert joiner.alive, joiner.log_text()
            await asyncio.sleep(0.05)
        seconds, cpu = time.perf_counter() - started, sum(process.cpu_times()[:2]) - cpu
        return Cost(1e6 * cpu / (now - first), (now - first) / seconds)
    finally:
        if sampler is not None:
            sampler.send_signal(2)
            await sampler.wait()
        joiner.stop()
        await consumer.stop()
        await admin.close()


async def decoded(settings: Settings) -> Cost:
    """Reads the same topics and decodes every value, and no more."""
    topics = Topics.of(settings)
    consumer = AIOKafkaConsumer(
        topics.interactions,
        topics.replies,
        bootstrap_servers=settings.kafka_address,
        auto_offset_reset="earliest",
        max_partition_fetch_bytes=MAX_RECORD_BYTES,
    )
    await consumer.start()
    try:
        total, seen = sum((await consumer.end_offsets(consumer.assignment())).values()), 0
        started, cpu = time.perf_counter(), time.process_time()
        while seen < total:
            for records in (await consumer.getmany(timeout_ms=1000, max_records=500)).values():
                for record in records:
                    orjson.loads(record.value)
                seen += len(records)
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        return Cost(1e6 * cpu / total, total / seconds)
    finally:
        await consumer.stop()


PARTS = (
    ("reading replies: the head", ("feedback/semantic.py",)),
    ("reading replies: words, patterns", ("cortex_core/",)),
    ("decoding and checking", ("joiner/decode.py", "joiner/records.py", "streams/events.py", "pydantic/")),
    ("join rules, experiences, state", ("joiner/join.py", "joiner/conversation.py", "joiner/effects.py")),
    ("Redis", ("streams/replay_store.py", "joiner/states.py", "/redis/")),
    ("publishing", ("kafka/publisher.py", "aiokafka/producer/")),
    ("Kafka's consumer, group and client", ("aiokafka/",)),
    ("the loop around it", ("joiner/", "streams/", "faust/", "mode/")),
)
"""Parts of the work, and the files that belong to them. The innermost frame of one of them decides."""


def shares(profile: Path) -> list[tuple[str, float]]:
    """The share of each part of `PARTS` in a profile that py-spy wrote as raw stacks."""
    counts: Counter[str] = Counter()
    for line in profile.read_text().splitlines():
        stack, _, samples = line.rpartition(" ")
        counts[_part(stack.split(";"))] += int(samples)
    return [(part, n / counts.total()) for part, n in counts.most_common()]


def _part(stack: Sequence[str]) -> str:
    for frame in reversed(stack):
        for part, files in PARTS:
            if any(file in frame for file in files):
                return part
    return "everything else"


async def main(arguments: argparse.Namespace, kafka: str, redis_url: str, folder: Path) -> None:
    print(
        "| traffic | interaction + reply, bytes | unexplicit replies | joiner: CPU µs an event | events/s "
        "| bare loop: CPU µs | ratio |"
    )
    print(f"|{'---|' * 7}")
    profiles = []
    for case in CASES[: arguments.cases]:
        prefix = f"bench-{uuid.uuid4().hex[:8]}"
        settings = Settings.load(
            kafka=kafka, redis_url=redis_url, data=folder, topic_prefix=prefix, partitions=8, port=0
        )
        interaction_bytes, reply_bytes, silent = await fill(settings, case, arguments.events, arguments.seed)
        ours, bare = [], []
        for run in range(arguments.runs + arguments.profile):
            group = {"joiner_group": f"{prefix}-{run}"}
            sampled = folder / f"{prefix}.raw" if arguments.profile and run == 0 else None
            cost = await joined(settings.model_copy(update=group), sampled)
            if sampled is None:  # sampling slows it
                ours.append(cost)
                bare.append(await decoded(settings))
            else:
                profiles.append((case, shares(sampled)))
            with Redis.from_url(redis_url) as client:
                stored = client.zcard(f"{prefix}:replay:{{default}}:order")
                assert stored == min(arguments.events // 2, settings.replay_capacity), f"{stored} in replay"
                for key in client.scan_iter(f"{prefix}:*", count=1000):
                    client.delete(key)
        cpu, bare_cpu = (np.median([c.cpu_us for c in costs]) for costs in (ours, bare))
        spread = f"{min(c.cpu_us for c in ours):.0f}–{max(c.cpu_us for c in ours):.0f}"
        rate = np.median([c.events_per_s for c in ours])
        print(
            f"| {case.name} | {interaction_bytes:,} + {reply_bytes:,} | {silent:.0%} | {cpu:.0f} ({spread}) "
            f"| {rate:,.0f} | {bare_cpu:.0f} | {cpu / bare_cpu:.1f} |",
            flush=True,
        )
    for case, parts in profiles:
        print(f"\n{case.name}, share of the samples:\n")
        print("\n".join(f"| {part} | {share:.1%} |" for part, share in parts))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=len(CASES), help="the first so many of the table")
    parser.add_argument("--profile", action="store_true", help="print where the time goes (needs py-spy)")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        with testing.kafka_server(root / "kafka") as kafka, testing.redis_server(root / "redis") as url:
            asyncio.run(main(parser.parse_args(), kafka, url, root))
