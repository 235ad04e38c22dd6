"""The join's decoders accept the same events as the models, with the same values, and keep the bytes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex_core.errors import InputError
from streams.events import ExperienceEvent, InteractionEvent, ReplyEvent, parse
from streams.joiner import decode
from streams.joiner.decode import Reply, decode_experience, decode_interaction, decode_reply, message_of
from streams.testing import interaction, reply

T = TypeVar("T")
INTERACTIONS = [
    json.loads(interaction("i1").to_bytes()),
    json.loads(interaction("i1", dim=1, memories=0, memory_propensities=[]).to_bytes()),
    json.loads(interaction("i1", text="hello").to_bytes()),
]
REPLIES = [
    json.loads(reply("r1", "i1", embedding=np.ones(3)).to_bytes()),
    json.loads(reply("r1").to_bytes()),
    json.loads(reply("r1", kind="rating", rating=0.5, text="").to_bytes()),
]

ARRAYS: list[Any] = [
    {"shape": shape, "f16": f16}
    for shape in ([1], [2], [0], [1, 1], [0, 0], [-1], [1.0], [True], [1, 1, 1], [0, 10**6 + 1], [], None)
    for f16 in ("AAA=", "AAAA", "AHw=", "AH4=", "AAB=", "AAA", "AAA=\n", "AA-_", "", 1)
]
TIMES = [
    "2026-01-02T03:04:05Z", "2026-01-02T03:04:05.123456789+02:00", "2026-01-02", "2026-01-02T03:04:05",
    "2026-W01-1T00:00:00Z", "20260102T030405Z", "2026-01-02 03:04:05Z", "2026-01-02t03:04:05z",
    "2026-01-02T24:00:00Z", "2026-01-02T23:59:60Z", "0001-01-01T00:00:00+14:00", "1700000000", 1700000000,
]  # fmt: skip
ODD: list[Any] = [
        None, True, False, 0, 1, -1, 2, 0.5, 1.5, -0.0, 1e-320, 3.0, 2**53, 2**63, 2**70,
        float("inf"), float("nan"), "", " ", "x", "0.5", "1", "true", "y" * 200, "y" * 201, "é" * 200,
        "\ud800", "\n", '"', [], [1], ["a"], {}, {"shape": [1], "f16": "AAA=", "more": 1}, *TIMES, *ARRAYS,
]  # fmt: skip
DRAW_ODD = st.sampled_from(ODD).map(copy.deepcopy)
BYTES = st.sampled_from(
    [b"\xff", b"\\u0000", b"\\ud800", b"NaN", b"-0", b"1e400", b"01", b" ", b"\n", b'"', b"{", b",", b"null,",
     b'"text":"my secret",', b'"te\\u0078t":"my secret",', b'"model_id":"other",', b'"new":{"text":null},']
)  # fmt: skip


@st.composite
def altered(draw: st.DrawFn, events: list[dict[str, Any]]) -> bytes:
    """An event as JSON, with fields replaced, removed or added, and sometimes bytes inserted or removed."""
    event = json.loads(json.dumps(draw(st.sampled_from(events))))
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from([*event, "new"]))
        value = event.get(name)
        match draw(st.sampled_from(["replace", "replace", "inside", "remove"])):
            case "inside" if isinstance(value, list) and value:
                value[draw(st.integers(0, len(value) - 1))] = draw(DRAW_ODD)
            case "inside" if isinstance(value, dict) and value:
                value[draw(st.sampled_from(sorted(value)))] = draw(DRAW_ODD)
            case "remove":
                event.pop(name, None)
            case _:
                event[name] = draw(DRAW_ODD)
    separators = draw(st.sampled_from([(",", ":"), (", ", ": ")]))
    text = json.dumps(event, ensure_ascii=draw(st.booleans()), separators=separators)
    raw = text.encode("utf-8", "surrogatepass")
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        at = draw(st.integers(0, len(raw)))
        raw = raw[:at] + draw(BYTES) + raw[at + draw(st.integers(0, 2)) :]
    return raw


class SlowError(Exception):
    """A model was called."""


def without_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise SlowError

    monkeypatch.setattr(decode, "parse", refuse)


def outcome(read: Callable[[], T]) -> T | str:
    """The result of `read`, or the message of its error."""
    try:
        return read()
    except InputError as error:
        return str(error)


def same(a: InteractionEvent, b: InteractionEvent) -> bool:
    return a.model_copy(update={"text": None}).to_bytes() == b.model_copy(update={"text": None}).to_bytes()


def check_interaction(raw: bytes, store_text: bool) -> None:
    wanted = outcome(lambda: parse(InteractionEvent, raw))
    got = outcome(lambda: decode_interaction(raw, store_text=store_text))
    if isinstance(wanted, str) or isinstance(got, str):
        assert got == wanted
        return
    assert (got.id, got.conversation_id) == (wanted.interaction_id, wanted.conversation_id)
    assert (got.model_id, got.at) == (wanted.model_id, wanted.occurred_at.timestamp())
    kept = parse(InteractionEvent, got.body)
    assert same(kept, wanted)
    assert kept.text == (wanted.text if store_text else None)
    assert json.loads(got.body)["occurred_at"] == got.occurred_at
    assert message_of(got.body).tolist() == wanted.message.tolist()
    assert got.body == raw or set(json.loads(got.body)) == set(InteractionEvent.model_fields)
    assert store_text or b"my secret" not in got.body
    # Decoding a stored body again does not change it.
    assert decode_interaction(got.body, store_text=store_text).body == got.body


def check_reply(raw: bytes) -> None:
    wanted = outcome(lambda: parse(ReplyEvent, raw))
    got = outcome(lambda: decode_reply(raw))
    if isinstance(wanted, str) or isinstance(got, str):
        assert got == wanted
        return
    for name in Reply.__struct_fields__:
        here, there = getattr(got, name), getattr(wanted, name)
        assert type(here) is type(there)
        assert np.array_equal(here, there)


def with_each_field_odd(event: dict[str, Any]) -> Iterator[bytes]:
    """The event with each field, and the last item of each list, replaced by each odd value."""
    for name, value in [*event.items(), ("new", None)]:
        for odd in ODD:
            yield json.dumps(event | {name: odd}).encode()
            if isinstance(value, list) and value:
                yield json.dumps(event | {name: [*value[:-1], odd]}).encode()
            elif isinstance(value, dict):
                for part in value:
                    yield json.dumps(event | {name: value | {part: odd}}).encode()


@pytest.mark.parametrize("event", INTERACTIONS)
def test_every_field_of_an_interaction_is_checked_as_the_model_does(event: dict[str, Any]) -> None:
    for raw in with_each_field_odd(event):
        check_interaction(raw, store_text=False)


@pytest.mark.parametrize("event", REPLIES)
def test_every_field_of_a_reply_is_checked_as_the_model_does(event: dict[str, Any]) -> None:
    for raw in with_each_field_odd(event):
        check_reply(raw)


@given(raw=altered(INTERACTIONS), store_text=st.booleans())
@settings(max_examples=400, deadline=None)
def test_interactions_equal_the_model_s_and_keep_their_bytes(raw: bytes, store_text: bool) -> None:
    check_interaction(raw, store_text)


@given(raw=altered(REPLIES))
@settings(max_examples=400, deadline=None)
def test_replies_equal_the_model_s(raw: bytes) -> None:
    check_reply(raw)


@pytest.mark.parametrize(
    "doubled",
    [
        b'"text":"my secret",',
        b'"te\\u0078t":"my secret",',
        b'"new":{"text":"my secret"},',
        b'"a":"my secret",',
    ],
)
@pytest.mark.parametrize("place", [b'"metadata"', b'"text"'])
def test_stored_bytes_contain_no_hidden_text(doubled: bytes, place: bytes) -> None:
    raw = interaction("i1").to_bytes().replace(place, doubled + place)
    check_interaction(raw, store_text=False)


def test_events_of_our_producers_need_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    without_models(monkeypatch)
    for event in (interaction("i1"), interaction("i2", dim=384, memories=8), interaction("é", memories=0,
                  memory_scores=[], memory_propensities=[])):  # fmt: skip
        raw = event.to_bytes()
        assert decode_interaction(raw, store_text=False).body is raw
    with_text = interaction("i1", text="hello").to_bytes()
    assert decode_interaction(with_text, store_text=True).body is with_text
    with pytest.raises(SlowError):
        decode_interaction(with_text, store_text=False)
    for produced in (
        reply("r1"),
        reply("r1", "i1", embedding=np.ones(384)),
        reply("r", kind="outcome", rating=-1.0, text=""),
    ):
        decode_reply(produced.to_bytes())


def test_a_tombstone_is_refused() -> None:
    for read in (decode_reply, lambda value: decode_interaction(value, store_text=False)):
        with pytest.raises(InputError, match="tombstone"):
            read(None)


def test_an_experience_keeps_the_interaction_s_bytes() -> None:
    body = json.dumps(INTERACTIONS[0], indent=1).encode()
    event = {
        "reward": 0.5,
        "outcome": "no_reply",
        "revision": 0,
        "occurred_at": "2026-01-02T03:04:05Z",
        "more": [1],
    }
    raw = json.dumps(event).encode()[:-1] + b',"interaction":' + body + b',"readings":[{"a":1}]}'
    stored = decode_experience(raw)
    assert stored is not None
    assert bytes(stored.interaction) == body
    assert (stored.readings, stored.occurred_at) == ([{"a": 1}], event["occurred_at"])
    assert parse(ExperienceEvent, raw.replace(b'{"a":1}', b"")).reward == 0.5
    assert decode_experience(b'{"situation_emb":[1.0]}') is None
