"""CORTEX_STRATEGIES changes while models live: what both sets have is kept, and it is said."""

from __future__ import annotations

import pytest

from cortex_core.model import CortexModel
from cortex_core.strategy_registry import StrategyRegistry
from cortex_core.weights import WeightsSnapshot
from streams.connections import redis_client
from streams.settings import Settings
from tests.streams.experiences import dead_letters, experience, publish_experiences, remember
from tests.streams.serving import body, interactions, publish_versions, served, version
from tests.streams.trainers import for_trainers, opened, running, watching

pytestmark = pytest.mark.integration

GENERIC = StrategyRegistry.from_set("generic").ids
DEVELOPER = StrategyRegistry.from_set("developer").ids
BOTH = (*GENERIC, *(id_ for id_ in DEVELOPER if id_ not in GENERIC))


def developer(settings: Settings) -> Settings:
    return settings.model_copy(update={"strategies": "developer"})


def test_a_trainer_goes_on_with_both_sets(settings: Settings) -> None:
    """What was learned of the former set stays in the weights and in replay."""
    events = [experience(f"e{n}") for n in range(20)]
    remember(settings, events)
    with redis_client(settings) as cache:
        learner = opened(settings, "m", None, b"", cache)
        for n, event in enumerate(events):
            learner.learn(event, 1, n)
        snapshot, resume = learner.next_version({})
        learner.published(snapshot)
        heir = opened(developer(settings), "m", snapshot, resume, cache)
        assert heir._model.config.strategies == BOTH
        new = experience(
            "new", strategy_id=DEVELOPER[-1], strategy_ids=[*DEVELOPER], probabilities=[0.2] * len(DEVELOPER)
        )
        assert heir.learn(new, 1, 20)[0] == "learned"
        assert heir.learn(experience("old"), 1, 21)[0] == "learned"
        after, _ = heir.next_version({})
        assert tuple(after.manifest.architecture["strategies"]) == BOTH
        assert after.to_model().config.strategies == BOTH
        assert not heir.replay.set_aside
        assert len(list(heir.replay.entries())) == 20
        heir.roll_back(snapshot, control_offset=1)
        assert heir.next_version({})[0].to_model().config.strategies == BOTH
        # Back again: the former set was not forgotten, and the other one is not.
        back = opened(settings, "m", after, resume, cache)
        assert back._model.config.strategies == BOTH


async def test_experiences_of_both_sets_are_learned_without_a_dead_letter(settings: Settings) -> None:
    own = for_trainers(settings)
    async with watching(own) as watch:
        async with running(own):
            await publish_experiences(own, [experience(f"e{n}") for n in range(10)])
            await watch.learned(10)
        p = [1.0 / len(DEVELOPER)] * len(DEVELOPER)
        new = [
            experience(f"n{n}", strategy_id=id_, strategy_ids=[*DEVELOPER], probabilities=p)
            for n, id_ in enumerate(DEVELOPER)
        ]
        async with running(developer(own)):
            await publish_experiences(own, [*new, *(experience(f"late-{n}") for n in range(5))])
            await watch.learned(15 + len(DEVELOPER))
        await watch.check()
    assert await dead_letters(own) == []


async def test_a_worker_chooses_among_the_configured_set_and_says_so(settings: Settings) -> None:
    learned = version(settings, 1, "learned")
    await publish_versions(settings, learned)
    async with served(developer(settings)) as (_, http):
        ids = []
        for n in range(5):
            answer = (
                await http.post("/v1/decide", json=body(conversation_id=f"c{n}", model_id="learned"))
            ).json()
            assert (set(answer["probabilities"]), answer["weights_version"]) == (set(DEVELOPER), 1)
            assert sum(answer["probabilities"].values()) == pytest.approx(1.0)
            ids.append(answer["strategy"]["id"])
        new = (await http.post("/v1/decide", json=body(model_id="new"))).json()
        assert set(new["probabilities"]) == set(DEVELOPER) >= set(ids)
        what = (await http.get("/readyz")).json()["strategies_changed"]
        assert list(what) == ["learned"]
        assert what["learned"].startswith("CORTEX_STRATEGIES=developer: untrained: ")
        assert "no longer chosen: " in what["learned"]
        summary = (await http.get("/v1/models/learned")).json()
        assert summary["strategies_changed"] == what["learned"]
    for event in await interactions(settings):
        assert set(event.strategy_ids) == set(DEVELOPER)
    async with served(settings) as (_, http):
        assert "strategies_changed" not in (await http.get("/readyz")).json()


async def test_trainer_and_worker_grow_a_model_alike(settings: Settings) -> None:
    snapshot = version(settings, 1, "m")
    with redis_client(settings) as cache:
        grown = opened(developer(settings), "m", snapshot, b"", cache).next_version({})[0]
    own = snapshot.to_model().freeze().with_strategies(DEVELOPER)
    assert grown.payload == WeightsSnapshot.of(own, model_id="m", version=2).payload
    assert CortexModel(own.config).config == own.config
