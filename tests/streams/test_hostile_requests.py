"""Requests that are meant to cost much: refused cheaply, and nothing of them is kept."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import tracemalloc
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from pydantic_core import from_json

from cortex_core.errors import InputError, shown
from cortex_core.metadata import metadata_features
from streams.events import DeadLetter, InteractionEvent, ReplyEvent, parse
from streams.inference.api import DecideRequest, Memory, ReplyResponse, RequestError
from streams.inference.once import IdempotentPublisher, Record
from streams.kafka.publisher import Publisher
from streams.kafka.topics import Topics
from streams.settings import Settings
from streams.testing.events import at, interaction
from tests.streams.serving import JSON, body, raw, served

MANY = 20_000

FLOODS: dict[str, dict[str, Any]] = {
    "numbers": {"memories": [1] * MANY},
    "empty objects": {"memories": [{}] * MANY},
    "ids that are numbers": {"memories": [{"id": 1}] * MANY},
    "lists": {"memories": [[]] * MANY},
    "good ones, too many": {"memories": [{"id": str(n), "text": "t"} for n in range(MANY)]},
    "messages that are numbers": {"history": [1] * MANY},
    "unknown fields": {str(n): 1 for n in range(MANY)},
    "unknown fields of a memory": {"memories": [{"id": "m", "text": "t"} | {str(n): 1 for n in range(MANY)}]},
    "metadata": {"metadata": {str(n): 1 for n in range(MANY)}},
    "a long field": {"x" * 1_000_000: 1},
    "a long embedding": {"memories": [{"id": "m", "embedding": [0.1] * 300_000}]},
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_of_unusable_values_is_one_short_error(name: str) -> None:
    with pytest.raises(ValidationError) as caught:
        DecideRequest.model_validate(body(**FLOODS[name]))
    assert caught.value.error_count() == 1


def test_a_flood_in_a_record_is_one_error() -> None:
    event = json.loads(interaction("i").to_bytes())
    for name in ("memory_ids", "memory_scores", "metadata", "strategy_ids", "probabilities", "context"):
        with pytest.raises(ValidationError) as caught:
            InteractionEvent.model_validate(event | {name: [None] * MANY})
        assert caught.value.error_count() == 1


# Each was answered 500, or took memory without a bound.
ABSURD: dict[str, Any] = {
    "idle_s of 400 digits": {"metadata": {"idle_s": 10**400}},
    "conversation_length of 400 digits": {"metadata": {"conversation_length": -(10**400)}},
    "hour_of_day of 400 digits": {"metadata": {"hour_of_day": 10**400}},
    "a megabyte of an hour": {"metadata": {"hour_of_day": "9" * 1_000_000}},
    "a truth for an hour": {"metadata": {"hour_of_day": True}},
    "top_k of 400 digits": {"top_k": 10**400},
    "a truth for top_k": {"top_k": True},
    "a word for explore": {"explore": "yes"},
    "an embedding of 400 digits": {"memories": [{"id": "m", "embedding": [10**400] * 384}]},
    "an embedding of words, one of them long": {
        "memories": [{"id": "m", "embedding": ["a"] * 50_000 + ["a" * 1_000_000]}]
    },
    "an embedding of nothing": {"memories": [{"id": "m", "embedding": [None] * 384}]},
    "an embedding of objects": {"memories": [{"id": "m", "embedding": [{}] * 384}]},
    "a shape beyond any array": {"memories": [{"id": "m", "embedding": {"shape": [0, 10**30], "f16": ""}}]},
    "a shape of 4,000 digits": {
        "memories": [{"id": "m", "embedding": {"shape": [10**4000, 10**4000], "f16": "AA=="}}]
    },
    "numbers beyond float32": {"memories": [{"id": "m", "embedding": [10**300] * 385}]},
}


@pytest.mark.integration
async def test_absurd_values_are_refused_in_few_words(settings: Settings) -> None:
    async with served(settings) as (_, http):
        for name, fields in (ABSURD | FLOODS).items():
            answer = await http.post("/v1/decide", content=raw(**fields), headers=JSON)
            assert answer.status_code == 422, (name, answer.text[:300])
            assert len(answer.content) < 3_000, name
        for rating in (True, False, "1", 10**400, [1]):
            reply = {"conversation_id": "c", "kind": "rating", "rating": rating}
            answer = await http.post("/v1/replies", json=reply)
            assert answer.status_code == 422, (rating, answer.text)
            assert "rating" in answer.json()["error"]["fields"]
        thumb = {"conversation_id": "c", "kind": "rating", "rating": -1}
        assert (await http.post("/v1/replies", json=thumb)).status_code == 202
        assert (await http.post("/v1/decide", json=body())).status_code == 200


@pytest.mark.integration
async def test_a_large_body_is_parsed_beside_the_event_loop(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []

    def noting(*args: Any, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        return from_json(*args, **options)

    monkeypatch.setattr("streams.inference.app.from_json", noting)
    memories = [{"id": str(n), "embedding": [0.001 * n] * 384} for n in range(1, 200)]
    async with served(settings) as (_, http):
        for fields in ({}, {"memories": memories}):
            assert (await http.post("/v1/decide", content=raw(**fields), headers=JSON)).status_code == 200
    assert threads == ["MainThread", "parse_0"]


def test_records_are_refused_by_one_error_whatever_they_hold() -> None:
    event = json.loads(interaction("i").to_bytes())
    for changes in (
        {"message": {"shape": [0, 10**30], "f16": ""}},
        {"weights_version": 10**400},
        {"metadata": [10**400]},
        {"schema_version": 10**400},
        {"memory_ids": "x" * 1_000_000},
    ):
        with pytest.raises(InputError) as caught:
            parse(InteractionEvent, json.dumps(event | changes).encode())
        assert len(str(caught.value)) < 2_000
    for value in (b"[" * 100_000, b"\xff", b'{"a":' * 100_000, b"9" * 5_000, b"", b"null"):
        with pytest.raises(InputError):
            parse(DeadLetter, value)
    for rating in (True, False, "1"):
        with pytest.raises(ValidationError):
            ReplyEvent(occurred_at=at(0), reply_id="r", conversation_id="c", kind="rating", rating=rating)
    assert (
        ReplyEvent(occurred_at=at(0), reply_id="r", conversation_id="c", kind="rating", rating=-1).rating
        == -1
    )


def test_a_message_shows_any_value_in_short() -> None:
    for value in (10**5000, "x" * 10**6, {n: n for n in range(10**5)}, [[[[[[[[1]]]]]]]], [10**5000], None):
        assert len(shown(value)) < 200
    with pytest.raises(InputError, match="idle_s"):
        metadata_features({"idle_s": 10**5000})
    with pytest.raises(InputError, match="idle_s"):
        metadata_features({"idle_s": "x" * 10**6})


def test_embeddings_of_all_kinds_of_numbers_are_taken() -> None:
    for row in (
        [1, 2.0],
        (1, 2),
        np.array([1, 2]),
        np.array([1, 2], np.float16),
        [np.float32(1), np.int64(2)],
    ):
        embedding = Memory.model_validate({"id": "m", "embedding": row}).embedding
        assert embedding is not None
        np.testing.assert_allclose(embedding, [0.4472136, 0.8944272], atol=1e-3)


# --- what is kept -------------------------------------------------------------------------------------------


@pytest.mark.integration
async def test_little_is_kept_of_what_was_answered(settings: Settings) -> None:
    """A reply may have 128 KB of text and a decision 80 KB of ids; a worker remembers thousands of each."""
    pad, turns = "\U0001f600" * 190, 20
    text = "\U0001f600" * 31_000

    async def converse(turn: int) -> None:
        memories = [{"id": f"{n}-{turn}-{pad}", "embedding": [1.0] + [0.01 * n] * 383} for n in range(100)]
        request = body(conversation_id=f"c{turn}", memories=memories, top_k=3, message="the same")
        (await http.post("/v1/decide", json=request)).raise_for_status()
        reply = {"conversation_id": f"c{turn}", "text": f"{turn}{text}", "kind": "rating", "rating": 1}
        (await http.post("/v1/replies", json=reply)).raise_for_status()

    async with served(settings) as (_, http):
        await converse(-1)
        tracemalloc.start()
        try:
            gc.collect()
            before, _ = tracemalloc.get_traced_memory()
            for turn in range(turns):
                await converse(turn)
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert (after - before) / turns < 30_000


@pytest.mark.integration
async def test_what_is_remembered_is_bounded_in_bytes(settings: Settings) -> None:
    publisher = Publisher(settings)
    await publisher.start()
    once = IdempotentPublisher(ReplyResponse, "reply_id", publisher, capacity_bytes=20_000)
    made: list[str] = []

    async def ask(id_: str, fingerprint: bytes = b"f") -> ReplyResponse:
        async def make() -> Record[ReplyResponse]:
            made.append(id_)
            response = ReplyResponse(reply_id=id_ + "x" * 3_000, occurred_at=at(0))
            return Record(response, Topics.of(settings).replies, b"c", b"v" * 5_000)

        return await once.answer(id_, "c", fingerprint, make)

    try:
        first = [await ask(f"r{n}") for n in range(10)]
        assert [n for n in range(10) if once.known(f"r{n}")] == [6, 7, 8, 9]
        assert [await ask(f"r{n}") for n in (9, 8)] == [first[9], first[8]]
        assert made == [f"r{n}" for n in range(10)]
        with pytest.raises(RequestError, match="another request"):
            await ask("r9", b"g")
        several = await asyncio.gather(*(ask("together") for _ in range(5)))
        assert (len({s.reply_id for s in several}), made.count("together")) == (1, 1)
    finally:
        await publisher.stop()
