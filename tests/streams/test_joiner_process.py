"""The joiner as a process: readiness, ending, Faust's commands and signals, the watchdog."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.errors import CommitFailedError
from pydantic import SecretStr

from cortex_core.errors import ConfigError
from streams.events import InteractionEvent, ReplyEvent, parse
from streams.joiner.app import create_app, run
from streams.kafka.clients import started
from streams.kafka.topics import Topics
from streams.settings import Settings
from streams.testing import async_wait_for, send, spawn_worker
from streams.worker import Worker
from tests.streams.joined import all_committed, conversation, expected, quick, replay, summary
from tests.streams.kafka_helpers import read_all

pytestmark = pytest.mark.integration


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return quick(settings)


@pytest.fixture
def client(settings: Settings) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(settings.redis_address) as it:
        yield it


def run_python(*arguments: str, settings: Settings, unset: str | None = None) -> tuple[int, str]:
    """Exit code, and all that was printed."""
    variables = os.environ | settings.environment()
    done = subprocess.run(
        [sys.executable, *arguments],
        env={name: value for name, value in variables.items() if name != unset},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


async def committed_offsets(settings: Settings) -> dict[tuple[str, int], int]:
    """By topic and partition."""
    async with started(AIOKafkaAdminClient(bootstrap_servers=settings.kafka_address)) as admin:
        offsets = await admin.list_consumer_group_offsets(settings.joiner_group)
    return {(tp.topic, tp.partition): offset.offset for tp, offset in offsets.items()}


async def test_sigterm_finishes_the_batch_commits_it_and_leaves_the_group(
    settings: Settings, client: redis.Redis
) -> None:
    joiner = spawn_worker("joiner", settings, join_batch=20).wait_ready()
    events = [event for n in range(300) for event in conversation(n, named=n % 2 == 0)]
    sending = asyncio.create_task(send(settings, events))
    await async_wait_for(lambda: len(replay(settings, client)) > 20, "progress")
    assert await asyncio.to_thread(joiner.stop, settings.shutdown_timeout_s) == 0
    await sending
    topics = Topics.of(settings)
    async with started(AIOKafkaAdminClient(bootstrap_servers=settings.kafka_address)) as admin:
        [described] = await admin.describe_consumer_groups([settings.joiner_group])
        assert not described.groups[0][5], "members"
    committed = await committed_offsets(settings)
    done: list[InteractionEvent | ReplyEvent] = []
    for record in await read_all(settings, topics.interactions) + await read_all(settings, topics.replies):
        is_interaction = record.topic == topics.interactions
        if record.offset < committed[record.topic, record.partition]:
            done.append(
                parse(InteractionEvent, record.value) if is_interaction else parse(ReplyEvent, record.value)
            )
    assert 20 < len(done) < len(events)
    assert summary(replay(settings, client)) == expected(done), "committed and done are the same"


@pytest.mark.parametrize("server", ["kafka", "redis"])
async def test_it_says_what_is_missing_and_ends_while_it_waits(settings: Settings, server: str) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        away = {"kafka": address} if server == "kafka" else {"redis_url": SecretStr(f"redis://{address}/0")}
        worker = Worker("joiner", settings.model_copy(update=away))
        running = asyncio.create_task(run(worker))
        await async_wait_for(lambda: address in worker.missing[server], "it to say so")
        worker.stopping.set()
        async with asyncio.timeout(settings.shutdown_timeout_s):
            await running


async def test_topics_that_do_not_fit_end_it_with_code_2(settings: Settings) -> None:
    topics = Topics.of(settings)
    async with started(AIOKafkaAdminClient(bootstrap_servers=settings.kafka_address)) as admin:
        await admin.create_topics([NewTopic(topics.interactions, 1, 1), NewTopic(topics.replies, 3, 1)])
    with pytest.raises(ConfigError, match="must have the same number of partitions"):
        await run(Worker("joiner", settings))
    command = ["-m", "faust", "-A", "streams.joiner", "worker"]
    code, said = await asyncio.to_thread(run_python, *command, settings=settings)
    assert code == 2, said
    assert "must have the same number of partitions" in said


HANGING = """
import asyncio, time
from streams.joiner import consumer
from streams.joiner.app import main
from streams.joiner.effects import Engine
from streams.settings import Settings

async def hang(self, tasks):
    {hang}

