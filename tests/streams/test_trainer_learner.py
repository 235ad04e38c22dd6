"""The learner of one model: its counts, and that a restart continues exactly."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import redis
import torch
from aiokafka.partitioner import DefaultPartitioner
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from cortex_core.errors import InputError, WeightsError
from cortex_core.model import CortexModel
from cortex_core.online.update import OnlineUpdate
from cortex_core.weights import WeightsSnapshot
from streams.connections import redis_client
from streams.events import ExperienceEvent
from streams.kafka.topics import partition_of
from streams.settings import Settings
from streams.trainer import learner as learning
from streams.trainer.learner import ModelLearner, Outcome, Resume
from streams.weights.architecture import model_config
from tests.streams.experiences import experience, remember
from tests.streams.trainers import opened

TP = "cortex.experiences-0"


@examples(deadline=None)
@given(
    st.integers(-1, 2**40),
    st.integers(0, 2**52),
    st.dictionaries(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), max_size=50),
)
def test_a_resume_round_trips(control_offset: int, lowest: int, versions: dict[int, int]) -> None:
    resume = Resume(control_offset, OrderedDict((key, lowest + v) for key, v in versions.items()))
    again = Resume.from_bytes(resume.to_bytes())
    assert again == resume
    assert list(again.versions) == list(versions)


def test_versions_too_far_apart_are_taken_for_later_ones() -> None:
    """So that what was learned long ago is not learned again."""
    resume = Resume(0, OrderedDict({1: 5, 2: 2**41}))
    assert Resume.from_bytes(resume.to_bytes()).versions == {1: 2**41 - 2**32 + 1, 2: 2**41}


@pytest.mark.parametrize("raw", [b"x", b"{}", b'{"control_offset": 1, "experiences": 3}\nshort', b"[]\n"])
def test_an_invalid_resume_is_refused(raw: bytes) -> None:
    with pytest.raises(WeightsError, match="resume"):
        Resume.from_bytes(raw)


def test_the_ledger_keeps_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "LEDGER_CAPACITY", 3)
    resume = Resume()
    for name in ("a", "b", "c"):
        resume.note(name, 1)
    resume.note("a", 2)
    resume.note("d", 1)
    assert [resume.version(x) for x in "abcd"] == [2, None, 1, 1]


@examples(deadline=None)
@given(st.text(min_size=1, max_size=60), st.integers(1, 64))
def test_the_owner_partition_is_that_of_the_default_partitioner(model_id: str, partitions: int) -> None:
    everywhere = list(range(partitions))
    assert partition_of(model_id, partitions) == DefaultPartitioner()(
        model_id.encode(), everywhere, everywhere
    )


@pytest.fixture
def cache(settings: Settings) -> Iterator[redis.Redis]:
    with redis_client(settings) as client:
        yield client


def untrained(settings: Settings, cache: redis.Redis) -> ModelLearner:
    return opened(settings, "m", None, b"", cache)


def learn(
    learner: ModelLearner, event: ExperienceEvent, offset: int, version: int | None = None
) -> tuple[Outcome, OnlineUpdate | None]:
    return learner.learn(event, event.revision if version is None else version, offset)


def publish(learner: ModelLearner, offset: int) -> tuple[WeightsSnapshot, bytes]:
    """Publishes the next version."""
    snapshot, resume = learner.next_version({TP: offset})
    learner.published(snapshot)
    return snapshot, resume


@pytest.mark.integration
def test_an_untrained_model_equals_that_of_inference(settings: Settings, cache: redis.Redis) -> None:
    snapshot, _ = untrained(settings, cache).next_version({})
    own = CortexModel.create(model_config(settings), "m")
    assert snapshot.payload == WeightsSnapshot.of(own, model_id="m", version=1).payload


def unpublished(learner: ModelLearner) -> int | None:
    """Its `first_unpublished`; a function, since mypy assumes that a method call changes no attribute."""
    return learner.first_unpublished


@pytest.mark.integration
def test_counts_and_versions(settings: Settings, cache: redis.Redis) -> None:
    learner = untrained(settings, cache)
    assert learn(learner, experience("a"), 0)[0] == "learned"
    assert learn(learner, experience("a"), 1)[0] == "repeated"
    assert learn(learner, experience("b", revision=0), 2)[0] == "no_reply"
    assert learn(learner, experience("b", revision=2), 3)[0] == "learned"
    assert learn(learner, experience("b", revision=1), 4)[0] == "repeated"
    assert learn(learner, experience("b", revision=0), 5)[0] == "repeated"
    assert learn(learner, experience("a", revision=2), 6)[0] == "amended"
    assert learn(learner, experience("a", revision=1), 6, version=3)[0] == "amended"
    assert learn(learner, experience("a", revision=0), 6, version=4)[0] == "retracted"
    assert learn(learner, experience("a", revision=1), 6, version=3)[0] == "repeated"
    strange = experience("c", strategy_id="dance", strategy_ids=["dance"], probabilities=[1.0])
    with pytest.raises(InputError, match="dance"):
        learn(learner, strange, 7)
    assert unpublished(learner) == 0
    snapshot, _ = publish(learner, 8)
    manifest = snapshot.manifest
    assert (manifest.version, manifest.parent, manifest.interactions) == (1, None, 2)
    assert manifest.consumed == {TP: 8}
    assert manifest.oldest_reply_at == min(
        e.replied_at for e in (experience("a"), experience("b")) if e.replied_at is not None
    )
    assert unpublished(learner) is None
    learn(learner, experience("d"), 9)
    snapshot, _ = publish(learner, 10)
    assert (snapshot.manifest.version, snapshot.manifest.parent, snapshot.manifest.interactions) == (2, 1, 3)
    assert snapshot.manifest.oldest_reply_at == experience("d").replied_at


@pytest.mark.integration
@pytest.mark.parametrize("cached", [True, False])
def test_a_restart_continues_as_if_there_had_been_none(
    settings: Settings, cache: redis.Redis, cached: bool
) -> None:
    """The same weights, counts and learned experiences, and the optimizer's moments if they are cached."""
    learner = untrained(settings, cache)
    for i in range(12):
        learn(learner, experience(f"e{i}"), i)
    snapshot, resume = learner.next_version({TP: 12})
    if cached:
        learner.save_optimizer(cache, snapshot.manifest.version)
    learner.published(snapshot)
    heir = opened(settings, "m", snapshot, resume, cache)
    assert (heir.version, heir.interactions, heir.updates) == (1, 12, learner.updates)
    assert heir.ema_loss == learner.ema_loss
    assert heir.next_version({})[0].payload == snapshot.payload
    moments, inherited = (x._trainer.state_dict()["tensors"] for x in (learner, heir))
    names = {name for name in moments if name.startswith("optimizer.")}
    assert names
    assert {n for n in inherited if n.startswith("optimizer.")} == (names if cached else set())
    assert all(torch.equal(moments[n], inherited[n]) for n in names if cached)
    assert learn(heir, experience("e3"), 12)[0] == "repeated"
    assert learn(heir, experience("e12"), 13)[0] == "learned"
    after, _ = publish(heir, 14)
    assert (after.manifest.version, after.manifest.interactions) == (2, 13)
    assert after.manifest.updates == learner.updates + 1
    assert after.payload != snapshot.payload


