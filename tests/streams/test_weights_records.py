"""The wire format of weights versions, and which of the manifests on the topic are valid."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from cortex_core.errors import WeightsError
from cortex_core.weights import WeightsManifest, WeightsSnapshot
from streams.kafka.topics import Topics, partition_of
from streams.settings import Settings
from streams.weights.records import (
    MANIFEST,
    RESUME,
    SPARE_SLOTS,
    Location,
    decode_key,
    decode_manifest,
    encode_key,
)
from streams.weights.versions import UnrelatedError, Versions
from tests.streams.weights_records import Record, records_of, snapshot

SETTINGS = Settings(topic_prefix="t")
TOPICS = Topics.of(SETTINGS)


def manifest_record(
    version: int,
    model_id: str = "m",
    *,
    parent: int | None = -1,
    partition: int = 0,
    offset: int = 0,
    payload: bytes | None = b"1:20:24",
    value: bytes | None = None,
    **changes: Any,
) -> Record:
    """The record of a manifest whose payload is on the topic of payloads."""
    made = manifest(model_id).model_copy(
        update={"version": version, "parent": version - 1 or None if parent == -1 else parent} | changes
    )
    headers = [("version", str(version).encode()), ("resume", b'{"control_offset": 3}')]
    headers += [("payload", payload)] if payload is not None else []
    value = made.model_dump_json().encode() if value is None else value
    return Record(encode_key(model_id, version % 6, MANIFEST), value, headers, offset, partition)


def manifest(model_id: str = "m") -> WeightsManifest:
    return snapshot(1).manifest.model_copy(update={"model_id": model_id})


@examples(deadline=None)
@given(
    st.text(min_size=1, max_size=200),
    st.integers(0, 50),
    st.sampled_from([MANIFEST, RESUME]) | st.integers(0, 99),
)
def test_keys_round_trip(model_id: str, slot: int, part: int | str) -> None:
    try:
        raw = encode_key(model_id, slot, part)
    except UnicodeEncodeError:  # a lone surrogate is no UTF-8; ids that came over the wire hold none
        return
    assert decode_key(raw) == (model_id, slot, part)


@pytest.mark.parametrize(
    "raw", [None, b"", b"m", b"[]", b'["m",1]', b'["m",1,"other"]', b'["m",true,0]', b"[1,1,1]"]
)
def test_an_invalid_key_is_refused(raw: bytes | None) -> None:
    with pytest.raises(WeightsError, match="key"):
        decode_key(raw)


def test_a_manifest_says_where_its_payload_is() -> None:
    stored = decode_manifest(manifest_record(7, partition=5), TOPICS)
    assert stored.location == Location("t.payloads", 1, 20, 24)
    assert (stored.slot, stored.partition, stored.resume) == (1, 5, b'{"control_offset": 3}')


@pytest.mark.parametrize("payload", [b"", b"1:2", b"1:2:x", b"1:2:-3", b"1:2:3:4", b"1:2:" + b"9" * 30])
def test_a_place_that_cannot_be_read_is_refused(payload: bytes) -> None:
    with pytest.raises(WeightsError, match="header payload"):
        decode_manifest(manifest_record(1, payload=payload), TOPICS)


def test_a_manifest_under_another_models_key_is_refused() -> None:
    record = manifest_record(1)
    with pytest.raises(WeightsError, match="has the key of"):
        decode_manifest(replace(record, key=encode_key("victim", 1, MANIFEST)), TOPICS)


@pytest.mark.parametrize("value", [b"", b"{}", b"not json", b'{"model_id": "m"}'])
def test_an_invalid_manifest_is_refused(value: bytes) -> None:
    with pytest.raises(WeightsError, match="invalid manifest"):
        decode_manifest(manifest_record(1, value=value), TOPICS)


def test_an_invalid_version_header_is_refused() -> None:
    with pytest.raises(WeightsError, match="version header"):
        decode_manifest(replace(manifest_record(1), headers=[("version", b"-1")]), TOPICS)


@pytest.mark.parametrize("chunks", [2, 20_000_000, 10**9])
def test_a_manifest_may_not_declare_any_number_of_chunks(chunks: int) -> None:
    """Checked before anything is allocated: the larger ones would exhaust the memory."""
    with pytest.raises(WeightsError, match=f"declare {chunks} chunks"):
        decode_manifest(manifest_record(1, chunks=chunks), TOPICS)


# --- versions -----------------------------------------------------------------------------------------------


def test_the_last_versions_are_kept_and_older_ones_ignored() -> None:
    versions = Versions(SETTINGS)
    assert [versions.add(manifest_record(v), 8) for v in (1, 2, 3, 4, 5, 4, 5, 6)] == [
        *["m"] * 5,
        None,
        None,
        "m",
    ]
    assert [m.version for m in versions.history("m")] == [3, 4, 5, 6]
    assert versions.models() == ["m"]


def test_a_discarded_version_gives_way_to_the_one_before_and_its_number_is_not_used_again() -> None:
    versions = Versions(SETTINGS)
    for v in (1, 2):
        versions.add(manifest_record(v), 8)
    newest = versions.get("m")
    assert newest is not None
    versions.discard(newest)
    assert versions.newest("m") == manifest("m")
    assert versions.highest("m") == 2
    versions.add(manifest_record(3, parent=1), 8)
    assert [m.version for m in versions.history("m")] == [1, 3]


def test_a_model_whose_records_are_all_deleted_is_forgotten_and_may_begin_again() -> None:
    versions = Versions(SETTINGS)
    for v in (1, 2, 3):
        versions.add(manifest_record(v), 8)
    dead = versions.tombstones("m")
    payloads, manifests = [t for t in dead if t[0] == "t.payloads"], [t for t in dead if t[0] == "t.weights"]
    assert payloads == [
        ("t.payloads", 1, encode_key("m", s, p)) for s in (1, 2, 3) for p in (0, 1, 2, 3, RESUME)
    ]
    assert manifests == [("t.weights", 0, encode_key("m", s, MANIFEST)) for s in (1, 2, 3)]
    changes = [versions.add(Record(key, None, [], 0, partition), 8) for _, partition, key in manifests]
    assert changes == ["m", "m", "m"]
    assert not versions.models()
    assert not versions.has_records("m")
    assert not versions.tombstones("m")
    assert versions.highest("m") == 0
    assert versions.add(manifest_record(1), 8) == "m"


def test_added_partitions_continue_a_model_in_another_one() -> None:
    before, after = partition_of("m", 2), partition_of("m", 3)
    assert before != after, "the test needs a model that moves"
    versions = Versions(SETTINGS)
    for v in (1, 2, 3):
        versions.add(manifest_record(v, partition=before), 2)
    for v in (4, 5):
        versions.add(manifest_record(v, partition=after), 3)
    assert [m.version for m in versions.history("m")] == [2, 3, 4, 5]
    # A reader that starts now may read the later partition first.
    another = Versions(SETTINGS)
    for v, partition in ((4, after), (5, after), (1, before), (2, before), (3, before)):
        another.add(manifest_record(v, partition=partition), 3)
    assert [m.version for m in another.history("m")] == [4, 5]


def test_a_version_far_from_the_newest_needs_a_parent() -> None:
    versions = Versions(SETTINGS)
    versions.add(manifest_record(1), 8)
    with pytest.raises(UnrelatedError, match="parent"):
        versions.add(manifest_record(100), 8)
    versions.add(manifest_record(101), 8)
    assert [m.version for m in versions.history("m")] == [101]


# --- as before there was a topic of payloads ----------------------------------------------------------------


@examples(deadline=None, max_examples=25)
@given(st.randoms(use_true_random=False))
def test_chunks_on_the_weights_topic_are_located_though_models_interleave(rng: random.Random) -> None:
    queues = [records_of(_SNAPSHOTS[m, 1]) + records_of(_SNAPSHOTS[m, 2]) for m in "ab"]
    versions, first = Versions(SETTINGS), dict[tuple[str, bytes], int]()
    offset = 0
    while any(queues):
        record = replace(rng.choice([q for q in queues if q]).pop(0), offset=offset, partition=3)
        first.setdefault((json.loads(record.key)[0], dict(record.headers)["version"]), offset)
        versions.add(record, 8)
        offset += 1
    for model_id in "ab":
        stored = versions.get(model_id)
        assert stored is not None
        assert stored.location.topic == "t.weights"
        assert (stored.location.partition, stored.location.first) == (3, first[model_id, b"2"])


_SNAPSHOTS: dict[tuple[str, int], WeightsSnapshot] = {(m, v): snapshot(v, m) for m in "ab" for v in (1, 2)}


def test_chunks_beside_their_manifest_are_to_be_deleted_when_the_slot_is_used_again() -> None:
    versions = Versions(SETTINGS)
    records = records_of(snapshot(1))
    for record in records:
        versions.add(record, 1)
    beside = versions.chunks_beside("m", 1)
    assert beside == [("t.weights", 0, encode_key("m", 1, p)) for p in (0, 1, 2, 3, RESUME)]
    assert not versions.chunks_beside("m", 2)
    versions.add(manifest_record(1 + 4 + SPARE_SLOTS), 1)
    for _, _, key in beside:
        versions.add(Record(key, None, []), 1)
    assert not versions.chunks_beside("m", 1)
    assert versions.has_records("m")
