"""The weights follower on a real Kafka: what it accepts, what it refuses, and which failures it survives."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer

from cortex_core.errors import WeightsError
from cortex_core.model import CortexModel, ModelConfig
from cortex_core.weights import WeightsSnapshot
from streams.connections import kafka_client_options
from streams.kafka.topics import Topics, create_topics
from streams.settings import Settings
from streams.testing import async_wait_for
from streams.weights.follower import WeightsFollower
from streams.weights.records import publish
from tests.streams.weights_records import CONFIG, Record, records_of, snapshot

pytestmark = pytest.mark.integration


@contextlib.asynccontextmanager
async def producing(settings: Settings, transactional_id: str = "t") -> AsyncIterator[AIOKafkaProducer]:
    producer = AIOKafkaProducer(
        **kafka_client_options(settings), transactional_id=f"{settings.topic_prefix}-{transactional_id}"
    )
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


async def put(producer: AIOKafkaProducer, settings: Settings, *versions: WeightsSnapshot) -> None:
    for version in versions:
        async with producer.transaction():
            await publish(producer, settings, version, resume=b"r%d" % version.manifest.version)


async def send_raw(producer: AIOKafkaProducer, settings: Settings, records: Sequence[Record]) -> None:
    async with producer.transaction():
        for r in records:
            await producer.send(
                Topics.of(settings).weights, value=r.value, key=r.key, partition=0, headers=list(r.headers)
            )


class Swaps:
    """Records the calls of `on_version`."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    async def __call__(self, snapshot: WeightsSnapshot, model: CortexModel) -> None:
        assert not model.training
        self.seen.append((snapshot.manifest.model_id, snapshot.manifest.version))


async def test_a_follower_starts_with_the_newest_and_then_gets_each(settings: Settings) -> None:
    await create_topics(settings)
    swaps = Swaps()
    async with producing(settings) as producer:
        await put(producer, settings, *(snapshot(v, "a") for v in (1, 2, 3)), snapshot(1, "b"))
        async with WeightsFollower(settings, swaps, keep_resume=True) as follower:
            await follower.until_caught_up()
            await async_wait_for(lambda: len(swaps.seen) == 2, "the newest of both models")
            assert sorted(swaps.seen) == [("a", 3), ("b", 1)]
            await put(producer, settings, snapshot(4, "a"), snapshot(5, "a"))
            await follower.catch_up()
            assert swaps.seen[2:] == [("a", 4), ("a", 5)]
            assert follower.models() == ["a", "b"]
            assert follower.resume("a") == b"r5"
            assert not follower.refused


async def test_an_aborted_or_open_transaction_is_never_seen(settings: Settings) -> None:
    await create_topics(settings)
    swaps = Swaps()
    async with (
        producing(settings) as one,
        producing(settings, "u") as other,
        WeightsFollower(settings, swaps) as follower,
    ):
        await follower.until_caught_up()
        await one.begin_transaction()
        await publish(one, settings, snapshot(1, "aborted"))
        await one.abort_transaction()
        await other.begin_transaction()
        await publish(other, settings, snapshot(1, "open"))
        await put(one, settings, snapshot(1, "whole"))
        await other.abort_transaction()
        await follower.catch_up()
        assert swaps.seen == [("whole", 1)]


async def test_catching_up_waits_for_versions_behind_an_open_transaction(settings: Settings) -> None:
    """The end of committed records is before the open transaction; a new trainer must read beyond it."""
    await create_topics(settings)
    async with (
        producing(settings) as one,
        producing(settings, "u") as other,
        WeightsFollower(settings) as follower,
    ):
        await other.begin_transaction()
        await publish(other, settings, snapshot(1, "open"))
        await put(one, settings, snapshot(1, "whole"))
        catching_up = asyncio.create_task(follower.catch_up())
        await asyncio.wait([catching_up], timeout=0.5)
        assert not catching_up.done()
        await other.commit_transaction()
        await catching_up
        assert follower.models() == ["open", "whole"]


def forgeries() -> dict[str, list[Record]]:
    """Version 2 in forms that must be refused; version 1 is valid."""
    good = snapshot(2)
    records = records_of(good)
    shifted = good.payload[:-4] + b"\0\0\xc0\x7f"  # the last weight becomes NaN, with a sha256 that agrees
    nan = replace(good, payload=shifted)
    nan = replace(nan, manifest=good.manifest.model_copy(update={"sha256": _sha(shifted)}))
    wider = good.manifest.model_copy(update={"architecture": ModelConfig(text_dim=16).to_dict()})
    hidden = {**CONFIG.to_dict(), "encoder_hidden_dim": 7}
    unknown = {**CONFIG.to_dict(), "attention_heads": 8}
    junk = b"\0" * len(good.payload)
    return {
        "without a chunk": records[1:],
        "with a damaged chunk": [
            replace(records[0], value=b"x" + (records[0].value or b"")[1:]),
            *records[1:],
        ],
        "of NaN": records_of(nan),
        "for other embeddings": records_of(replace(good, manifest=wider)),
        "of other shapes": records_of(
            replace(good, manifest=good.manifest.model_copy(update={"architecture": hidden}))
        ),
        "of an unknown architecture": records_of(
            replace(good, manifest=good.manifest.model_copy(update={"architecture": unknown}))
        ),
        "of junk": records_of(
            replace(good, payload=junk, manifest=good.manifest.model_copy(update={"sha256": _sha(junk)}))
        ),
        "with a key of no kind": [Record(b"?", b"?", [])],
    }


def _sha(payload: bytes) -> str:
    import hashlib

    return hashlib.sha256(payload).hexdigest()


