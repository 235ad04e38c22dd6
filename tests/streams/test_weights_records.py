"""The wire format of weights versions: how a version is split into records and assembled."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from cortex_core.errors import WeightsError
from streams.weights.records import MANIFEST, SPARE_SLOTS, Assembler, IncompleteError, decode_key, encode_key
from tests.streams.weights_records import Record, records_of, snapshot


@examples(deadline=None)
@given(st.text(min_size=1, max_size=200), st.integers(0, 50), st.just(MANIFEST) | st.integers(0, 99))
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


def test_chunks_stay_small_and_the_manifest_comes_last() -> None:
    records = records_of(snapshot(7))
    assert all(len(r.value or b"") <= 900_000 for r in records)
    assert [decode_key(r.key)[2] for r in records] == [*range(len(records) - 1), MANIFEST]
    assert len(records) > 2, "the test needs a model of several chunks"


def test_the_last_versions_have_slots_of_their_own() -> None:
    one = snapshot(1)
    numbered = [replace(one, manifest=one.manifest.model_copy(update={"version": v})) for v in range(1, 20)]
    slots = [decode_key(records_of(v, kept=4)[-1].key)[1] for v in numbered]
    for i in range(len(slots) - 4):
        assert len(set(slots[i : i + 4 + SPARE_SLOTS])) == len(slots[i : i + 4 + SPARE_SLOTS])
    assert set(slots) == set(range(4 + SPARE_SLOTS))


def assemble(records: Sequence[Record]) -> list[tuple[str, int]]:
    """(model, version) of each assembled version, in order; raises the first refusal."""
    assembler, out = Assembler(), []
    for record in records:
        whole = assembler.add(record)
        if whole is not None:
            out.append((whole[0].manifest.model_id, whole[0].manifest.version))
    return out


@examples(deadline=None, max_examples=25)
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
    """Compaction deleted version 1's second chunk; version 7 has the same slot and is incomplete."""
    old, new = records_of(snapshot(1)), records_of(snapshot(1 + 4 + SPARE_SLOTS, fill=0.5))
    assert old[0].key == new[0].key
    with pytest.raises(IncompleteError):
        assemble([old[0], new[1], new[-1]])
    with pytest.raises(IncompleteError):
        assemble([new[0], new[1], old[-1]])
    assert assemble([old[0], *new]) == [("m", 7)]


def test_a_tombstone_removes_the_chunks() -> None:
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
    with pytest.raises(WeightsError, match="has the key of"):
        assemble(stolen)


@pytest.mark.parametrize("value", [b"", b"{}", b"not json", b'{"model_id": "m"}'])
def test_an_invalid_manifest_is_refused(value: bytes) -> None:
    records = records_of(snapshot(1))
    with pytest.raises(WeightsError, match="invalid manifest"):
        assemble([*records[:-1], replace(records[-1], value=value)])


def test_an_invalid_version_header_is_refused() -> None:
    records = records_of(snapshot(1))
    with pytest.raises(WeightsError, match="version header"):
        assemble([replace(records[0], headers=[("version", b"-1")])])
