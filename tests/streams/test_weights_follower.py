"""The weights follower on a real Kafka: what it accepts, what it refuses, and which failures it survives."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer

from cortex_core.errors import WeightsError
from cortex_core.model import CortexModel, ModelConfig
from cortex_core.weights import WeightsSnapshot
from streams.connections import kafka_client_options
from streams.kafka.topics import Topics, create_topics, partition_of
from streams.settings import Settings
from streams.testing import async_wait_for
from streams.weights.architecture import build_model
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


async def send_raw(
    producer: AIOKafkaProducer, settings: Settings, records: Sequence[Record], topic: str | None = None
) -> None:
    """Sends records of model "m" in one transaction."""
    topic = topic or Topics.of(settings).weights
    partition = partition_of("m", len(await producer.partitions_for(topic)))
    async with producer.transaction():
        for r in records:
            await producer.send(topic, value=r.value, key=r.key, partition=partition, headers=list(r.headers))


class Changes:
    """A follower, and the newest version at each call of `on_change`."""

    def __init__(self, settings: Settings) -> None:
        self.follower = WeightsFollower(settings, self._note)
        self.seen: list[tuple[str, int]] = []

    def _note(self, model_id: str) -> None:
        newest = self.follower.newest(model_id)
        self.seen.append((model_id, newest.version if newest else 0))

    async def used(self, model_id: str = "m") -> int:
        """The newest version of which a model can be built; 0 if there is none."""

        async def build(snapshot: WeightsSnapshot, _resume: bytes) -> int:
            build_model(snapshot).freeze()
            return snapshot.manifest.version

        return await self.follower.use(model_id, build) or 0


async def test_a_follower_starts_with_the_newest_and_then_gets_each(settings: Settings) -> None:
    await create_topics(settings)
    changes = Changes(settings)
    async with producing(settings) as producer:
        await put(producer, settings, *(snapshot(v, "a") for v in (1, 2, 3)), snapshot(1, "b"))
        async with changes.follower as follower:
            await follower.until_caught_up()
            assert not changes.seen
            assert [await changes.used(m) for m in "ab"] == [3, 1]
            await put(producer, settings, snapshot(4, "a"), snapshot(5, "a"))
            await follower.catch_up()
            assert changes.seen == [("a", 4), ("a", 5)]
            assert follower.models() == ["a", "b"]
            assert not follower.refused

            async def resume(_snapshot: WeightsSnapshot, resume: bytes) -> bytes:
                return resume

            assert await follower.use("a", resume) == b"r5"


async def test_a_start_reads_manifests_and_builds_nothing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a start after minutes of load takes minutes, and 1,000 models take gigabytes."""
    await create_topics(settings)
    built: list[int] = []
    to_model = WeightsSnapshot.to_model

    def counted(self: WeightsSnapshot) -> CortexModel:
        built.append(self.manifest.version)
        return to_model(self)

    monkeypatch.setattr(WeightsSnapshot, "to_model", counted)
    changes = Changes(settings)
    async with producing(settings) as producer:
        for model_id in ("m", *(f"m{i}" for i in range(5))):
            await put(producer, settings, *(snapshot(v, model_id) for v in range(1, 8)))
        async with changes.follower as follower:
            await follower.until_caught_up()
            assert len(follower.models()) == 6
            assert built == []
            assert await changes.used() == 7
            assert built == [7]


async def test_a_transaction_that_is_left_open_hides_the_models_of_its_partition_alone(
    settings: Settings,
) -> None:
    await create_topics(settings)
    hidden, shown = "m", next(n for n in "abcdef" if partition_of(n, 2) != partition_of("m", 2))
    changes = Changes(settings)
    async with (
        producing(settings) as one,
        producing(settings, "u") as crashed,
        changes.follower as follower,
    ):
        await follower.until_caught_up()
        await crashed.begin_transaction()
        await publish(crashed, settings, snapshot(1, hidden))
        await put(one, settings, snapshot(1, hidden, fill=0.5), snapshot(1, shown))
        await async_wait_for(lambda: changes.seen, "a version")
        assert changes.seen == [(shown, 1)]
        await crashed.abort_transaction()
        await async_wait_for(lambda: len(changes.seen) == 2, "the hidden version")


async def test_a_weights_topic_of_one_partition_with_chunks_in_it_keeps_working(settings: Settings) -> None:
    one = settings.model_copy(update={"partitions": 1})
    await create_topics(one)
    changes = Changes(settings)
    async with producing(settings) as producer:
        await send_raw(
            producer, settings, [r for v in (1, 2) for r in records_of(snapshot(v), resume=b"r%d" % v)]
        )
        async with changes.follower as follower:
            await follower.until_caught_up()
            assert await changes.used() == 2
            assert await follower.fetch("m", 1) == snapshot(1)
            await put(producer, settings, snapshot(3), snapshot(1, "other"))
            await follower.catch_up()
            assert [await changes.used(m) for m in ("m", "other")] == [3, 1]
            assert await follower.fetch("m", 2) == snapshot(2)
            assert not follower.refused


