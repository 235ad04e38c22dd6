"""Experiences that do not fit their model: dead letters once, in no sample, and learning goes on."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
import pytest_asyncio
import redis
import redis.asyncio
from starlette.applications import Starlette

from streams import replay_fit
from streams.audit.compare import audit
from streams.audit.reading import collect
from streams.events import ExperienceEvent, parse, utc_now
from streams.joiner.rebuild import rebuild
from streams.kafka.dead_letters import list_dead_letters, retry_dead_letters
from streams.kafka.topics import Topics
from streams.replay_fit import architecture_key
from streams.replay_store import (
    RedisReplayBuffer,
    ReplayKeys,
    ReplayWrite,
    WriteResult,
)
from streams.replay_writer import ReplayWriter
from streams.settings import Settings
from streams.testing import async_wait_for, reply, send
from tests.streams.experiences import (
    WeightsWatch,
    dead_letters,
    experience,
    publish_experiences,
)
from tests.streams.joined import joining
from tests.streams.kafka_helpers import read_all
from tests.streams.trainers import for_trainers, opened, running, watching

pytestmark = pytest.mark.integration

SHORT = np.full(10, 0.25)
MISFITS: dict[str, dict[str, Any]] = {
    "10 dimensions": {
        "message": SHORT,
        "history": SHORT,
        "situation": SHORT,
        "memories": np.stack([SHORT] * 4),
    },
    "a message of 10": {"message": SHORT, "history": SHORT},
    "a situation of 10": {"situation": SHORT},
    "memories of 10": {"memories": np.stack([SHORT] * 4)},
    "memories of 10, of which none was shown": {
        "memories": np.stack([SHORT] * 4),
        "memory_scores": [],
        "memory_propensities": [],
    },
    "no metadata": {"metadata": []},
    "much metadata": {"metadata": [0.0] * 11},
    "huge metadata": {"metadata": [1e300] + [0.0] * 9},
    "a short context": {"context": [0.5] * 6},
    "a huge context": {"context": [1e300] + [0.5] * 6},
    "an unknown strategy": {"strategy_id": "dance", "strategy_ids": ["dance"], "probabilities": [1.0]},
}
"""Changes of a valid experience, each valid by itself."""
UNREADABLE: dict[str, bytes] = {
    "no JSON": b"{",
    "a list": b"[1]",
    "no fields": b"{}",
    "wrong types": orjson.dumps(experience("x").to_entry().to_json() | {"memory_scores": {"a": [1]}}),
    "no experience": b'{"interaction":{"message":[[[1]]]}}',
    "a count that does not match": experience("x")
    .to_bytes()
    .replace(b'"memory_scores":[0.5,0.4]', b'"memory_scores":[0.5,0.4,0.3,0.2,0.1]'),
    "NaN": experience("x").to_bytes().replace(b'"context":[0.5', b'"context":[NaN'),
}
"""Values that replay may contain, whoever wrote them."""


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return for_trainers(settings)


@pytest_asyncio.fixture
async def watch(settings: Settings) -> AsyncIterator[WeightsWatch]:
    async with watching(settings) as weights:
        yield weights


@pytest.fixture
def client(settings: Settings) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(settings.redis_address) as it:
        yield it


def misfits(model_id: str = "m") -> dict[str, ExperienceEvent]:
    return {kind: experience(kind, model_id=model_id, **changes) for kind, changes in MISFITS.items()}


def stored(settings: Settings, client: redis.Redis, model_id: str = "m") -> set[str]:
    return set(RedisReplayBuffer.of(settings, model_id, client).ids())


async def test_misfits_in_replay_are_set_aside_once_and_learning_goes_on(
    settings: Settings, watch: WeightsWatch, client: redis.Redis
) -> None:
    """As in a buffer that was filled before there was a check."""
    buffer = RedisReplayBuffer.of(settings, "m", client)
    at = 2e9  # the latest ones, which are drawn most often
    values = UNREADABLE | {kind: event.to_bytes() for kind, event in misfits().items()}
    buffer.write([ReplayWrite(kind, at, 1, value) for kind, value in values.items()])
    good = [experience(f"e{n}") for n in range(60)]
    async with running(settings) as trainer:
        await publish_experiences(settings, good[:30])
        await publish_experiences(settings, [experience("other", model_id="m2")])
        await watch.learned(30)
        await watch.learned(1, "m2")
        await publish_experiences(settings, good[30:])
        await watch.learned(60)
        await async_wait_for(lambda: not stored(settings, client) & values.keys(), "all to be removed")
        assert trainer.count("cortex_trainer_failures_total") == 0
        assert trainer.count("cortex_trainer_skipped_total") == 0
        await async_wait_for(
            lambda: trainer.count("cortex_trainer_misfits_total", model_id="m") == len(values), "the count"
        )
        app = httpx.ASGITransport(Starlette(routes=trainer.worker.routes()))
        async with httpx.AsyncClient(transport=app, base_url="http://trainer") as http:
            ready = (await http.get("/readyz")).json()
        assert (ready["ready"], ready["misfits"]) == (True, {"m": len(values)})
    letters = await dead_letters(settings)
    assert len(letters) == len(values), [x.reason for x in letters]
    assert all(x.worker == "trainer" and x.reason.startswith("in replay: ") for x in letters)
    assert stored(settings, client) == {e.interaction.interaction_id for e in good}
    await watch.check()
    # Nothing is lost: a dead letter is the whole experience, and can be published again.
    [retried] = [x for x in letters if "'dance'" in x.reason]
    await retry_dead_letters(settings, [retried.dead_letter_id])
    records = await read_all(settings, Topics.of(settings).experiences)
    assert misfits()["an unknown strategy"].to_bytes() in {record.value for record in records}


async def test_a_misfit_that_came_before_its_model_is_one_dead_letter_and_leaves_replay(
    settings: Settings, watch: WeightsWatch, client: redis.Redis
) -> None:
    events = [*misfits().values(), experience("good")]
    await publish_experiences(settings, events)  # a joiner that knows no model stores them
    assert len(stored(settings, client)) == len(events)
    async with running(settings) as trainer:
        await watch.learned(1)
        await async_wait_for(lambda: stored(settings, client) == {"good"}, "the others to be removed")
        assert trainer.count("cortex_trainer_misfits_total", model_id="m") == len(MISFITS)
        # Not even one that nobody has answered yet teaches, and it is no second dead letter.
        await publish_experiences(settings, [experience("e2"), experience("e3")])
        await watch.learned(3)
    letters = await dead_letters(settings)
    assert sorted(x.offset for x in letters) == list(range(len(MISFITS)))
    assert len(await list_dead_letters(settings)) == len(MISFITS)


async def test_an_unanswered_misfit_is_refused_too(
    settings: Settings, watch: WeightsWatch, client: redis.Redis
) -> None:
    async with running(settings) as trainer:
        silence = experience("silent", revision=0, **MISFITS["10 dimensions"])
        await publish_experiences(settings, [silence, experience("good")])
        await watch.learned(1)
        assert trainer.outcomes("no_reply") == 0
    assert len(await dead_letters(settings)) == 1
    assert stored(settings, client) == {"good"}


async def test_the_joiner_stores_only_what_fits_and_so_does_a_rebuild(
    settings: Settings, watch: WeightsWatch, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay_fit, "FRESH_S", 0.0)
    now = utc_now()

    async def answered(names: dict[str, dict[str, Any]]) -> None:
        events = [experience(n, occurred_at=now, **it).interaction for n, it in names.items()]
        replies = [reply(f"r-{name}", name, f"c-{name}", occurred_at=utc_now()) for name in names]
        await send(settings, [*events, *replies])

    async with joining(settings), running(settings) as trainer:
        await answered({"good": {}})
        await watch.learned(1)
        assert client.exists(architecture_key(settings.topic_prefix, "m"))
        await answered({**MISFITS, "better": {}})
        await watch.learned(2)
        await async_wait_for(
            lambda: trainer.count("cortex_trainer_misfits_total") == len(MISFITS), "all to be refused"
        )
        assert stored(settings, client) == {"good", "better"}
        assert trainer.count("cortex_trainer_failures_total") == 0
        rebuilt = await rebuild(settings)
        assert rebuilt.models == {"m": 2}
        assert rebuilt.unfit >= len(MISFITS)
        assert stored(settings, client) == {"good", "better"}
        await answered({"best": {}})
        await watch.learned(3)
    letters = await list_dead_letters(settings)
    assert len(letters) == len(MISFITS)
    assert all(parse(ExperienceEvent, base64.b64decode(x.raw)).reply_ids for x in letters)
    report = audit(await collect(settings))
    assert (report.findings, report.counts["misfits"]) == ([], len(MISFITS))


async def test_a_writer_knows_the_model_by_its_architecture_alone(
    settings: Settings, client: redis.Redis
) -> None:
    aio = redis.asyncio.Redis.from_url(settings.redis_address)
    key = architecture_key(settings.topic_prefix, "m")
    events = [experience("good"), *misfits().values()]
    writes = [("m", ReplayWrite(e.interaction.interaction_id, 1.0, 1, e.to_bytes())) for e in events]

    async def write(strategies: tuple[str, ...] = ()) -> set[WriteResult]:
        client.delete(ReplayKeys(settings.topic_prefix, "m").entries)
        writer = ReplayWriter(aio, prefix=settings.topic_prefix, capacity=100, strategies=strategies)
        results = await writer.write(writes)
        assert results[0] == WriteResult.CHANGED
        return set(results[1:])

    try:
        assert await write() == {WriteResult.CHANGED}, "nothing is known of the model"
        opened(settings, "m", None, b"", client)
        assert await write() == {WriteResult.UNFIT}
        assert await write(("dance",)) == {WriteResult.UNFIT, WriteResult.CHANGED}
        for unknown in (b"{", b"[]", b'{"text_dim": "x"}', b"\xff"):
            client.set(key, unknown)
            assert await write() == {WriteResult.CHANGED}
    finally:
        await aio.aclose()
