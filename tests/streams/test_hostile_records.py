"""Malformed records on the followed topics: each is refused at little cost, and affects no other record."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from aiokafka import AIOKafkaProducer
from prometheus_client import REGISTRY

from cortex_core.errors import WeightsError
from cortex_core.model import CortexModel
from cortex_core.weights import WeightsSnapshot
from streams.events import ControlEvent, new_id, utc_now
from streams.kafka.topics import Topics, create_topics
from streams.settings import Settings
from streams.testing import async_wait_for
from streams.trainer.learner import Resume
from streams.weights.control import ControlFollower
from streams.weights.follower import WeightsFollower
from streams.weights.records import encode_key
from tests.streams.experiences import experience, publish_experiences
from tests.streams.hostile_records import VALUES, survive
from tests.streams.test_weights_follower import Changes, producing, put, send_raw
from tests.streams.trainers import for_trainers, running, watching
from tests.streams.weights_records import CONFIG, Record, snapshot

V1 = [("version", b"1")]
KEY = encode_key("m", 1, 0)

UNREADABLE: dict[str, Record] = {
    "a version of 5,000 digits": Record(KEY, b"x", [("version", b"9" * 5_000)]),
    "a version of 19 digits": Record(KEY, b"x", [("version", b"%d" % 10**18)]),
    "a null version": Record(KEY, b"x", [("version", None)]),  # type: ignore[list-item]  # the wrong type is the test
    "no version": Record(KEY, b"x", []),
    "a key nested 100,000 deep": Record(b"[" * 100_000, b"x", V1),
    "a key of a number of 5,000 digits": Record(b'["m",1,' + b"9" * 5_000 + b"]", b"x", V1),
    "a negative slot": Record(encode_key("m", -1, 0), b"x", V1),
    "a slot beyond any ring": Record(encode_key("m", 10**9, 0), b"x", V1),
    "a part beyond any payload": Record(encode_key("m", 1, 10**6), b"x", V1),
    "a model without a name": Record(encode_key("", 1, 0), b"x", V1),
    "a model with a long name": Record(encode_key("m" * 201, 1, 0), b"x", V1),
    "a manifest nested deep": Record(encode_key("m", 1, "manifest"), b'{"a":' * 15_000, V1),
    "a manifest too large": Record(encode_key("m", 1, "manifest"), b" " * 200_000, V1),
    "a tombstone of nothing": Record(b"nothing", None, []),
}


@pytest.mark.integration
async def test_an_invalid_weights_record_affects_no_other(settings: Settings) -> None:
    await create_topics(settings)
    changes = Changes(settings)
    counted = {"topic": "weights", "reason": "damaged"}
    before = REGISTRY.get_sample_value("cortex_records_refused_total", counted) or 0.0
    async with producing(settings) as producer, changes.follower as follower:
        await put(producer, settings, snapshot(1))
        await send_raw(producer, settings, list(UNREADABLE.values()))
        await put(producer, settings, snapshot(2))
        await asyncio.wait_for(follower.catch_up(), 30)
        assert await changes.used() == 2
        assert follower.refused == {"damaged": len(UNREADABLE)}
        assert follower._topic.restarts == 0
        after = REGISTRY.get_sample_value("cortex_records_refused_total", counted)
        assert after == before + len(UNREADABLE)
        # A worker that starts now reads the same records and becomes ready.
        async with WeightsFollower(settings) as another:
            await asyncio.wait_for(another.until_caught_up(), 30)
            assert another.newest("m") == snapshot(2).manifest
            assert (await another.fetch("m", 2)).payload == snapshot(2).payload


@pytest.mark.integration
async def test_an_invalid_control_record_affects_no_other(settings: Settings) -> None:
    good = ControlEvent(control_id="c", occurred_at=utc_now(), model_id="m", action="pause")
    fields = json.loads(good.to_bytes())
    bad = [
        b"[" * 100_000,
        b"\xff",
        b"{}",
        b"9" * 5_000,
        json.dumps(fields | {"version": 10**400, "action": "pin"}).encode(),
        json.dumps(fields | {"reason": "x" * 1_000_000}).encode(),
        json.dumps(fields | {"action": "rollback"}).encode(),
        json.dumps(fields | {"occurred_at": 1e300}).encode(),
    ]
    await create_topics(settings)
    counted = {"topic": "control", "reason": "damaged"}
    before = REGISTRY.get_sample_value("cortex_records_refused_total", counted) or 0.0
    async with producing(settings) as producer, ControlFollower(settings) as follower:
        async with producer.transaction():
            for value in [*bad, good.to_bytes()]:
                await producer.send(Topics.of(settings).control, value, key=b"k", partition=0)
        await asyncio.wait_for(follower.catch_up(), 30)
        assert follower.of("m").paused
        assert follower.refused == {"damaged": len(bad)}
        after = REGISTRY.get_sample_value("cortex_records_refused_total", counted)
        assert after == before + len(bad)
        assert follower._topic.restarts == 0


@pytest.mark.integration
async def test_hostile_records_on_every_topic_stop_nothing(settings: Settings) -> None:
    await survive(settings, 10 * len(VALUES))


def test_any_bytes_of_a_resume_header_are_read_or_refused() -> None:
    head = b'{"control_offset": 7, "lowest": 0, "experiences": %s}\n'
    assert Resume.from_bytes(head % b"0").control_offset == Resume.control_offset_in(head % b"0") == 7
    for raw in (
        head % (b"9" * 400),
        head % b"-1",
        head % b"1e308",
        b"[" * 100_000,
        b"\xff\n",
        b"{}",
        head % b"3",
    ):
        with pytest.raises(WeightsError, match="resume"):
            Resume.from_bytes(raw + b"12345678")
    assert Resume.control_offset_in(b"[" * 100_000) == Resume.control_offset_in(b"") == -1


# --- what a record may take ---------------------------------------------------------------------------------


@pytest.mark.integration
async def test_rollbacks_of_models_that_do_not_exist_load_nothing(settings: Settings) -> None:
    settings = for_trainers(settings)
    names = [f"nobody-{n}" for n in range(40)]
    async with watching(settings) as watch, running(settings) as trainer:
        await publish_experiences(settings, [experience("e1")])
        await watch.learned(1)
        await send_raw_controls(settings, [(name, 1) for name in [*names, "m"]] + [("m", 99)])

        def refused() -> bool:
            return trainer.count("cortex_trainer_refused_total", kind="rollback") == len(names) + 1

        await async_wait_for(refused, "the rollbacks to be refused")
        assert not any(map(trainer.loaded, names))
        # A model that is created after its rollback was requested starts at version 1, and learns.
        await publish_experiences(settings, [experience("e2", model_id=names[0])])
        await async_wait_for(lambda: watch.seen.get(names[0]), "its first version")
        assert [m.reason for m in watch.seen[names[0]]] == ["train"]
    # The next trainer does not do it either: 99 is refused although the model exists.
    async with watching(settings) as watch, running(settings) as trainer:
        await publish_experiences(settings, [experience("e3")])
        await watch.learned(2)
        assert {m.reason for m in watch.seen["m"]} <= {"train"}


async def send_raw_controls(settings: Settings, rollbacks: list[tuple[str, int]]) -> None:
    """Rollback events of a client that does not check whether the version is kept."""
    producer = AIOKafkaProducer(bootstrap_servers=settings.kafka_address)
    await producer.start()
    try:
        for model_id, version in rollbacks:
            event = ControlEvent(
                control_id=new_id(),
                occurred_at=utc_now(),
                model_id=model_id,
                action="rollback",
                version=version,
            )
            key = json.dumps([model_id, "rollback"]).encode()
            await producer.send_and_wait(Topics.of(settings).control, event.to_bytes(), key=key, partition=0)
    finally:
        await producer.stop()


# --- weights that are whole, and ruin a model ---------------------------------------------------------------


def numbered(version: int, parent: int | None, fill: float | None = None) -> WeightsSnapshot:
    made = snapshot(1, fill=fill)
    return replace(made, manifest=made.manifest.model_copy(update={"version": version, "parent": parent}))


@pytest.mark.integration
async def test_a_version_far_ahead_does_not_end_learning(settings: Settings) -> None:
    await create_topics(settings)
    changes = Changes(settings)
    async with producing(settings) as producer, changes.follower as follower:
        await follower.until_caught_up()
        await put(producer, settings, numbered(1, None), numbered(10**12, 1), numbered(2, 1))
        await put(producer, settings, numbered(10**14, 10**14 - 1), numbered(3, 2))
        await follower.catch_up()
        assert [version for _, version in changes.seen] == [1, 2, 3]
        assert follower.refused == {"unrelated": 2}
        # A reader that was disconnected while more than a ring was published finds the end of a chain.
        await put(producer, settings, numbered(100, 99), numbered(101, 100), numbered(102, 101))
        await follower.catch_up()
        assert [version for _, version in changes.seen] == [1, 2, 3, 101, 102]
        assert [m.version for m in follower.history("m")] == [101, 102]
        # A refused version between two does not affect the second.
        damaged = numbered(103, 102)
        damaged = replace(damaged, payload=damaged.payload[:-1] + b"!")
        await put(producer, settings, damaged)
        await follower.catch_up()
        assert await changes.used() == 102
        await put(producer, settings, numbered(104, 102))
        await follower.catch_up()
        assert [m.version for m in follower.history("m")] == [101, 102, 104]
        assert await changes.used() == 104


@pytest.mark.integration
async def test_a_forged_version_at_the_beginning_of_the_log_is_left_behind(settings: Settings) -> None:
    """Compaction can delete the valid versions before a forged one, and leave that one in its slot."""
    await create_topics(settings)
    async with producing(settings) as producer:
        await put(producer, settings, numbered(10**12, 5), numbered(6, 5), numbered(7, 6), numbered(8, 7))
        async with WeightsFollower(settings) as follower:
            await follower.until_caught_up()
            newest = follower.newest("m")
            assert newest is not None
            assert newest.version == 8


def absurd(change: Callable[[str, torch.Tensor], Any]) -> WeightsSnapshot:
    model = CortexModel.create(CONFIG, "m")
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            change(name, tensor)
    return WeightsSnapshot.of(model, model_id="m", version=2, parent=1)


def filled(with_: float) -> WeightsSnapshot:
    def fill(_: str, tensor: torch.Tensor) -> None:
        if tensor.is_floating_point():
            tensor.fill_(min(with_, torch.finfo(tensor.dtype).max))

    return absurd(fill)


@pytest.mark.parametrize("number", [3e38, 1e20, 1e10, 60_000.0, -3.0])
def test_weights_that_are_finite_and_absurd_are_refused(number: float) -> None:
    with pytest.raises(WeightsError, match="trial decision"):
        filled(number).to_model().freeze()


def test_one_absurd_tensor_refuses_the_version() -> None:
    def spoil(name: str, tensor: torch.Tensor) -> None:
        if name == "gate.weight":
            tensor.mul_(1e7)

    with pytest.raises(WeightsError, match="trial decision"):
        absurd(spoil).to_model().freeze()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("landmarks", 6_000),
        ("landmarks", 10**12),
        ("memory_landmarks", 10**9),
        ("situation_dim", 10**9),
        ("encoder_hidden_dim", -1),
        ("selector_hidden_dim", 64.5),
        ("estimator_hidden_dim", "many"),
        ("text_dim", None),
    ],
)
def test_an_architecture_is_compared_with_the_weights_before_it_is_built(
    name: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = snapshot(1)
    forged = good.manifest.model_copy(update={"architecture": CONFIG.to_dict() | {name: value}})
    built: list[Any] = []
    init = CortexModel.__init__

    def noting(self: CortexModel, config: Any = None) -> None:
        built.append(config)
        init(self, config)

    monkeypatch.setattr(CortexModel, "__init__", noting)
    with pytest.raises(WeightsError, match=f"architecture has {name}"):
        replace(good, manifest=forged).to_model()
    assert not built
    assert good.to_model() is not None
