"""`cortex models`: what it lists, and that a forgotten model is gone from Kafka, Redis and all workers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import redis
from typer.testing import CliRunner

from streams.audit.compare import audit
from streams.audit.reading import collect
from streams.cli.app import app
from streams.events import ExperienceEvent, utc_now
from streams.joiner.rebuild import rebuild
from streams.kafka.topics import Topics
from streams.replay_store import RedisReplayBuffer, ReplayKeys, ReplayWrite, index_key
from streams.settings import Settings
from streams.testing import async_wait_for, interaction, reply, send, spawn_worker
from streams.weights.control import publish_forgotten, read_controls, send_control, wait_until_forgotten
from streams.weights.records import decode_key
from streams.weights.versions import read_versions
from tests.streams.experiences import experience, publish_experiences
from tests.streams.joined import all_committed
from tests.streams.kafka_helpers import read_all
from tests.streams.serving import body, served
from tests.streams.trainers import for_trainers, running, watching

pytestmark = pytest.mark.integration


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return for_trainers(settings)


async def learned(settings: Settings, *model_ids: str) -> list[ExperienceEvent]:
    """Publishes an experience of each model and puts it into replay, as the joiner does."""
    events = [experience(f"{m}-1", model_id=m) for m in model_ids]
    with redis.Redis.from_url(settings.redis_address) as client:
        for event in events:
            it = event.interaction
            write = ReplayWrite(it.interaction_id, it.occurred_at.timestamp(), 1, event.to_bytes())
            RedisReplayBuffer.of(settings, it.model_id, client).write([write])
            client.set(index_key(settings.topic_prefix, it.interaction_id), it.model_id, ex=60)
    await publish_experiences(settings, events)
    return events


def keys_of(settings: Settings, model_id: str) -> list[bytes]:
    """All keys in Redis that have the model's name in them."""
    with redis.Redis.from_url(settings.redis_address) as client:
        return [key for key in client.scan_iter(f"{settings.topic_prefix}:*") if model_id.encode() in key]


async def test_a_forgotten_model_is_gone_everywhere_and_begins_anew(settings: Settings) -> None:
    async with watching(settings) as watch, running(settings) as trainer, served(settings) as (service, http):
        await learned(settings, "gone", "kept")
        await watch.learned(1, "gone")
        await watch.learned(1, "kept")
        await send_control(settings, "pin", "gone", 1)
        for model_id in ("gone", "kept"):
            await service._follower.catch_up()
            answer = await http.post("/v1/decide", json=body(model_id=model_id))
            assert answer.json()["weights_version"] == 1
        assert keys_of(settings, "gone")

        await send_control(settings, "forget", "gone")
        await wait_until_forgotten(settings, "gone")
        assert keys_of(settings, "gone") == []
        with redis.Redis.from_url(settings.redis_address) as client:
            assert client.smembers(ReplayKeys(settings.topic_prefix, "").models) == {b"kept"}
        assert not trainer.loaded("gone")
        assert (await read_versions(settings)).models() == ["kept"]
        assert (await read_controls(settings))["gone"].pinned is None

        async def listed() -> bool:
            models = (await http.get("/v1/models")).json()["models"]
            return [m["model_id"] for m in models] == ["kept"]

        await async_wait_for(listed, "the inference worker to drop it")
        topics = Topics.of(settings)
        last = {
            r.key: r.value for t in (topics.weights, topics.payloads) for r in await read_all(settings, t)
        }
        assert {value for key, value in last.items() if decode_key(key)[0] == "gone"} == {None}

        answer = await http.post("/v1/decide", json=body(model_id="gone"))
        assert answer.json()["weights_version"] == 0
        await publish_experiences(settings, [experience("gone-2", model_id="gone")])
        await async_wait_for(lambda: len(watch.seen["gone"]) == 2, "its first version again")
        first = watch.newest("gone")
        assert (first.version, first.parent, first.interactions) == (1, None, 1)

    # The next trainer finds the command carried out.
    async with running(settings):
        await publish_experiences(settings, [experience("gone-3", model_id="gone")])
        await async_wait_for(lambda: _newest(settings, "gone", 2), "its second version", every_s=0.1)
    assert not [f for f in audit(await collect(settings)).findings if f.kind == "fork"]


async def _newest(settings: Settings, model_id: str, version: int) -> bool:
    newest = (await read_versions(settings)).newest(model_id)
    return newest is not None and newest.version == version