async def test_invalid_versions_are_refused_and_the_valid_one_stays(settings: Settings) -> None:
    await create_topics(settings)
    swaps = Swaps()
    async with producing(settings) as producer, WeightsFollower(settings, swaps) as follower:
        await put(producer, settings, snapshot(1))
        await follower.catch_up()
        for refused, (name, records) in enumerate(forgeries().items(), 1):
            await send_raw(producer, settings, records)
            await follower.catch_up()
            assert follower.refused.total() == refused, name
            newest = follower.newest("m")
            assert newest is not None, name
            assert newest.version == 1, name
        await put(producer, settings, snapshot(2))
        await follower.catch_up()
        assert swaps.seen == [("m", 1), ("m", 2)]


async def test_older_and_equal_versions_are_ignored(settings: Settings) -> None:
    await create_topics(settings)
    swaps = Swaps()
    async with producing(settings) as producer, WeightsFollower(settings, swaps) as follower:
        await follower.until_caught_up()
        await put(producer, settings, snapshot(3), snapshot(2), snapshot(3, fill=0.25), snapshot(4))
        await follower.catch_up()
        assert swaps.seen == [("m", 3), ("m", 4)]
        assert [m.version for m in follower.history("m")] == [3, 4]


async def test_kept_versions_can_be_fetched_and_others_say_which_are(settings: Settings) -> None:
    await create_topics(settings)
    async with producing(settings) as producer, WeightsFollower(settings) as follower:
        versions = {v: snapshot(v, fill=v / 10) for v in range(1, 8)}
        for v, version in versions.items():
            await put(producer, settings, version, snapshot(v, "other"))
        await follower.catch_up()
        kept = [m.version for m in follower.history("m")]
        assert kept == [4, 5, 6, 7]
        for v in kept:
            assert await follower.fetch("m", v) == versions[v]
        with pytest.raises(WeightsError, match="kept are: 4, 5, 6, 7"):
            await follower.fetch("m", 3)
        with pytest.raises(WeightsError, match="kept are: none"):
            await follower.fetch("nobody", 1)


async def test_after_compaction_the_last_versions_are_still_there(settings: Settings) -> None:
    """After compaction of 23 versions: the newest record of each key is left."""
    await create_topics(settings)
    log: dict[bytes, Record] = {}
    for v in range(1, 24):
        for record in records_of(snapshot(v, fill=v / 100), kept=settings.weights_kept):
            log.pop(record.key, None)
            log[record.key] = record
    holes = records_of(snapshot(17), kept=settings.weights_kept)[1:]  # overwritten in part: chunk 0 is gone
    async with producing(settings) as producer:
        await send_raw(producer, settings, [*holes, *log.values()])
        async with WeightsFollower(settings) as follower:
            await follower.until_caught_up()
            assert [m.version for m in follower.history("m")] == [20, 21, 22, 23]
            assert follower.refused == {"incomplete": 1}


async def test_tombstones_shorten_the_history_but_keep_the_newest(settings: Settings) -> None:
    await create_topics(settings)
    async with producing(settings) as producer, WeightsFollower(settings) as follower:
        await put(producer, settings, snapshot(1), snapshot(2))
        for v in (1, 2):
            await send_raw(producer, settings, [Record(r.key, None, []) for r in records_of(snapshot(v))])
        await follower.catch_up()
        assert [m.version for m in follower.history("m")] == [2]
        assert not follower.refused


async def test_a_stalled_client_is_replaced(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a broker restart, aiokafka's fetcher can stop without an error; reading must continue."""
    from aiokafka import AIOKafkaConsumer

    from streams.kafka import follower as follow

    monkeypatch.setattr(follow, "PROBE_S", 0.05)
    deaf: list[AIOKafkaConsumer] = []
    getmany = AIOKafkaConsumer.getmany

    async def sometimes(self: AIOKafkaConsumer, *args: Any, **options: Any) -> Any:
        if self in deaf:
            await asyncio.sleep(0.05)
            return {}
        if not deaf:
            deaf.append(self)
        return await getmany(self, *args, **options)

    monkeypatch.setattr(AIOKafkaConsumer, "getmany", sometimes)
    await create_topics(settings)
    got: list[bytes] = []

    async def handle(records: list[Any]) -> None:
        got.extend(r.value for r in records)

    async with producing(settings) as producer:
        topic = Topics.of(settings).weights
        async with follow.TopicFollower(settings, topic, handle, stall_s=0.3) as follower:
            for i in range(5):
                async with producer.transaction():
                    await producer.send(topic, value=b"%d" % i, key=b"k", partition=0)
            await follower.catch_up()
            assert got == [b"0", b"1", b"2", b"3", b"4"]
            assert follower.restarts >= 1


async def test_a_callback_that_fails_stops_nothing(settings: Settings) -> None:
    await create_topics(settings)
    seen: list[int] = []

    async def swap(snapshot: WeightsSnapshot, _model: CortexModel) -> None:
        seen.append(snapshot.manifest.version)
        raise ValueError("no room")

    async with producing(settings) as producer, WeightsFollower(settings, swap) as follower:
        await follower.until_caught_up()
        await put(producer, settings, snapshot(1), snapshot(2))
        await follower.catch_up()
        assert seen == [1, 2]


async def test_an_unreachable_broker_is_named_and_waited_for(settings: Settings) -> None:
    said: list[str | None] = []
    away = settings.model_copy(update={"kafka": "127.0.0.1:1"})
    async with WeightsFollower(away, on_state=said.append) as follower:
        await async_wait_for(lambda: any(s and "127.0.0.1:1" in s for s in said), "the address")
        assert not follower.caught_up.is_set()
