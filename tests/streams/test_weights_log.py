"""The weights log: what one version looks like on the wire, what a follower refuses, and what it survives."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from aiokafka import AIOKafkaProducer
from hypothesis import given
from hypothesis import strategies as st

from cortex_core.errors import WeightsError
from cortex_core.model import CortexModel, ModelConfig
from cortex_core.weights import WeightsSnapshot
from streams.connections import kafka_client_options
from streams.settings import Settings
from streams.topics import Topics, create_topics
from streams.weights_log import (
    MANIFEST,
    SPARE_SLOTS,
    Assembler,
    IncompleteError,
    WeightsFollower,
    decode_key,
    encode,
    encode_key,
    publish,
)
from tests.services import async_wait_for

CONFIG = ModelConfig(text_dim=384)


@dataclass
class Record:
    """What the assembler reads of a consumer's record."""

    key: bytes
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]
    offset: int = 0


def snapshot(version: int, model_id: str = "m", *, fill: float | None = None) -> WeightsSnapshot:
    model = CortexModel.create(CONFIG, model_id)
    if fill is not None:
        with torch.no_grad():
            next(model.gate.parameters()).fill_(fill)
    return WeightsSnapshot.of(model, model_id=model_id, version=version, parent=version - 1 or None)


def records_of(version: WeightsSnapshot, first_offset: int = 0, kept: int = 4) -> list[Record]:
    return [Record(k, v, h, first_offset + i) for i, (k, v, h) in enumerate(encode(version, kept))]


# --- on the wire ------------------------------------------------------------------------------------------


@given(st.text(min_size=1, max_size=200), st.integers(0, 50), st.just(MANIFEST) | st.integers(0, 99))
def test_keys_come_back(model_id: str, slot: int, part: int | str) -> None:
    try:
        raw = encode_key(model_id, slot, part)
    except UnicodeEncodeError:  # a lone surrogate is no UTF-8; ids that came over the wire hold none
        return
    assert decode_key(raw) == (model_id, slot, part)


@pytest.mark.parametrize(
    "raw", [None, b"", b"m", b"[]", b'["m",1]', b'["m",1,"other"]', b'["m",true,0]', b"[1,1,1]"]
)
def test_another_key_is_refused(raw: bytes | None) -> None:
    with pytest.raises(WeightsError, match="key"):
        decode_key(raw)


def test_chunks_stay_small_and_the_manifest_comes_last() -> None:
    records = records_of(snapshot(7))
    assert all(len(r.value or b"") <= 900_000 for r in records)
    assert [decode_key(r.key)[2] for r in records] == [*range(len(records) - 1), MANIFEST]
    assert len(records) > 2, "the test wants a model of several chunks"


def test_the_last_versions_have_slots_of_their_own() -> None:
    slots = [decode_key(records_of(snapshot(v), kept=4)[-1].key)[1] for v in range(1, 20)]
    for i in range(len(slots) - 4):
        assert len(set(slots[i : i + 4 + SPARE_SLOTS])) == len(slots[i : i + 4 + SPARE_SLOTS])
    assert set(slots) == set(range(4 + SPARE_SLOTS))


def assemble(records: Sequence[Record]) -> list[tuple[str, int]]:
    """(model, version) of what comes together, in order; raises at the first that is refused."""
    assembler, out = Assembler(), []
    for record in records:
        whole = assembler.add(record)
        if whole is not None:
            out.append((whole[0].manifest.model_id, whole[0].manifest.version))
    return out


@given(st.randoms(use_true_random=False))
def test_models_may_interleave(rng: random.Random) -> None:
    queues = [records_of(_SNAPSHOTS[m, 1]) + records_of(_SNAPSHOTS[m, 2]) for m in "ab"]
    mixed = []
    while any(queues):
        mixed.append(rng.choice([q for q in queues if q]).pop(0))
    assert sorted(assemble(mixed)) == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]


_SNAPSHOTS = {(m, v): snapshot(v, m) for m in "ab" for v in (1, 2)}


def test_the_offset_of_the_first_record_is_known() -> None:
    assembler = Assembler()
    for record in records_of(snapshot(1), first_offset=40):
        whole = assembler.add(record)
    assert whole is not None
    assert whole[1:] == (1, 40)


def test_a_missing_chunk_is_incomplete() -> None:
    records = records_of(snapshot(1))
    with pytest.raises(IncompleteError, match="incomplete"):
        assemble(records[1:])


def test_a_chunk_of_another_version_in_the_slot_does_not_count() -> None:
    """Compaction took version 1's second chunk; version 7 shares its slot and came only in part."""
    old, new = records_of(snapshot(1)), records_of(snapshot(1 + 4 + SPARE_SLOTS, fill=0.5))
    assert old[0].key == new[0].key
    with pytest.raises(IncompleteError):
        assemble([old[0], new[1], new[-1]])
    with pytest.raises(IncompleteError):
        assemble([new[0], new[1], old[-1]])
    assert assemble([old[0], *new]) == [("m", 7)]


def test_a_tombstone_takes_the_chunks_away() -> None:
    records = records_of(snapshot(1))
    with pytest.raises(IncompleteError):
        assemble([records[0], Record(records[0].key, None, []), *records[1:]])


def test_a_flipped_bit_is_refused() -> None:
    records = records_of(snapshot(1))
    value = bytearray(records[0].value or b"")
    value[1000] ^= 1
    with pytest.raises(WeightsError, match="sha256"):
        assemble([replace(records[0], value=bytes(value)), *records[1:]])


def test_a_manifest_under_another_models_key_is_refused() -> None:
    records = records_of(snapshot(1, "m"))
    stolen = [replace(r, key=encode_key("victim", *decode_key(r.key)[1:])) for r in records]
    with pytest.raises(WeightsError, match="stands under the key"):
        assemble(stolen)