async def test_an_aborted_or_open_transaction_is_never_seen(settings: Settings) -> None:
    await create_topics(settings)
    changes = Changes(settings)
    async with (
        producing(settings) as one,
        producing(settings, "u") as other,
        changes.follower as follower,
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
        assert changes.seen == [("whole", 1)]


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


def forgeries() -> dict[str, WeightsSnapshot]:
    """Version 2 in forms that must be refused; version 1 is valid."""
    good = snapshot(2)
    shifted = good.payload[:-4] + b"\0\0\xc0\x7f"  # the last weight becomes NaN, with a sha256 that agrees
    junk = b"\0" * len(good.payload)

    def claiming(architecture: dict[str, Any]) -> WeightsSnapshot:
        return replace(good, manifest=good.manifest.model_copy(update={"architecture": architecture}))

    return {
        "with a damaged chunk": replace(good, payload=b"x" + good.payload[1:]),
        "of NaN": _signed(replace(good, payload=shifted)),
        "for other embeddings": claiming(ModelConfig(text_dim=16).to_dict()),
        "of other shapes": claiming({**CONFIG.to_dict(), "encoder_hidden_dim": 7}),
        "of an unknown architecture": claiming({**CONFIG.to_dict(), "attention_heads": 8}),
        "of junk": _signed(replace(good, payload=junk)),
    }


def _signed(forged: WeightsSnapshot) -> WeightsSnapshot:
    digest = hashlib.sha256(forged.payload).hexdigest()
    return replace(forged, manifest=forged.manifest.model_copy(update={"sha256": digest}))


async def test_invalid_versions_are_refused_and_the_valid_one_stays(settings: Settings) -> None:
    await create_topics(settings)
    changes = Changes(settings)
    async with producing(settings) as producer, changes.follower as follower:
        await put(producer, settings, snapshot(1))
        for refused, (name, forged) in enumerate(forgeries().items(), 1):
            await put(producer, settings, forged)
            await follower.catch_up()
            assert await changes.used() == 1, name
            assert follower.refused.total() == refused, name
        await put(producer, settings, snapshot(2))
        await follower.catch_up()
        assert await changes.used() == 2


FORGED_PLACES = {
    "on a partition that does not exist": b"99:0:3",
    "after the end of the topic": b"0:1000000:1000004",
    "all over the topic": b"0:0:999999999999",
    "backwards": b"0:3:0",
    "of another version": b"1:0:4",
}


async def test_a_manifest_with_a_wrong_place_is_refused(settings: Settings) -> None:
    await create_topics(settings)
    changes = Changes(settings)
    async with producing(settings) as producer, changes.follower as follower:
        await put(producer, settings, snapshot(1))
        for refused, (name, place) in enumerate(FORGED_PLACES.items(), 1):
            [*_, record] = records_of(snapshot(2))
            record = replace(record, headers=[("version", b"2"), ("payload", place)])
            await send_raw(producer, settings, [record])
            await follower.catch_up()
            assert await asyncio.wait_for(changes.used(), 60) == 1, name
            assert follower.refused.total() == refused, name


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
            for v in (20, 21, 22, 23):
                assert await follower.fetch("m", v) == snapshot(v, fill=v / 100)
            assert not follower.refused


async def test_a_stalled_client_is_replaced(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a broker restart, aiokafka's fetcher can stop without an error; reading must continue."""
    from aiokafka import AIOKafkaConsumer

    from streams.kafka import follower as follow

    monkeypatch.setattr(follow, "PROBE_S", 0.05)
    deaf: list[AIOKafkaConsumer] = []
    getmany = AIOKafkaConsumer.getmany

    async def sometimes(self: AIOKafkaConsumer, *args: Any, **options: Any) -> Any:
        if not deaf:
            deaf.append(self)
        if self in deaf:
            await asyncio.sleep(0.05)
            return {}
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


async def test_an_unreachable_broker_is_named_and_waited_for(settings: Settings) -> None:
    said: list[str | None] = []
    away = settings.model_copy(update={"kafka": "127.0.0.1:1"})
    async with WeightsFollower(away, on_state=said.append) as follower:
        await async_wait_for(lambda: any(s and "127.0.0.1:1" in s for s in said), "the address")
        assert not follower.caught_up.is_set()