@pytest.mark.integration
def test_the_cache_has_two_versions_and_those_of_others_are_not_used(
    settings: Settings, cache: redis.Redis
) -> None:
    learner = untrained(settings, cache)
    for version in (1, 2, 3, 4):
        learn(learner, experience(f"e{version}"), version)
        snapshot, resume = learner.next_version({})
        learner.save_optimizer(cache, snapshot.manifest.version)
        learner.published(snapshot)
    [key] = cache.scan_iter(f"{settings.topic_prefix}:trainer:*")
    assert sorted(cache.hkeys(key)) == [b"3", b"4"]
    cache.hset(key, "4", b"damaged")
    heir = opened(settings, "m", snapshot, resume, cache)
    assert learn(heir, experience("e5"), 5)[0] == "learned"


@pytest.mark.integration
def test_a_rollback_restores_the_weights_and_keeps_the_counts(settings: Settings, cache: redis.Redis) -> None:
    learner = untrained(settings, cache)
    learn(learner, experience("a"), 0)
    first, _ = publish(learner, 1)
    learn(learner, experience("b"), 1)
    publish(learner, 2)
    learner.roll_back(first, control_offset=7)
    snapshot, resume = publish(learner, 2)
    assert snapshot.payload == first.payload
    assert (snapshot.manifest.version, snapshot.manifest.reason) == (3, "rollback")
    assert (snapshot.manifest.interactions, snapshot.manifest.updates) == (2, 2)
    assert Resume.from_bytes(resume).control_offset == 7
    assert learn(learner, experience("b"), 3)[0] == "repeated"


def windows(learner: ModelLearner) -> tuple[list[Any], dict[str, tuple[Any, ...]], Any]:
    """The calibration window, the gate's ring by id, and the ring."""
    posteriors = learner._trainer._posteriors
    ring = posteriors._ring
    rows = {name: row for row, name in enumerate(ring._id_of) if name}
    kept = {n: (ring.strategy[r], ring.label[r], ring.weight[r]) for n, r in rows.items()}
    return list(posteriors._decisions), kept, ring


@pytest.mark.integration
def test_a_restart_keeps_the_calibration_window_and_the_gates_ring(
    settings: Settings, cache: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where replay has more than the windows, amended rewards, and what is not yet learned."""
    monkeypatch.setattr(learning, "RECALLED", 80)
    learner = untrained(settings, cache)
    events = [experience(f"e{i}", reward=(-1.0) ** i * 0.8) for i in range(60)]
    events += [experience("e59", revision=2, reward=0.5), experience("silent", revision=0)]
    remember(settings, events)
    for i, event in enumerate(events):
        learn(learner, event, i)
    snapshot, resume = publish(learner, len(events))
    remember(settings, [experience("later"), experience("e7", revision=2, reward=0.9)])

    heir = opened(settings, "m", snapshot, resume, cache)
    assert heir.next_version({})[0].payload == snapshot.payload
    decisions, kept, ring = windows(learner)
    inherited, kept_by_heir, rings = windows(heir)
    amended = {"e7"}  # its next version has yet to be learned
    assert len(inherited) == len(decisions) - 1 == 59
    assert set(kept) - set(kept_by_heir) == amended
    assert {n: kept[n] for n in kept_by_heir} == kept_by_heir
    mine, its = ([windows.row(n) for n in kept_by_heir] for windows in (rings, ring))
    for name, tolerance in (("phi", 1e-3), ("psi", 1e-3), ("bilinear", 0.25), ("dual", 0.15)):
        found, wanted = getattr(rings, name)[mine], getattr(ring, name)[its]
        assert np.allclose(found, wanted, rtol=0.0, atol=tolerance), name
    assert np.abs(rings.dual[mine] - ring.dual[its]).mean() < 0.05

    # The next replies find the confidence calibrated as without a restart.
    for it in (learner, heir):
        learn(it, experience("next", reward=0.8), 99)
        it.flush()
    calibrated, inherited_too = (x._model.estimator.linear.weight.detach() for x in (learner, heir))
    assert torch.allclose(calibrated, inherited_too, atol=0.02)
    again = opened(settings, "m", snapshot, resume, cache)
    assert windows(again)[0] == inherited, "it depends on no chance"
