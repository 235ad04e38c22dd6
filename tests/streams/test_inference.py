"""The inference service in this process, on a real Kafka: what it logs, what it refuses, what it serves."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from cortex_core.errors import ConfigError, UnavailableError
from cortex_core.model import CortexModel
from cortex_core.text_encoder import HashingEncoder
from cortex_core.weights import WeightsManifest
from streams.inference.api import DecideRequest, Memory, unit_vector
from streams.inference.models import Models
from streams.inference.service import Service
from streams.settings import Settings
from streams.testing import async_wait_for
from streams.weights.architecture import model_config
from streams.weights.control import send_control
from tests.streams.serving import (
    JSON,
    body,
    decided_by,
    interactions,
    publish_versions,
    raw,
    replies,
    seeded,
    served,
    version,
)

MEMORIES = [{"id": f"m{i}", "text": f"memory {i} about topic {i % 5} and billing"} for i in range(20)]


# --- what is logged -----------------------------------------------------------------------------------------


@pytest.mark.integration
async def test_what_is_logged_is_what_the_model_saw(settings: Settings) -> None:
    given_embedding = (np.arange(384) % 7 - 3.0) * 1e-7  # would vanish in float16 as it is
    memories = [*MEMORIES, {"id": "given", "embedding": given_embedding.tolist()}]
    request = body(memories=memories, history=["hello", "what about it?"], metadata={"hour_of_day": 23})
    async with served(settings) as (_, http):
        answer = (await http.post("/v1/decide", json=request)).raise_for_status().json()
        [event] = await interactions(settings)

    # Deciding again, on nothing but what the event holds and its id's chance, gives the same decision.
    texts = HashingEncoder()
    rows = [
        unit_vector(given_embedding) if m["id"] == "given" else texts.encode(str(m["text"])) for m in memories
    ]
    model = CortexModel.create(model_config(settings), "default")
    again = model.decide(
        event.message.astype(np.float32),
        event.history.astype(np.float32),
        np.array(event.metadata, dtype=np.float32),
        np.stack(rows).astype(np.float16).astype(np.float32),
        top_k=settings.top_k,
        rng=seeded(event.interaction_id),
    )
    assert event.situation.tolist() == again.situation.astype(np.float16).tolist()
    assert (event.strategy_id, event.confidence) == (again.strategy_id, again.confidence)
    assert event.probabilities == again.probabilities.tolist()
    assert event.context == again.context
    assert (event.memory_scores, event.memory_propensities) == (
        again.memory_scores,
        again.memory_propensities,
    )
    retrieved = [memories[i]["id"] for i in again.memory_indices]
    assert event.memory_ids[: settings.top_k] == retrieved == [m["id"] for m in answer["memories"]]
    assert len(event.memory_ids) == len(set(event.memory_ids)) == settings.top_k + settings.logged_negatives
    by_id = dict(zip([m["id"] for m in memories], rows, strict=True))
    for memory_id, row in zip(event.memory_ids, event.memories, strict=True):
        assert row.tolist() == by_id[memory_id].astype(np.float16).tolist()
    past = unit_vector(np.mean([texts.encode("hello"), texts.encode("what about it?")], axis=0))
    np.testing.assert_allclose(event.history, past, atol=1e-3)
    assert answer["strategy"]["id"] == event.strategy_id
    assert answer["probabilities"] == dict(zip(event.strategy_ids, event.probabilities, strict=True))
    assert event.text is None


@pytest.mark.integration
async def test_without_exploring_the_best_is_certain(settings: Settings) -> None:
    await publish_versions(settings, version(settings, 1))
    async with served(settings.model_copy(update={"store_text": True})) as (_, http):
        request = body(memories=MEMORIES, explore=False, top_k=2)
        answer = (await http.post("/v1/decide", json=request)).raise_for_status().json()
        [event] = await interactions(settings)
    assert (answer["weights_version"], event.weights_version) == (1, 1)
    assert event.propensity == 1.0
    assert max(answer["probabilities"], key=answer["probabilities"].get) == event.strategy_id
    assert event.memory_propensities == [1.0, 1.0]
    assert event.memory_scores == sorted(event.memory_scores, reverse=True)
    assert event.text == request["message"]


@pytest.mark.integration
async def test_no_memories_no_history(settings: Settings) -> None:
    async with served(settings) as (_, http):
        answer = (await http.post("/v1/decide", json=body())).raise_for_status().json()
        [event] = await interactions(settings)
    assert answer["memories"] == []
    assert event.memories.shape == (0, 384)
    assert not event.history.any()


@pytest.mark.integration
async def test_the_same_memory_under_several_ids_takes_one_place(settings: Settings) -> None:
    row = (np.arange(384) % 5 - 2.0).tolist()
    memories = [
        *({"id": f"copy-{n}", "text": "Deploys run on Fridays."} for n in range(4)),
        {"id": "blue", "text": "Deploys go to the staging cluster first."},
        {"id": "own", "embedding": row},
        {"id": "own again", "embedding": [2.0 * x for x in row]},
        {"id": "silent", "text": "?"},
        {"id": "as silent", "text": "!"},
    ]
    async with served(settings) as (_, http):
        request = body(message="When do deploys run?", memories=memories, top_k=8, explore=False)
        answer = (await http.post("/v1/decide", json=request)).raise_for_status().json()
        [event] = await interactions(settings)
    ids = [m["id"] for m in answer["memories"]]
    assert sorted(ids) == ["as silent", "blue", "copy-0", "own", "silent"]
    assert event.memory_ids == ids


# --- repetition -------------------------------------------------------------------------------------------


@pytest.mark.integration
async def test_a_repeated_id_is_one_interaction(settings: Settings) -> None:
    request = body(memories=MEMORIES, interaction_id="mine")
    async with served(settings) as (_, http):
        answers = await asyncio.gather(*(http.post("/v1/decide", json=request) for _ in range(8)))
        assert {a.status_code for a in answers} == {200}
        assert len({a.content for a in answers}) == 1
        [event] = await interactions(settings)
        assert event.interaction_id == "mine"

        other = await http.post("/v1/decide", json=request | {"message": "something else"})
        assert other.status_code == 409
        assert "mine" in other.json()["error"]["message"]

        reply = {"conversation_id": "c-1", "interaction_id": "mine", "text": "thanks", "reply_id": "r"}
        told = await asyncio.gather(*(http.post("/v1/replies", json=reply) for _ in range(3)))
        assert {a.status_code for a in told} == {202}
        assert len(await replies(settings)) == 1
        assert (await http.post("/v1/replies", json=reply | {"text": "no"})).status_code == 409
    # Another worker, which remembers nothing, meets the same chance.
    async with served(settings) as (_, http):
        assert (await http.post("/v1/decide", json=request)).content == answers[0].content


@pytest.mark.integration
async def test_a_request_that_failed_may_be_mended_under_its_id(settings: Settings) -> None:
    async with served(settings) as (_, http):
        bad = body(interaction_id="mine", metadata={"hour_of_day": 99})
        assert (await http.post("/v1/decide", json=bad)).status_code == 422
        assert (await http.post("/v1/decide", json=body(interaction_id="mine"))).status_code == 200


# --- replies ------------------------------------------------------------------------------------------------


@pytest.mark.integration
async def test_replies_carry_embeddings(settings: Settings) -> None:
    async with served(settings) as (_, http):
        asked = (await http.post("/v1/decide", json=body())).json()
        for reply in (
            {"text": "thanks, that worked", "interaction_id": asked["interaction_id"], "reply_id": "named"},
            {"text": "thanks, that worked", "reply_id": "latest"},
            {"kind": "rating", "rating": -1, "reply_id": "rated"},
            {"text": "hm", "interaction_id": "unknown here", "reply_id": "unknown"},
        ):
            answer = await http.post("/v1/replies", json={"conversation_id": "c-1"} | reply)
            assert (answer.status_code, answer.json()["reply_id"]) == (202, reply["reply_id"])
        elsewhere = {"conversation_id": "c-2", "interaction_id": asked["interaction_id"], "text": "thanks"}
        refused = await http.post("/v1/replies", json=elsewhere)
        found = {event.reply_id: event for event in await replies(settings)}

    assert set(found) == {"named", "latest", "rated", "unknown"}
    thanks = HashingEncoder().encode("thanks, that worked").astype(np.float16).tolist()
    for name in ("named", "latest"):
        embedding = found[name].embedding
        assert embedding is not None
        assert embedding.tolist() == thanks
    assert found["named"].interaction_id == asked["interaction_id"]
    assert found["latest"].interaction_id is None
    assert (found["rated"].rating, found["rated"].embedding) == (-1.0, None)
    assert refused.status_code == 422
    assert "'c-1'" in refused.json()["error"]["message"]


# --- what is refused ----------------------------------------------------------------------------------------

NAN_ROW = [0.1] * 383 + [float("nan")]

BAD: dict[str, tuple[bytes, int, str]] = {
    "no json": (b'{"conversation_id": ', 400, "not valid JSON"),
    "not utf-8": (b'{"conversation_id": "\xff"}', 400, "not valid JSON"),
    "half a character": (b'{"conversation_id": "c", "message": "\\ud800"}', 400, "not valid JSON"),
    "an array": (b"[]", 422, "body"),
    "nothing": (b"", 422, "body"),
    "nested deep": (b"[" * 100_000, 400, "not valid JSON"),
    "no message": (b'{"conversation_id": "c"}', 422, "message: Field required"),
    "blank": (raw(message=" \n"), 422, "message is blank"),
    "number": (raw(message=5), 422, "message: Input should be a valid string (got 5)"),
    "misspelt": (raw(histroy=["a"]), 422, "histroy"),
    "long id": (raw(conversation_id="c" * 201), 422, "at most 200"),
    "empty id": (raw(interaction_id=""), 422, "interaction_id"),
    "model id": (raw(model_id="a{b}"), 422, "model_id"),
    "long model id": (raw(model_id="m" * 201), 422, "model_id"),
    "long text": (raw(message="x" * 101), 422, "message: 101 characters, expected at most 100"),
    "long history": (raw(history=["a", "x" * 101]), 422, "history.1: 101 characters"),
    "many memories": (raw(memories=[{"id": str(i), "text": "t"} for i in range(31)]), 422, "31 memories"),
    "empty memory": (raw(memories=[{"id": "m7"}]), 422, "memory 'm7' needs a text or an embedding"),
    "same id": (raw(memories=[{"id": "a", "text": "x"}, {"id": "a", "text": "y"}]), 422, "0 and 1 share"),
    "dimension": (
        raw(memories=[{"id": "a", "text": "x"}, {"id": "m7", "embedding": [1.0, 2.0]}]),
        422,
        "memories.1.embedding (id 'm7'): 2 numbers, expected 384",
    ),
    "nan": (
        raw(memories=[{"id": "a", "text": "x"}, {"id": "m7", "embedding": NAN_ROW}]),
        422,
        "memories.1.embedding (id 'm7'): contains NaN or infinity (at position 383)",
    ),
    "infinity": (raw(memories=[{"id": "m", "embedding": [float("-inf")] * 384}]), 422, "position 0"),
    "huge": (
        b'{"conversation_id":"c","message":"m","memories":[{"id":"m","embedding":[1e999]}]}',
        422,
        "NaN or",
    ),
    "words": (raw(memories=[{"id": "m", "embedding": ["1.0"] * 384}]), 422, "flat list of numbers"),
    "truth": (raw(memories=[{"id": "m", "embedding": [True] * 384}]), 422, "flat list of numbers"),
    "ragged": (raw(memories=[{"id": "m", "embedding": [[1.0], [1.0, 2.0]]}]), 422, "flat list of numbers"),
    "matrix": (raw(memories=[{"id": "m", "embedding": [[1.0] * 384]}]), 422, "shape (1, 384)"),
    "base64": (raw(memories=[{"id": "m", "embedding": {"shape": [384], "f16": "AAA"}}]), 422, "base64"),
    "hour": (raw(metadata={"hour_of_day": "noon"}), 422, "metadata['hour_of_day'] is 'noon'"),
    "nan hour": (raw(metadata={"idle_s": float("nan")}), 422, "metadata['idle_s'] contains NaN"),
    "top_k": (raw(top_k=101), 422, "top_k"),
}


@pytest.mark.integration
async def test_bad_requests_are_refused_with_what_was_wrong(settings: Settings) -> None:
    small = settings.model_copy(update={"max_text_chars": 100, "max_memories": 30, "max_body_bytes": 200_000})
    async with served(small) as (_, http):
        for name, (content, status, said) in BAD.items():
            answer = await http.post("/v1/decide", content=content, headers=JSON)
            assert answer.status_code == status, (name, answer.text)
            assert said in answer.json()["error"]["message"], (name, answer.text)
        for reply, said in (
            ({"text": ""}, "needs a text that is not blank"),
            ({"kind": "rating"}, "needs a rating"),
            ({"kind": "rating", "rating": 2}, "rating"),
            ({"kind": "praise", "text": "x"}, "kind"),
            ({"text": "x" * 101}, "text: 101 characters"),
        ):
            answer = await http.post("/v1/replies", json={"conversation_id": "c"} | reply)
            assert answer.status_code == 422
            assert said in answer.json()["error"]["message"]
        large = await http.post("/v1/decide", content=b" " * 200_001, headers=JSON)
        assert (large.status_code, large.headers.get("connection")) == (413, None)

        async def in_parts() -> AsyncIterator[bytes]:
            for _ in range(100):
                yield b" " * 10_000

        assert (await http.post("/v1/decide", content=in_parts(), headers=JSON)).status_code == 413
        form = await http.post("/v1/decide", content=raw())
        assert (form.status_code, form.json()["error"]["type"]) == (415, "unsupported_media_type")
        assert (await http.get("/v1/decide")).status_code == 405
        assert (await http.get("/nowhere")).json()["error"]["message"] == "Not Found"
        assert (await http.get("/v1/models/a b")).status_code == 422

        assert (await http.post("/v1/decide", json=body())).status_code == 200
        assert len(await interactions(settings)) == 1
        assert await replies(settings) == []


@pytest.mark.integration
async def test_no_request_whatever_is_answered_500(settings: Settings) -> None:
    """Any JSON at all under the request's names gets 200, 400, 409 or 422, and the service goes on."""
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=8,
    )
    memory = st.fixed_dictionaries(
        {"id": st.text(max_size=3) | values},
        optional={
            "text": st.text(max_size=8) | values,
            "embedding": values | st.lists(st.floats(), max_size=4),
        },
    )
    request = st.fixed_dictionaries(
        {"conversation_id": st.text(max_size=5) | values, "message": st.text(max_size=20) | values},
        optional={
            "history": st.lists(st.text(max_size=8), max_size=3) | values,
            "metadata": st.dictionaries(st.sampled_from(["hour_of_day", "idle_s", "x"]), values) | values,
            "memories": st.lists(memory, max_size=3) | values,
            "model_id": st.text(max_size=5) | values,
            "interaction_id": st.text(max_size=3) | values,
            "top_k": st.integers(-1, 3) | values,
            "explore": st.booleans() | values,
            "other": values,
        },
    )
    # aiokafka shuffles several partitions, and Hypothesis warns if anything but its examples draws.
    async with served(settings.model_copy(update={"partitions": 1})) as (_, http):
        loop = asyncio.get_running_loop()
        seen: set[int] = set()

        @hypothesis_settings(
            max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None
        )
        @given(request)
        def try_one(content: dict[str, Any]) -> None:
            sending = http.post("/v1/decide", content=json.dumps(content).encode(), headers=JSON)
            answer = asyncio.run_coroutine_threadsafe(sending, loop).result(20)
            seen.add(answer.status_code)
            assert answer.status_code in (200, 400, 409, 422), (content, answer.text)

        await asyncio.to_thread(try_one)
        assert {200, 422} <= seen
        assert (await http.post("/v1/decide", json=body())).status_code == 200