@pytest.mark.parametrize("value", [b"", b"{}", b"not json", b'{"model_id": "m"}'])
def test_a_manifest_that_is_none_is_refused(value: bytes) -> None:
    records = records_of(snapshot(1))
    with pytest.raises(WeightsError, match="no manifest"):
        assemble([*records[:-1], replace(records[-1], value=value)])


def test_a_version_header_that_is_none_is_refused() -> None:
    records = records_of(snapshot(1))
    with pytest.raises(WeightsError, match="version header"):
        assemble([replace(records[0], headers=[("version", b"-1")])])


# --- over Kafka -------------------------------------------------------------------------------------------


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
    """Notes what a follower handed over."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    async def __call__(self, snapshot: WeightsSnapshot, model: CortexModel) -> None:
        assert not model.training
        self.seen.append((snapshot.manifest.model_id, snapshot.manifest.version))


@pytest.mark.integration
async def test_a_follower_starts_with_the_newest_and_then_gets_each(settings: Settings) -> None:
    await create_topics(settings)
    swaps = Swaps()
    async with producing(settings) as producer:
        await put(producer, settings, *(snapshot(v, "a") for v in (1, 2, 3)), snapshot(1, "b"))
        async with WeightsFollower(settings, swaps, keep_resume=True) as follower:
            await follower.caught_up.wait()
            await async_wait_for(lambda: len(swaps.seen) == 2, what="the newest of both models")
            assert sorted(swaps.seen) == [("a", 3), ("b", 1)]
            await put(producer, settings, snapshot(4, "a"), snapshot(5, "a"))
            await follower.catch_up()
            assert swaps.seen[2:] == [("a", 4), ("a", 5)]
            assert follower.models() == ["a", "b"]
            assert follower.resume("a") == b"r5"
            assert not follower.refused


@pytest.mark.integration
async def test_an_aborted_or_open_transaction_is_never_seen(settings: Settings) -> None:
    await create_topics(settings)
    swaps = Swaps()
    async with (
        producing(settings) as one,
        producing(settings, "u") as other,
        WeightsFollower(settings, swaps) as follower,
    ):
        await follower.caught_up.wait()
        await one.begin_transaction()
        await publish(one, settings, snapshot(1, "aborted"))
        await one.abort_transaction()
        await other.begin_transaction()
        await publish(other, settings, snapshot(1, "open"))
        await put(one, settings, snapshot(1, "whole"))
        await other.abort_transaction()
        await follower.catch_up()
        assert swaps.seen == [("whole", 1)]


@pytest.mark.integration
async def test_catching_up_waits_for_versions_behind_an_open_transaction(settings: Settings) -> None:
    """The end that a committed reader is told stops before the open transaction; a new trainer must not."""
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
    """Version 2 in shapes that must be refused; version 1 is good."""
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


@pytest.mark.integration
async def test_what_cannot_be_trusted_is_refused_and_what_is_served_stays(settings: Settings) -> None:
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


@pytest.mark.integration
async def test_older_and_equal_versions_are_ignored(settings: Settings) -> None:
    await create_topics(settings)
    swaps = Swaps()
    async with producing(settings) as producer, WeightsFollower(settings, swaps) as follower:
        await follower.caught_up.wait()
        await put(producer, settings, snapshot(3), snapshot(2), snapshot(3, fill=0.25), snapshot(4))
        await follower.catch_up()
        assert swaps.seen == [("m", 3), ("m", 4)]
        assert [m.version for m in follower.history("m")] == [3, 4]


@pytest.mark.integration
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


@pytest.mark.integration
async def test_after_compaction_the_last_versions_are_still_there(settings: Settings) -> None:
    """What compaction leaves of 23 versions: the newest record of each key, holes everywhere else."""
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
            await follower.caught_up.wait()
            assert [m.version for m in follower.history("m")] == [20, 21, 22, 23]
            assert follower.refused == {"incomplete": 1}


@pytest.mark.integration
async def test_tombstones_shorten_the_history_and_not_what_is_served(settings: Settings) -> None:
    await create_topics(settings)
    async with producing(settings) as producer, WeightsFollower(settings) as follower:
        await put(producer, settings, snapshot(1), snapshot(2))
        for v in (1, 2):
            await send_raw(producer, settings, [Record(r.key, None, []) for r in records_of(snapshot(v))])
        await follower.catch_up()
        assert [m.version for m in follower.history("m")] == [2]
        assert not follower.refused


@pytest.mark.integration
async def test_a_client_that_stands_still_is_replaced(settings: Settings, monkeypatch: Any) -> None:
    """A broker restart can leave aiokafka's fetcher silent for good; reading must go on all the same."""
    from aiokafka import AIOKafkaConsumer

    from streams import follow

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


@pytest.mark.integration
async def test_a_callback_that_fails_stops_nothing(settings: Settings) -> None:
    await create_topics(settings)
    seen: list[int] = []

    async def swap(snapshot: WeightsSnapshot, _model: CortexModel) -> None:
        seen.append(snapshot.manifest.version)
        raise ValueError("no room")

    async with producing(settings) as producer, WeightsFollower(settings, swap) as follower:
        await follower.caught_up.wait()
        await put(producer, settings, snapshot(1), snapshot(2))
        await follower.catch_up()
        assert seen == [1, 2]


async def test_an_unreachable_broker_is_named_and_waited_for(settings: Settings) -> None:
    said: list[str | None] = []
    away = settings.model_copy(update={"kafka": "127.0.0.1:1"})
    async with WeightsFollower(away, on_state=said.append) as follower:
        await async_wait_for(lambda: any(s and "127.0.0.1:1" in s for s in said), what="the address")
        assert not follower.caught_up.is_set()
