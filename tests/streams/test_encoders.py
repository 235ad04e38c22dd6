"""A model learns from the embeddings of one text encoder, and is served to that one only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import redis
import redis.asyncio

from cortex_core.weights import WeightsSnapshot
from streams.connections import redis_client
from streams.replay_fit import FitCheck
from streams.settings import Settings
from streams.trainer.learner import MisfitError
from tests.streams.experiences import dead_letters, experience, publish_experiences
from tests.streams.serving import body, interactions, publish_versions, served, version
from tests.streams.trainers import for_trainers, opened, running, watching

pytestmark = pytest.mark.integration


async def test_a_model_learns_from_the_encoder_of_its_first_experience_alone(settings: Settings) -> None:
    ours = experience("ours", encoder="hashing-384")
    theirs, unnamed = experience("theirs", encoder="other-384"), experience("unnamed")
    with redis_client(settings) as cache:
        learner = opened(settings, "m", None, b"", cache)
        for n, event in enumerate((unnamed, ours)):
            assert learner.learn(event, 1, n)[0] == "learned"
        snapshot, resume = learner.next_version({})
        assert snapshot.manifest.encoder == "hashing-384"
        heir = opened(settings, "m", snapshot, resume, cache)
        for it in (learner, heir):
            with pytest.raises(MisfitError, match=r"'other-384'.*'hashing-384'.*CORTEX_ENCODER"):
                it.learn(theirs, 1, 3)
            assert it.learn(experience("also unnamed"), 1, 4)[0] == "learned"
    async with redis.asyncio.Redis.from_url(settings.redis_address) as client:
        check = FitCheck(client, settings.topic_prefix)
        assert await check.unfit([("m", e.to_bytes()) for e in (ours, theirs, unnamed)]) == {1}


async def test_an_event_of_another_encoder_is_a_dead_letter(settings: Settings) -> None:
    settings = for_trainers(settings)
    events = [experience(f"e{n}", encoder=("a", "b")[n % 2]) for n in range(6)]
    async with watching(settings) as watch, running(settings):
        await publish_experiences(settings, events)
        await watch.learned(3)
        assert watch.newest().encoder == "a"
    letters = await dead_letters(settings)
    assert len(letters) == 3
    assert all("'b'" in x.reason and "'a'" in x.reason for x in letters)


def of_encoder(snapshot: WeightsSnapshot, encoder: str) -> WeightsSnapshot:
    return replace(snapshot, manifest=snapshot.manifest.model_copy(update={"encoder": encoder}))


async def test_a_worker_does_not_serve_a_model_of_another_encoder(settings: Settings) -> None:
    own, unknown = version(settings, 1, "own"), version(settings, 1, "unknown")
    other = of_encoder(version(settings, 1, "other"), "all-MiniLM-L6-v2")
    await publish_versions(settings, of_encoder(own, "hashing-384"), unknown, other)
    async with served(settings) as (_, http):
        for model_id in ("own", "unknown", "untrained"):
            assert (await http.post("/v1/decide", json=body(model_id=model_id))).status_code == 200
        refused = await http.post("/v1/decide", json=body(model_id="other"))
        why = refused.json()["error"]["message"]
        assert refused.status_code == 422
        assert "all-MiniLM-L6-v2" in why
        assert "hashing-384" in why
        assert "CORTEX_ENCODER" in why
        ready = (await http.get("/readyz")).json()
        assert ready["refused_models"] == {"other": why}
        models = {m["model_id"]: m for m in (await http.get("/v1/models")).json()["models"]}
        assert models["other"]["refused"] == (await http.get("/v1/models/other")).json()["refused"] == why
        assert (models["own"]["encoder"], models["own"]["refused"]) == ("hashing-384", "")
    assert {event.encoder for event in await interactions(settings)} == {"hashing-384"}
