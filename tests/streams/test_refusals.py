"""Workers and commands when a server refuses: they wait, end with instructions, or reject one event."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from streams.connections import redis_client
from streams.kafka.topics import Topics, create_topics
from streams.replay_store import RedisReplayBuffer, ReplayKeys
from streams.settings import Settings
from streams.testing import async_wait_for, interaction, reply, send, spawn_worker, wait_for
from tests.streams.experiences import dead_letters, experience, publish_experiences, send_raw
from tests.streams.kafka_helpers import read_all
from tests.streams.redis_servers import NOWHERE, administer, own_redis
from tests.streams.trainers import for_trainers, running, watching

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def own_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis that nobody else uses."""
    with own_redis(tmp_path_factory.mktemp("refusals")) as url:
        yield url


def with_redis(settings: Settings, url: str) -> Settings:
    return settings.model_copy(update={"redis_url": Settings.load(redis_url=url).redis_url})


def command(settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`cortex …` with these settings in its environment."""
    return subprocess.run(
        [sys.executable, "-m", "streams.cli", *arguments],
        env=settings.environment() | {"PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def joined(settings: Settings, model_id: str = "default") -> int:
    """Experiences in replay."""
    with redis_client(settings) as client:
        return len(RedisReplayBuffer.of(settings, model_id, client))


@contextmanager
def demoted(url: str) -> Iterator[None]:
    """The Redis is a replica of a primary that nobody reaches: it reads, and refuses to write."""
    administer(url, "REPLICAOF", *NOWHERE)
    try:
        yield
    finally:
        administer(url, "REPLICAOF", "NO", "ONE")


def test_a_wrong_password_ends_workers_and_commands_and_names_the_setting(
    settings: Settings, tmp_path: Path
) -> None:
    with own_redis(tmp_path / "closed", "--requirepass", "right") as url:
        refused = with_redis(settings, url.replace("//", "//:wrong-secret@"))
        workers = [spawn_worker(name, refused) for name in ("joiner", "trainer")]
        rebuild = command(refused, "rebuild", "--from", "beginning")
        for worker in workers:
            wait_for(lambda: worker.returncode is not None, f"the {worker.name} to end")  # noqa: B023
        says = f"CORTEX_REDIS_URL {refused.redis_shown}: the server refused the password"
        for worker in workers:
            assert worker.returncode == 2, worker.log_text()
            assert says in worker.log_text()
        assert rebuild.returncode == 2, rebuild.stderr
        assert rebuild.stderr.splitlines()[-1].startswith(f"cortex: {says}")
        for text in (rebuild.stderr, *(worker.log_text() for worker in workers)):
            assert "wrong-secret" not in text
            assert "Traceback" not in text


async def test_a_joiner_waits_for_a_demoted_primary(settings: Settings, own_url: str) -> None:
    its = with_redis(settings, own_url).model_copy(update={"session_timeout_s": 1.0})
    joiner = await asyncio.to_thread(lambda: spawn_worker("joiner", its).wait_ready())
    events = [e for n in range(5) for e in (interaction(f"i{n}", f"c{n}"), reply(f"r{n}", f"i{n}", f"c{n}"))]

    def missing() -> str:
        return str(joiner.get("/readyz").json()["missing"].get("redis", ""))

    with demoted(own_url):
        await send(its, events)
        why = await async_wait_for(lambda: asyncio.to_thread(missing), "the joiner to wait")
        assert f"Redis at {its.redis_shown} cannot serve now" in why
        assert "READONLY" in why

    await async_wait_for(lambda: joined(its) == 5, "all to be joined")
    await async_wait_for(lambda: asyncio.to_thread(lambda: not missing()), "the joiner to be ready")
    assert joiner.alive
    assert await read_all(its, Topics.of(its).dead_letters) == []


async def test_a_key_of_another_type_affects_one_model_of_the_joiner(
    settings: Settings, redis_url: str
) -> None:
    taken = ReplayKeys(settings.topic_prefix, "taken").entries
    administer(redis_url, "SET", taken, "a string")
    joiner = await asyncio.to_thread(lambda: spawn_worker("joiner", settings).wait_ready())
    await send(
        settings,
        [
            event
            for n, model in enumerate(("free", "taken", "free"))
            for event in (
                interaction(f"i{n}", f"c{n}", model_id=model),
                reply(f"r{n}", f"i{n}", f"c{n}"),
            )
        ],
    )
    await async_wait_for(lambda: joined(settings, "free") == 2, "the other model's to be joined")

    # The reply, and also the interaction if it came with it: its conversation has an experience pending.
    letters = await async_wait_for(lambda: dead_letters(settings), "the dead letter", every_s=0.2)
    assert {json.loads(base64.b64decode(it.raw))["conversation_id"] for it in letters} == {"c1"}
    assert all("WRONGTYPE" in letter.reason for letter in letters)
    assert joiner.get("/readyz").status_code == 200

    # Nothing is lost: the next event of the conversation writes what is pending.
    administer(redis_url, "DEL", taken)
    await send(settings, [reply("r1", "i1", "c1")])
    await async_wait_for(lambda: joined(settings, "taken") == 1, "the pending experience")


async def test_a_key_of_another_type_affects_one_model_of_the_trainer(settings: Settings) -> None:
    settings = for_trainers(settings)
    taken = ReplayKeys(settings.topic_prefix, "taken").order
    administer(settings.redis_address, "SET", taken, "a string")
    async with watching(settings) as watch, running(settings) as trainer:
        one = experience("e1", model_id="taken")
        await send_raw(settings, b"taken", one.to_bytes())
        await publish_experiences(settings, [experience("e2", model_id="free")])
        await watch.learned(1, "free")

        [letter] = await async_wait_for(lambda: dead_letters(settings), "the dead letter", every_s=0.2)
        assert "WRONGTYPE" in letter.reason
        assert letter.worker == "trainer"
        await async_wait_for(lambda: not trainer.worker.missing, "the trainer to be ready again")


async def test_a_trainer_continues_while_its_redis_is_demoted(settings: Settings, own_url: str) -> None:
    its = for_trainers(with_redis(settings, own_url))
    key = f"{its.topic_prefix}:trainer:{{m}}:optimizer"

    def saved() -> set[int]:
        with redis.Redis.from_url(own_url) as client:
            return {int(version) for version in client.hkeys(key)}

    async with watching(its) as watch, running(its):
        await publish_experiences(its, [experience("e1")])
        await watch.learned(1)
        with demoted(own_url):
            await send_raw(its, b"m", experience("e2").to_bytes())
            await watch.learned(2)
            assert watch.newest().version not in saved()
        await publish_experiences(its, [experience("e3")])
        await watch.learned(3)
        await async_wait_for(lambda: watch.newest().version in saved(), "the optimizer to be saved again")


async def test_a_redis_that_is_full_is_waited_for(settings: Settings, own_url: str) -> None:
    its = with_redis(settings, own_url)
    joiner = await asyncio.to_thread(lambda: spawn_worker("joiner", its).wait_ready())
    administer(own_url, "CONFIG", "SET", "maxmemory", 1)
    try:
        await send(its, [interaction("i0"), reply("r0", "i0")])

        def missing() -> str:
            return str(joiner.get("/readyz").json()["missing"].get("redis", ""))

        assert "OOM" in await async_wait_for(lambda: asyncio.to_thread(missing), "the joiner to wait")
    finally:
        administer(own_url, "CONFIG", "SET", "maxmemory", 0)
    await async_wait_for(lambda: joined(its) == 1, "it to be joined")


def test_status_names_a_redis_that_hangs(settings: Settings) -> None:
    asyncio.run(create_topics(settings))
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        url = f"redis://127.0.0.1:{hanging.getsockname()[1]}/0"
        done = command(with_redis(settings, url), "status", "--json")
    errors = json.loads(done.stdout)["errors"]
    assert done.returncode == 1
    assert set(errors) == {"replay", "waiting", "workers"}
    assert all(why.startswith(f"Redis at {url}") for why in errors.values()), errors


def test_status_says_what_redis_refused_and_fails(settings: Settings, tmp_path: Path) -> None:
    asyncio.run(create_topics(settings))
    with own_redis(tmp_path / "closed", "--requirepass", "right") as url:
        done = command(with_redis(settings, url), "status", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert set(report["errors"]) == {"replay", "waiting", "workers"}
    assert "CORTEX_REDIS_URL" in report["errors"]["replay"]
    assert report["groups"]


@pytest.mark.parametrize("arguments", [("audit",), ("rebuild", "--from", "beginning")])
def test_commands_report_an_error_reply_in_one_line(settings: Settings, arguments: tuple[str, ...]) -> None:
    asyncio.run(send(settings, [interaction("i"), reply("r", "i")]))
    administer(settings.redis_address, "SET", ReplayKeys(settings.topic_prefix, "").models, "a string")
    done = command(settings, *arguments)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"cortex: Redis at {settings.redis_shown} refused a command")
    assert "WRONGTYPE" in last
    assert "Traceback" not in done.stderr