async def test_what_a_forgotten_model_was_is_missed_by_no_audit_and_restored_by_no_rebuild(
    settings: Settings,
) -> None:
    joiner = spawn_worker("joiner", settings).wait_ready()
    async with running(settings):
        await send(
            settings,
            [
                interaction("i1", model_id="gone", dim=384, metadata=[0.0] * 10),
                reply("r1", "i1"),
                interaction("i2", "d", model_id="kept", dim=384, metadata=[0.0] * 10),
            ],
        )
        await async_wait_for(lambda: keys_of(settings, "i1"), "the experience")
        await send_control(settings, "forget", "gone")
        await wait_until_forgotten(settings, "gone")
        await send(
            settings,
            [interaction("i3", "e", model_id="gone", dim=384, metadata=[0.0] * 10), reply("r3", "i3", "e")],
        )
        await async_wait_for(lambda: keys_of(settings, "i3"), "an experience afterwards")
    assert joiner.stop() == 0
    assert audit(await collect(settings)).clean
    report = await rebuild(settings)
    assert report.models == {"gone": 1, "kept": 1}
    assert audit(await collect(settings)).clean

    # Redis loses its data: the joiner joins all events again that are not forgotten.
    with redis.Redis.from_url(settings.redis_address) as client:
        client.delete(*client.scan_iter(f"{settings.topic_prefix}:*"))
        joiner = spawn_worker("joiner", settings)
        restored = RedisReplayBuffer.of(settings, "gone", client)
        await async_wait_for(lambda: len(restored) == 1, "the experience after the forgetting")
        other = f"{settings.topic_prefix}:join:{{d}}"
        await async_wait_for(lambda: client.hexists(other, "i:i2"), "the other model's interaction")
        assert restored.ids() == ["i3"]
        assert not client.hexists(f"{settings.topic_prefix}:join:{{c}}", "i:i1")
    assert joiner.stop() == 0


async def test_a_late_reply_brings_nothing_of_a_forgotten_model_back(settings: Settings) -> None:
    fits: dict[str, Any] = {"dim": 384, "metadata": [0.0] * 10}
    joiner = spawn_worker("joiner", settings).wait_ready()
    async with running(settings):
        await send(settings, [interaction(f"i{n}", f"c{n}", model_id="gone", **fits) for n in range(4)])
        await send(settings, [reply(f"r{n}", None, f"c{n}") for n in range(2)])
        with redis.Redis.from_url(settings.redis_address) as client:
            buffer = RedisReplayBuffer.of(settings, "gone", client)
            await async_wait_for(lambda: len(buffer) == 2, "the experiences")
            await send_control(settings, "forget", "gone")
            await wait_until_forgotten(settings, "gone")
            new = interaction("new", "d", model_id="gone", occurred_at=utc_now(), **fits)
            late = [reply(f"late-{n}", None, f"c{n}", occurred_at=utc_now()) for n in range(4)]
            await send(settings, [*late, new, reply("r-new", None, "d", occurred_at=utc_now())])
            await async_wait_for(lambda: "new" in buffer.ids(), "the new experience")
            await async_wait_for(lambda: all_committed(settings), "the late replies")
            assert buffer.ids() == ["new"]
            assert (await rebuild(settings)).models == {"gone": 1}
    assert joiner.stop() == 0
    assert audit(await collect(settings)).clean


async def test_a_forgetting_that_fails_is_carried_out_by_the_next_attempt(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = [True]

    async def fail_once(*args: Any) -> None:
        await publish_forgotten(*args)
        if failing:
            raise ConnectionError(failing.pop())

    monkeypatch.setattr("streams.trainer.partition.publish_forgotten", fail_once)
    async with watching(settings) as watch, running(settings):
        await learned(settings, "gone")
        await watch.learned(1, "gone")
        await send_control(settings, "forget", "gone")
        await wait_until_forgotten(settings, "gone")
        assert not failing
        assert not (await read_versions(settings)).models()


async def test_the_command_lists_shows_and_forgets(settings: Settings) -> None:
    async with watching(settings) as watch, running(settings):
        await learned(settings, "a", "b")
        await watch.learned(1, "a")
        await watch.learned(1, "b")
        await send_control(settings, "pin", "b", 1)

        [first, second] = json.loads((await cortex(settings, "models", "list", "--json"))[1])
        assert (first["model_id"], first["version"], first["experiences"], first["pinned"]) == (
            "a",
            1,
            1,
            None,
        )
        assert (second["model_id"], second["pinned"]) == ("b", 1)
        assert first["changed_at"] == watch.newest("a").created_at.isoformat(timespec="seconds")
        assert "step_by_step" in first["strategies"]
        table = (await cortex(settings, "models", "list"))[1]
        assert "Models" in table
        shown = json.loads((await cortex(settings, "models", "show", "a", "--json"))[1])
        assert [v["version"] for v in shown["versions"]] == [1]
        assert "Kept versions" in (await cortex(settings, "models", "show", "a"))[1]
        code, output = await cortex(settings, "models", "show", "c")
        assert code == 1
        assert "no model 'c'; models are: a, b" in output

        code, _ = await cortex(settings, "models", "forget", "a", given="n\n")
        assert code == 1
        assert len(json.loads((await cortex(settings, "models", "list", "--json"))[1])) == 2
        code, output = await cortex(settings, "models", "forget", "a", "--yes")
        assert code == 0
        assert output.endswith("a is forgotten\n")
        assert [
            m["model_id"] for m in json.loads((await cortex(settings, "models", "list", "--json"))[1])
        ] == ["b"]


async def cortex(settings: Settings, *args: str, given: str = "") -> tuple[int, str]:
    """Exit code and output of a command."""
    import asyncio

    flags = ["--kafka", settings.kafka_address, "--redis", settings.redis_address]
    flags += ["--topic-prefix", settings.topic_prefix]
    environment = {"CORTEX_PARTITIONS": str(settings.partitions), "COLUMNS": "200"}

    def invoke() -> tuple[int, str]:
        done = CliRunner().invoke(app, [*args, *flags], input=given, env=environment)
        return done.exit_code, done.output

    return await asyncio.to_thread(invoke)
