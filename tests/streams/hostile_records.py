"""Malformed records on every topic, good ones among them, and workers that must process all the good ones.

    python -m tests.streams.hostile_records --records 10000

starts an embedded Kafka and Redis and one worker of each kind, and ends with exit code 0 if no worker crashed
and every good record was processed. `test_hostile_records.py` runs it with fewer records.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
from aiokafka import AIOKafkaProducer

from cortex_core.strategy_registry import StrategyRegistry
from streams import testing
from streams.events import ControlEvent, DeadLetter, ForgetEvent, utc_now
from streams.kafka.clients import started
from streams.kafka.dead_letters import list_dead_letters, retry_dead_letters
from streams.kafka.topics import MAX_RECORD_BYTES, Topics, create_topics
from streams.settings import Settings
from streams.testing import WorkerProcess, async_wait_for, interaction, reply, spawn_worker
from streams.weights.control import ControlFollower
from streams.worker import configure_logs
from tests.streams.experiences import DIM, experience
from tests.streams.joined import all_committed
from tests.streams.weights_records import records_of, snapshot

Fields = dict[str, Any]
DEEP = 100_000
GOOD = 20
"""Good conversations, each of an interaction and a rating."""


@dataclass(frozen=True)
class Sent:
    """One record to send."""

    key: bytes | None
    value: bytes | None
    headers: list[tuple[str, bytes]] = field(default_factory=list)
    timestamp_ms: int | None = None


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _any_field(rng: random.Random, good: Sent, make: Callable[[Any], Any]) -> bytes:
    """The good record with one field, at any depth, changed."""
    event = json.loads(good.value or b"{}")
    at = event
    while True:
        name = rng.choice(sorted(at)) if isinstance(at, dict) else rng.randrange(len(at))
        if isinstance(at[name], dict | list) and at[name] and rng.random() < 0.6:
            at = at[name]
            continue
        at[name] = make(at[name])
        return _json(event)


def _without_a_field(rng: random.Random, good: Sent) -> bytes:
    event = json.loads(good.value or b"{}")
    del event[rng.choice(sorted(event))]
    return _json(event)


def _flipped(rng: random.Random, value: bytes) -> bytes:
    changed = bytearray(value)
    for _ in range(rng.randint(1, 5)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _with(good: Sent, **fields: Any) -> bytes:
    return _json(json.loads(good.value or b"{}") | fields)


Value = Callable[[random.Random, Sent], bytes | None]
VALUES: dict[str, Value] = {
    "no value": lambda _, __: None,
    "an empty value": lambda _, __: b"",
    "random bytes": lambda rng, _: rng.randbytes(rng.randint(1, 2_000)),
    "no UTF-8": lambda _, good: (good.value or b"").replace(b'"', b'"\xff\xfe', 3),
    "a byte order mark": lambda _, good: b"\xef\xbb\xbf" + (good.value or b""),
    "UTF-16": lambda _, good: (good.value or b"").decode("latin-1").encode("utf-16"),
    "cut off": lambda rng, good: (good.value or b"")[: rng.randrange(len(good.value or b""))],
    "twice": lambda _, good: (good.value or b"") * 2,
    "flipped bits": lambda rng, good: _flipped(rng, good.value or b"x"),
    "null": lambda _, __: b"null",
    "a list": lambda _, good: _json([json.loads(good.value or b"{}")]),
    "a number": lambda _, __: b"17",
    "a number of 5,000 digits": lambda _, __: b"9" * 5_000,
    "a string": lambda _, good: _json((good.value or b"").decode()),
    "an empty object": lambda _, __: b"{}",
    "nested lists": lambda _, __: b"[" * DEEP,
    "nested objects": lambda _, __: b'{"a":' * DEEP,
    "a field is missing": _without_a_field,
    "a field is null": lambda rng, good: _any_field(rng, good, lambda _: None),
    "a field is an object": lambda rng, good: _any_field(rng, good, lambda _: {"x": [{}]}),
    "a field is text": lambda rng, good: _any_field(rng, good, lambda _: "\x00\u202e😀" * 5),
    "a field is a lone surrogate": lambda rng, good: _any_field(rng, good, lambda _: "\ud800"),
    "a field is long": lambda rng, good: _any_field(rng, good, lambda _: "x" * 20_000),
    "a field is empty": lambda rng, good: _any_field(rng, good, lambda _: ""),
    "a field is not a number": lambda rng, good: _any_field(rng, good, lambda _: float("nan")),
    "a field is infinite": lambda rng, good: _any_field(rng, good, lambda _: float("-inf")),
    "a field is huge": lambda rng, good: _any_field(rng, good, lambda _: 10**400),
    "a field is negative": lambda rng, good: _any_field(rng, good, lambda _: -1),
    "a field is a list": lambda rng, good: _any_field(rng, good, lambda old: [old] * 50),
    "a field is not base64": lambda rng, good: _any_field(rng, good, lambda _: "!!!"),
    "a schema of the future": lambda _, good: _with(good, schema_version=10**6),
    "a time that is none": lambda rng, good: _with(
        good,
        occurred_at=rng.choice(["yesterday", "9999-12-31T23:59:59Z", -1e18, "0001-01-01T00:00:00+14:00"]),
    ),
    "a version that is none": lambda rng, good: _with(good, version=rng.choice([-1, 2**80, "x", None])),
}
KEYS: tuple[Callable[[random.Random, bytes], bytes | None], ...] = (
    lambda _, key: key,
    lambda _, key: key,
    lambda _, __: None,
    lambda _, __: b"",
    lambda rng, _: rng.randbytes(40),
    _flipped,
    lambda _, __: b"[" * 1_000,
)
HEADERS: tuple[list[tuple[str, bytes]], ...] = (
    [],
    [("version", b"")],
    [("version", b"-1")],
    [("version", b"9" * 5_000)],
    [("version", b"\xff"), ("version", b"7"), ("", b"")],
)
TIMESTAMPS = (None, None, 0, 1, 10**9)


def hostile(good: Sent, n: int, seed: int) -> Iterator[Sent]:
    """`n` records: a good one made bad in each of the ways of `VALUES`, with any key, headers and time."""
    rng, ways = random.Random(seed), list(VALUES.values())
    for i in range(n):
        value = ways[i % len(ways)](rng, good)
        key = rng.choice(KEYS)(rng, good.key or b"k")
        headers = good.headers if rng.random() < 0.5 else rng.choice(HEADERS)
        yield Sent(key, value, headers, rng.choice(TIMESTAMPS))


def examples(settings: Settings) -> dict[str, list[Sent]]:
    """For each topic, good records from which the hostile ones are made; none is of a good conversation."""
    topics, now = Topics.of(settings), utc_now()
    pause = ControlEvent(control_id="hostile", occurred_at=now, model_id="hostile", action="pause")
    forget = ForgetEvent(occurred_at=now - timedelta(days=1), conversation="0" * 64)
    letter = DeadLetter(
        dead_letter_id="hostile",
        occurred_at=now,
        reason="why",
        topic=topics.replies,
        partition=0,
        offset=0,
        key=base64.b64encode(b"k").decode(),
        raw=base64.b64encode(b"v").decode(),
    )
    weights = records_of(snapshot(1, "hostile"))
    return {
        topics.interactions: [
            Sent(b"hostile", interaction("hostile", "hostile", dim=DIM, model_id="hostile").to_bytes())
        ],
        topics.replies: [Sent(b"hostile", reply("hostile", "hostile", "hostile").to_bytes())],
        topics.experiences: [Sent(b"hostile", experience("hostile", model_id="hostile").to_bytes())],
        topics.weights: [Sent(weights[-1].key, weights[-1].value, [*weights[-1].headers])],
        topics.control: [
            Sent(b'["hostile", "pause"]', pause.to_bytes()),
            Sent(_json([forget.conversation, "forget"]), forget.to_bytes()),
        ],
        topics.dead_letters: [Sent(b"k", letter.to_bytes())],
    }


def good_records(settings: Settings) -> dict[str, list[Sent]]:
    """The good records of each topic that are sent among the others."""
    topics, now = Topics.of(settings), utc_now()
    strategies = list(StrategyRegistry().ids)
    interactions, replies = [], []
    for n in range(GOOD):
        features = experience(f"good-{n}").interaction
        event = features.model_copy(
            update={
                "conversation_id": f"good-{n}",
                "model_id": "default",
                "occurred_at": now,
                "strategy_id": strategies[0],
            }
        )
        thumb = reply(
            f"good-{n}",
            event.interaction_id,
            event.conversation_id,
            occurred_at=now + timedelta(seconds=1),
            kind="rating",
            rating=1.0,
            text="",
        )
        interactions.append(Sent(event.conversation_id.encode(), event.to_bytes()))
        replies.append(Sent(event.conversation_id.encode(), thumb.to_bytes()))
    pause = ControlEvent(control_id="good", occurred_at=now, model_id="paused", action="pause")
    letter = DeadLetter(
        dead_letter_id="good", occurred_at=now, reason="why", topic=topics.replies, partition=0, offset=0,
        raw=base64.b64encode(b"again").decode(),
    )  # fmt: skip
    direct = [experience(f"direct-{n}", model_id="default") for n in range(GOOD)]
    return {
        topics.interactions: interactions,
        topics.replies: replies,
        topics.experiences: [Sent(b"default", event.to_bytes()) for event in direct],
        topics.weights: [],
        topics.control: [Sent(b'["paused", "pause"]', pause.to_bytes())],
        topics.dead_letters: [Sent(b"", letter.to_bytes())],
    }


async def send_all(settings: Settings, n: int, seed: int = 0) -> int:
    """Sends `n` hostile records to each topic, the good ones among them; returns how many in all."""
    await create_topics(settings)
    rng, good, count = random.Random(seed), good_records(settings), 0
    one_partition = {Topics.of(settings).weights, Topics.of(settings).control}
    producer = AIOKafkaProducer(
        bootstrap_servers=settings.kafka_address, max_request_size=MAX_RECORD_BYTES, linger_ms=20
    )
    async with started(producer):
        for topic, bases in examples(settings).items():
            records = [r for base in bases for r in hostile(base, n // len(bases), seed)]
            for one in good[topic]:
                records.insert(rng.randrange(len(records)), one)
            pending = [
                await producer.send(
                    topic,
                    r.value,
                    key=b"" if r.key is None and (r.value is None or topic in one_partition) else r.key,
                    headers=r.headers,
                    timestamp_ms=r.timestamp_ms,
                    partition=0 if topic in one_partition else None,
                )
                for r in records
            ]
            await asyncio.gather(*pending)
            count += len(records)
    return count


async def survive(settings: Settings, n: int) -> str:
    """Starts a worker of each kind, sends `n` hostile records to each topic, and checks that nothing is lost.

    Returns:
        What was refused.

    Raises:
        AssertionError: a worker has ended, or a good record was not processed.
    """
    workers = [spawn_worker(kind, settings) for kind in ("joiner", "trainer", "inference")]
    inference = workers[2]
    sent = await send_all(settings, n)
    for worker in workers:
        await asyncio.to_thread(worker.wait_ready)

    async def learned() -> bool:
        assert all(worker.alive for worker in workers), _ended(workers)
        async with httpx.AsyncClient(verify=False) as http:
            answer = await http.get(f"{inference.url}/v1/models/default", timeout=30)
        return bool(answer.status_code == 200 and answer.json()["interactions"] == 2 * GOOD)

    await async_wait_for(learned, "every good experience to be learned and served", every_s=0.3)
    await async_wait_for(lambda: all_committed(settings), "the joiner's commits")
    async with ControlFollower(settings) as controls:
        await controls.until_caught_up()
        assert controls.of("paused").paused
    letters = await list_dead_letters(settings, None)
    assert "good" in {letter.dead_letter_id for letter in letters}
    assert (await retry_dead_letters(settings, ["good"])).sent == ["good"]
    for worker in workers:
        code = await asyncio.to_thread(worker.stop)
        assert code == 0, f"{worker.name} ended with {code}:\n{worker.log_text()[-5_000:]}"
        assert '"crashed"' not in worker.log_text()
    return f"{sent} records on {len(examples(settings))} topics; {len(letters)} dead letters"


def _ended(workers: list[WorkerProcess]) -> str:
    return "\n".join(f"{w.name} {w.returncode}: {w.log_text()[-5_000:]}" for w in workers if not w.alive)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--records", type=int, default=10_000, help="Hostile records for each topic.")
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        testing.kafka_server(Path(folder)) as kafka,
        testing.redis_server(Path(folder)) as redis_url,
    ):
        settings = Settings.load(
            kafka=kafka, redis_url=redis_url, data=Path(folder), encoder="hashing", port=0, partitions=2
        )
        configure_logs(settings.model_copy(update={"log_level": "error"}))
        try:
            done = asyncio.run(survive(settings, parser.parse_args().records))
        finally:
            testing.end_spawned()
    sys.stdout.write(f"every worker lives, and every good record was processed: {done}\n")


if __name__ == "__main__":
    main()