consumer.STALL_S, consumer.PROBE_S = 1.0, 0.2
Engine.join = hang
main(Settings.load())
"""


@pytest.mark.parametrize("hang", ["await asyncio.Event().wait()", "time.sleep(3600)"])
async def test_a_joiner_that_handles_nothing_ends(settings: Settings, hang: str) -> None:
    await send(settings, conversation(1))
    code, said = await asyncio.to_thread(run_python, "-c", HANGING.format(hang=hang), settings=settings)
    assert code == 1, said
    assert ("nothing was handled for 1 s" in said) == hang.startswith("await")


async def test_faust_s_signals_tell_of_rebalances(settings: Settings) -> None:
    app = create_app(settings, Worker("joiner", settings))
    told: list[Any] = []

    @app.on_partitions_assigned.connect
    async def on_assigned(*arguments: Any, **_: Any) -> None:
        told.append(("assigned", *arguments[1:]))

    @app.on_partitions_revoked.connect
    async def on_revoked(*arguments: Any, **_: Any) -> None:
        told.append(("revoked", *arguments[1:]))

    topics = Topics.of(settings)
    every = {(topic, p) for topic in (topics.interactions, topics.replies) for p in (0, 1)}
    guest = AIOKafkaConsumer(
        topics.interactions,
        topics.replies,
        bootstrap_servers=settings.kafka_address,
        group_id=settings.joiner_group,
        partition_assignment_strategy=[RangePartitionAssignor],
        enable_auto_commit=False,
    )
    await app.start()
    try:
        assert told == [("revoked", set()), ("assigned", every)]
        async with started(guest):
            await async_wait_for(lambda: len(told) == 4, "the rebalance")
            assert told[2:] == [("revoked", every), ("assigned", every - guest.assignment())]
    finally:
        await app.stop()


async def test_a_commit_that_fails_in_a_rebalance_stops_nobody(
    settings: Settings, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(settings, Worker("joiner", settings))
    await app.start()
    commit_done, committing, revoking = app.batches.commit_done, asyncio.Event(), asyncio.Event()

    async def refused(offsets: Any) -> None:
        monkeypatch.setattr(app.batches, "commit_done", commit_done)
        committing.set()
        await revoking.wait()
        raise CommitFailedError("the group has rebalanced")

    monkeypatch.setattr(app.batches, "commit_done", refused)
    wait_empty = app.batches.wait_empty

    async def wait_empty_and_say_so() -> None:
        revoking.set()
        await wait_empty()

    monkeypatch.setattr(app.batches, "wait_empty", wait_empty_and_say_so)
    topics = Topics.of(settings)
    guest = AIOKafkaConsumer(
        topics.interactions,
        topics.replies,
        bootstrap_servers=settings.kafka_address,
        group_id=settings.joiner_group,
        partition_assignment_strategy=[RangePartitionAssignor],
        enable_auto_commit=False,
    )

    async def its_share_is_committed() -> bool:
        mine = {(topic, p) for topic, p in ends if (topic, p) not in guest.assignment()}
        committed = await committed_offsets(settings)
        return all(committed.get(tp) == ends[tp] for tp in mine)

    events = [event for n in range(8) for event in conversation(n)]
    try:
        await send(settings, events)
        await committing.wait()
        records = await read_all(settings, topics.interactions) + await read_all(settings, topics.replies)
        ends = Counter((record.topic, record.partition) for record in records)
        async with started(guest):
            await async_wait_for(guest.assignment, "the rebalance")
            await async_wait_for(its_share_is_committed, "it to go on with what is left to it")
        await async_wait_for(lambda: all_committed(settings), "all to be joined")
        assert summary(replay(settings, client)) == expected(events)
    finally:
        await app.stop()


async def test_faust_s_own_command_runs_it_too(settings: Settings, client: redis.Redis) -> None:
    log = settings.data / "faust.log"
    worker = faust_worker(settings, log)
    try:
        await send(settings, conversation(3))
        await async_wait_for(lambda: all_committed(settings), "the events to be joined")
        assert summary(replay(settings, client)) == expected(conversation(3))
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(15) == 0, log.read_text()
    finally:
        worker.kill()
        worker.wait()


def faust_worker(settings: Settings, log: Path) -> subprocess.Popen[bytes]:
    """`faust -A streams.joiner worker` as a process."""
    with log.open("wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "faust", "-A", "streams.joiner", "worker"],
            env=os.environ | settings.environment() | {"CORTEX_PORT": "0"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )


def test_faust_lists_the_agent_whose_worker_has_a_port_of_its_own(settings: Settings) -> None:
    show = """
import sys
from faust.cli.faust import cli
from streams.joiner import app
print("port", app.worker.settings.port)
sys.argv[1:] = ["-A", "streams.joiner", "agents"]
cli()
"""
    code, said = run_python("-c", show, settings=settings, unset="CORTEX_PORT")
    assert code == 0, said
    topics = Topics.of(settings)
    assert "port 8181" in said
    assert "@joiner" in said
    assert f"{topics.interactions}, {topics.replies}" in said


def test_settings_that_lack_an_address_end_faust_s_command_with_code_2(
    settings: Settings, tmp_path: Path
) -> None:
    nowhere = settings.model_copy(update={"kafka": None, "data": tmp_path / "nothing"})
    code, said = run_python("-m", "faust", "-A", "streams.joiner", "worker", settings=nowhere)
    assert code == 2, said
    assert "CORTEX_KAFKA not set" in said
    assert "Traceback" not in said