@pytest.mark.integration
async def test_what_nobody_foresaw_is_a_500_with_an_id_in_the_log(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("boom")

    async with served(settings) as (_, http):
        with capture_logs() as logs, monkeypatch.context() as patch:
            patch.setattr(CortexModel, "decide", broken)
            answer = await http.post("/v1/decide", json=body(interaction_id="mine"))
        error = answer.json()["error"]
        assert (answer.status_code, error["type"]) == (500, "internal")
        assert "boom" not in answer.text
        assert [e["error_id"] for e in logs if e["event"] == "unexpected error"] == [
            error["message"].split()[-1]
        ]
        assert (await http.post("/v1/decide", json=body(interaction_id="mine"))).status_code == 200


async def test_not_ready_says_what_is_missing(settings: Settings) -> None:
    service = Service(settings)
    with pytest.raises(UnavailableError, match="kafka: not ready yet"):
        await service.decide(DecideRequest.model_validate(body()))
    await service.stop()


@pytest.mark.integration
async def test_an_encoder_of_another_dimension_ends_the_start(settings: Settings) -> None:
    service = Service(settings.model_copy(update={"encoder": "hashing-64"}))
    with pytest.raises(ConfigError, match=r"hashing-64 has 64 dimensions, CORTEX_TEXT_DIM is 384"):
        await service.start()
    await service.stop()


# --- requests as values -------------------------------------------------------------------------------------


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
def test_an_embedding_becomes_a_unit_vector_whatever_its_scale(numbers: list[float]) -> None:
    memory = Memory.model_validate({"id": "m", "embedding": numbers})
    assert memory.embedding is not None
    norm = float(np.linalg.norm(memory.embedding.astype(np.float64)))
    assert norm == pytest.approx(1.0, abs=1e-5) if any(numbers) else norm == 0.0
    again = Memory.model_validate_json(memory.model_dump_json())
    assert again.embedding is not None
    assert float(np.abs(again.embedding - memory.embedding).max()) < 1e-3


# --- weights ------------------------------------------------------------------------------------------------


async def decided(http: httpx.AsyncClient, model_id: str = "default") -> tuple[int, str]:
    """The version that decided, and the interaction's id."""
    answer = (await http.post("/v1/decide", json=body(model_id=model_id))).raise_for_status().json()
    return answer["weights_version"], answer["interaction_id"]


@pytest.mark.integration
async def test_weights_are_followed_and_refused_ones_change_nothing(settings: Settings) -> None:
    used: dict[str, int] = {}
    async with served(settings) as (service, http):

        async def decides_with(number: int) -> None:
            version_used, interaction_id = await decided(http)
            assert version_used == number
            used[interaction_id] = number

        await decides_with(0)
        assert (await http.get("/v1/models/default")).json()["versions"] == []
        good = version(settings, 1)
        await publish_versions(settings, good)
        await async_wait_for(lambda: _serves(http, 1), "version 1")
        await decides_with(1)

        forged = version(settings, 2)
        damaged = replace(forged, payload=forged.payload[:-4] + b"\x00\x00\x80\x7f")
        narrow = version(settings.model_copy(update={"text_dim": 64}), 3)
        await publish_versions(settings, damaged, narrow)
        await async_wait_for(lambda: service.refused == {"damaged": 1, "unusable": 1}, "both to be refused")
        await decides_with(1)

        await publish_versions(settings, version(settings, 4))
        await async_wait_for(lambda: _serves(http, 4), "version 4")
        await decides_with(4)
        detail = (await http.get("/v1/models/default")).json()
        applied = [(v["version"], v["consumed"]) for v in detail["versions"]]
        assert applied == [(1, {"x-0": 10}), (4, {"x-0": 40})]
        assert detail["versions"][0]["applied_at"] < detail["versions"][1]["applied_at"]
        [listed] = (await http.get("/v1/models")).json()["models"]
        assert (listed["model_id"], listed["version"], listed["in_memory"]) == ("default", 4, True)
        events = {e.interaction_id: e for e in await interactions(settings)}
    models = {0: CortexModel.create(model_config(settings), "default")}
    models |= {n: version(settings, n).to_model() for n in (1, 4)}
    for interaction_id, number in used.items():
        event = events[interaction_id]
        assert event.weights_version == number
        assert [n for n, model in models.items() if decided_by(event, model)] == [number]


async def _serves(http: httpx.AsyncClient, number: int) -> bool:
    return bool((await http.get("/v1/models/default")).json()["version"] == number)


@pytest.mark.integration
async def test_few_models_in_memory_all_served(settings: Settings) -> None:
    names = [f"model-{i}" for i in range(4)]
    await publish_versions(settings, *(version(settings, i, name) for i, name in enumerate(names, 1)))
    async with served(settings.model_copy(update={"models_in_memory": 2})) as (_, http):
        for _ in range(2):
            for i, name in enumerate(names, 1):
                assert (await decided(http, name))[0] == i
        assert (await decided(http, "unborn"))[0] == 0
        # Many at once for a model that is not in memory: one reading serves all.
        answers = await asyncio.gather(*(decided(http, "model-0") for _ in range(10)))
        assert {number for number, _ in answers} == {1}
        listed = (await http.get("/v1/models")).json()["models"]
        known = {m["model_id"]: m["version"] for m in listed}
        assert known.pop("unborn", 0) == 0
        assert known == {name: i for i, name in enumerate(names, 1)}
        assert sum(m["in_memory"] for m in listed) == 2
        # A version that comes while its model is away is the one served when it is asked for.
        await publish_versions(settings, version(settings, 9, "model-3"))
        await async_wait_for(lambda: _listed(http, "model-3", 9), "version 9")
        assert (await decided(http, "model-3"))[0] == 9
        for event in await interactions(settings):
            model = CortexModel.create(model_config(settings), event.model_id)
            if event.weights_version:
                model = version(settings, event.weights_version, event.model_id).to_model()
            assert decided_by(event, model)


@pytest.mark.integration
async def test_a_pinned_version_is_all_that_is_served_until_unpin(settings: Settings) -> None:
    await publish_versions(settings, *(version(settings, n) for n in (1, 2, 3)))
    async with served(settings) as (first, http):
        assert (await decided(http))[0] == 3
        await send_control(settings, "pin", "default", 1)
        await async_wait_for(lambda: _serves(http, 1), "the pinned version")
        assert (await decided(http))[0] == 1
        async with served(settings) as (second, later):
            assert (await decided(later))[0] == 1
            assert (await later.get("/v1/models/default")).json()["pinned"] == 1
            # One that a trainer had on its way when the pin came.
            await publish_versions(settings, version(settings, 4))
            for service, client in ((first, http), (second, later)):
                await service._follower.catch_up()
                assert (await decided(client))[0] == 1
            await send_control(settings, "pin", "default", 2)
            for client in (http, later):
                await async_wait_for(partial(_serves, client, 2), "another pinned version")
                assert (await decided(client))[0] == 2
            await send_control(settings, "unpin", "default")
            for client in (http, later):
                await async_wait_for(partial(_serves, client, 4), "the newest version")
                assert (await decided(client))[0] == 4
        applied = [v["version"] for v in (await http.get("/v1/models/default")).json()["versions"]]
        assert applied == [3, 1, 2, 4]
        assert {e.weights_version for e in await interactions(settings)} == {1, 2, 3, 4}


@pytest.mark.integration
async def test_a_model_pinned_while_it_loads_is_served_as_pinned(settings: Settings) -> None:
    pins: dict[str, int] = {}
    loaded: list[int] = []

    async def load(model_id: str) -> tuple[WeightsManifest, CortexModel]:
        number = pins.get(model_id, 2)
        loaded.append(number)
        if len(loaded) == 1:
            pins[model_id] = 1
        snapshot = version(settings, number)
        return snapshot.manifest, snapshot.to_model()

    models = Models(model_config(settings), 2, load, pins.get)
    updating = asyncio.create_task(models.update())
    assert (await models.get("default")).version == 1
    assert loaded == [2, 1]
    del pins["default"]
    models.changed("default")
    await async_wait_for(lambda: models.summary("default", None).version == 2, "version 2")
    assert (await models.get("default")).version == 2
    updating.cancel()


@pytest.mark.integration
async def test_a_model_that_is_not_allowed_is_refused_with_what_to_do(settings: Settings) -> None:
    async with served(settings.model_copy(update={"models": ("support", "sales")})) as (_, http):
        for answer in (
            await http.post("/v1/decide", json=body(model_id="invented")),
            await http.get("/v1/models/invented"),
        ):
            error = answer.json()["error"]
            assert (answer.status_code, error["type"]) == (404, "unknown_model")
            assert "CORTEX_MODELS has support, sales" in error["message"]
        assert (await http.post("/v1/decide", json=body(model_id="sales"))).status_code == 200
    assert [event.model_id for event in await interactions(settings)] == ["sales"]


@pytest.mark.integration
async def test_names_that_clients_invent_do_not_grow_the_metrics(settings: Settings) -> None:
    async with served(settings.model_copy(update={"models_in_memory": 3})) as (_, http):
        for n in range(10):
            answer = await http.post("/v1/decide", json=body(model_id=f"invented-{n}"))
            assert answer.status_code == 200
        metrics = (await http.get("/metrics")).text
    assert [line.count("invented") for line in metrics.splitlines()].count(1) == 3


async def _listed(http: httpx.AsyncClient, model_id: str, number: int) -> bool:
    models = (await http.get("/v1/models")).json()["models"]
    return any(m["model_id"] == model_id and m["version"] == number for m in models)


# --- what it shows of itself --------------------------------------------------------------------------------


@pytest.mark.integration
async def test_metrics_and_docs(settings: Settings) -> None:
    async with served(settings) as (_, http):
        for _ in range(2):
            await http.post("/v1/decide", json=body(message="the very same words"))
        await http.post("/v1/decide", content=b"{", headers=JSON)
        metrics = (await http.get("/metrics")).text
        for name in (
            'cortex_http_requests_total{endpoint="/v1/decide",status="200"}',
            'cortex_http_requests_total{endpoint="/v1/decide",status="400"}',
            'cortex_text_cache_total{result="hit"}',
            'cortex_text_cache_total{result="miss"}',
            'cortex_model_version{model_id="default"} 0.0',
            "cortex_decide_seconds_bucket",
            "cortex_encode_seconds_bucket",
            "cortex_model_swaps_total",
            "cortex_reply_to_weights_seconds_bucket",
            'cortex_publish_seconds_count{topic="interactions"}',
        ):
            assert name in metrics, name
        docs = await http.get("/docs")
        assert docs.status_code == 200
        schema = (await http.get("/openapi.json")).json()
        decide = schema["paths"]["/v1/decide"]["post"]
        assert decide["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith(
            "DecideRequest"
        )
        assert set(decide["responses"]) >= {"200", "413", "422", "503"}
        fields = schema["components"]["schemas"]["DecideRequest"]["properties"]
        assert "oldest first" in fields["history"]["description"]
