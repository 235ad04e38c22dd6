"""Operator commands to a trainer, and its reaction to errors in learning."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio
import torch
from aiokafka import AIOKafkaProducer

from cortex_core.errors import WeightsError
from cortex_core.online.update import OnlineUpdate
from cortex_core.online_trainer import OnlineTrainer
from cortex_core.replay_buffer import ReplayEntry
from streams.connections import kafka_client_options
from streams.events import ControlAction, ControlEvent, new_id, utc_now
from streams.kafka.topics import Topics
from streams.settings import Settings
from streams.testing import async_wait_for
from streams.weights.control import send_control
from streams.weights.follower import WeightsFollower
from tests.streams.experiences import (
    WeightsWatch,
    dead_letters,
    ends,
    experience,
    publish_experiences,
)
from tests.streams.trainers import all_committed, for_trainers, running, watching

pytestmark = pytest.mark.integration


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return for_trainers(settings)


@pytest_asyncio.fixture
async def watch(settings: Settings) -> AsyncIterator[WeightsWatch]:
    async with watching(settings) as weights:
        yield weights


async def test_a_rollback_is_a_new_version_with_the_old_bytes_and_happens_once(
    settings: Settings, watch: WeightsWatch
) -> None:
    async with running(settings) as trainer:
        for n in (1, 2, 3):
            await publish_experiences(settings, [experience(f"e{n}")])
            await watch.learned(n)
        first, *_, third = watch.seen["m"]
        await send_control(settings, "rollback", "m", first.version, "a bad update")
        await async_wait_for(lambda: watch.newest().version == 4, "the rollback")
        assert watch.newest().sha256 == first.sha256 != third.sha256
        assert watch.newest().reason == "rollback"
        assert watch.newest().interactions == 3
        assert trainer.count("cortex_trainer_rollbacks_total") == 1
        await publish_experiences(settings, [experience("e4")])
        await watch.learned(4)
        assert watch.newest().reason == "train"
    async with running(settings):  # the event is still on the control topic
        await publish_experiences(settings, [experience("e5")])
        await watch.learned(5)
    await watch.check()
    assert [m.reason for m in watch.seen["m"]] == ["train", "train", "train", "rollback", "train", "train"]


async def test_a_rollback_requested_while_no_trainer_runs_is_done_by_the_next(
    settings: Settings, watch: WeightsWatch
) -> None:
    async with running(settings):
        for n in (1, 2):
            await publish_experiences(settings, [experience(f"e{n}")])
            await watch.learned(n)
    event = await send_control(settings, "rollback", "m")
    assert event.version == 1
    async with running(settings):
        await async_wait_for(lambda: watch.newest().version == 3, "the rollback")
    assert watch.newest().sha256 == watch.seen["m"][0].sha256


async def test_a_version_that_is_not_kept_is_refused_with_a_list_of_those_that_are(
    settings: Settings, watch: WeightsWatch
) -> None:
    with pytest.raises(WeightsError, match="kept are none"):
        await send_control(settings, "rollback", "m")
    async with running(settings) as trainer:
        await publish_experiences(settings, [experience("e1")])
        await watch.learned(1)
        with pytest.raises(WeightsError, match="version 9 is not kept; kept are 1"):
            await send_control(settings, "pin", "m", 9)
        # Sent without that check, as by another tool: the trainer refuses it and continues.
        await send_event(settings, action="rollback", version=9)
        await async_wait_for(
            lambda: trainer.count("cortex_trainer_refused_total", kind="rollback") == 1, "the refusal"
        )
        await publish_experiences(settings, [experience("e2")])
        await watch.learned(2)


async def send_event(settings: Settings, **changes: Any) -> None:
    event = ControlEvent(control_id=new_id(), occurred_at=utc_now(), model_id="m", **changes)
    producer = AIOKafkaProducer(**kafka_client_options(settings))
    await producer.start()
    try:
        await producer.send_and_wait(Topics.of(settings).control, event.to_bytes(), key=b"m", partition=0)
    finally:
        await producer.stop()


@pytest.mark.parametrize(("pause", "resume"), [("pause", "resume"), ("pin", "unpin")])
async def test_a_paused_model_learns_nothing_and_later_everything(
    settings: Settings, watch: WeightsWatch, pause: ControlAction, resume: ControlAction
) -> None:
    other = _neighbour(settings)
    async with running(settings) as trainer:
        await publish_experiences(settings, [experience("e0")])
        await watch.learned(1)
        await send_control(settings, pause, "m")
        await async_wait_for(
            lambda: trainer.trainer._controls.of("m").training_paused, "training to be paused"
        )
        await publish_experiences(settings, [experience(f"e{i}") for i in range(1, 6)])
        await publish_experiences(settings, [experience(f"o{i}", model_id=other) for i in range(5)])
        await watch.learned(5, other)
        assert watch.newest().version == 1
    async with running(settings):  # a restart loses none of the experiences not learned from
        await publish_experiences(settings, [experience("e6"), experience("o5", model_id=other)])
        await watch.learned(6, other)
        assert watch.newest().version == 1
        await send_control(settings, resume, "m")
        await watch.learned(7)
        await publish_experiences(settings, [experience("o6", model_id=other)])
        await watch.learned(7, other)
        everything = [
            experience(f"{x}{i}", model_id=m) for x, m in (("e", "m"), ("o", other)) for i in range(7)
        ]
        await all_committed(settings, ends(settings, everything))
    await watch.check()
    assert {m: v[-1].interactions for m, v in watch.seen.items()} == {"m": 7, other: 7}


def _neighbour(settings: Settings) -> str:
    """A model whose experiences are in the partition of "m"."""
    its = ends(settings, [experience("x")])
    return next(x for x in map(str, range(99)) if ends(settings, [experience("x", model_id=x)]) == its)


async def test_a_pin_prevents_publishing_of_pending_updates(settings: Settings, watch: WeightsWatch) -> None:
    slow = settings.model_copy(update={"publish_interval_s": 600.0})
    async with running(slow) as trainer:
        await publish_experiences(settings, [experience("e0")])
        await watch.learned(1)
        await publish_experiences(settings, [experience("e1"), experience("e2")])
        await async_wait_for(lambda: trainer.outcomes("learned") == 3, "two to be pending")
        await send_control(settings, "pin", "m", 1)
        await async_wait_for(lambda: not trainer.loaded("m"), "the model to be unloaded")
    await watch.follower.catch_up()
    assert watch.newest().version == 1
    await send_control(settings, "unpin", "m")
    async with running(settings):
        await watch.learned(3)
    await watch.check()


# --- errors in learning -------------------------------------------------------------------------------


async def test_an_experience_that_makes_learning_fail_becomes_a_dead_letter(
    settings: Settings, watch: WeightsWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = OnlineTrainer.observe

    def observe(self: OnlineTrainer, entry: ReplayEntry) -> OnlineUpdate | None:
        if entry.id == "e7":
            raise RuntimeError("shapes cannot be multiplied")
        return real(self, entry)

    monkeypatch.setattr(OnlineTrainer, "observe", observe)
    async with running(settings):
        await publish_experiences(settings, [experience(f"e{i}") for i in range(20)])
        await watch.learned(19)
        [letter] = await dead_letters(settings)
        assert letter.offset == 7
        assert "shapes cannot be multiplied" in letter.reason
    await watch.check()
    assert watch.newest().interactions == 19


async def test_degraded_weights_are_replaced_by_the_last_good_and_reported(
    settings: Settings, watch: WeightsWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = OnlineTrainer.flush

    def degrading(self: OnlineTrainer) -> OnlineUpdate | None:
        update = real(self)
        if update is None or update.update != 3:
            return update
        self.restore_best()
        return replace(update, rolled_back=True)

    monkeypatch.setattr(OnlineTrainer, "flush", degrading)
    async with running(settings) as trainer:
        for n in (1, 2, 3, 4):
            await publish_experiences(settings, [experience(f"e{n}")])
            await watch.learned(n)
        assert [m.reason for m in watch.seen["m"]] == ["train", "train", "rollback", "train"]
        assert trainer.count("cortex_trainer_rollbacks_total") == 1
    await watch.check()


async def test_weights_that_are_not_finite_are_never_published(
    settings: Settings, watch: WeightsWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = OnlineTrainer.flush

    def poisoned(self: OnlineTrainer) -> OnlineUpdate | None:
        update = real(self)
        if update is not None and update.update == 2:
            with torch.no_grad():
                next(self.selector.parameters()).fill_(float("nan"))
        return update

    monkeypatch.setattr(OnlineTrainer, "flush", poisoned)
    async with running(settings) as trainer:
        await publish_experiences(settings, [experience("e1")])
        await watch.learned(1)
        await publish_experiences(settings, [experience("e2")])
        await async_wait_for(
            lambda: trainer.count("cortex_trainer_refused_total", kind="not_finite") == 1, "the refusal"
        )
        monkeypatch.undo()
        await publish_experiences(settings, [experience("e3")])
        await watch.learned(2)
    await watch.check()
    async with WeightsFollower(settings) as follower:
        await follower.until_caught_up()
        assert follower.refused.total() == 0
