"""The joiner as a process: readiness, shutdown, Faust's commands and signals, the watchdog."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
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
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import CommitFailedError
from pydantic import SecretStr

from cortex_core.errors import ConfigError
from streams.events import InteractionEvent, ReplyEvent, parse
from streams.joiner import thread
from streams.joiner.app import create_app, run
from streams.joiner.effects import Engine
from streams.joiner.thread import BatchThread
from streams.kafka.clients import started
from streams.kafka.topics import Topics
from streams.settings import Settings
from streams.testing import async_wait_for, send, spawn_worker
from streams.worker import Worker
from tests.streams.joined import (
    all_committed,
    conversation,
    expected,
    joining,
    other_member,
    quick,
    replay,
    summary,
)
from tests.streams.kafka_helpers import read_all

pytestmark = pytest.mark.integration


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return quick(settings)


@pytest.fixture
def client(settings: Settings) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(settings.redis_address) as it:
        yield it


def run_python(*arguments: str, settings: Settings) -> tuple[int, str]:
    """Runs Python; returns the exit code and the output."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | settings.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    return done.returncode, done.stdout + done.stderr


async def committed_offsets(settings: Settings) -> dict[tuple[str, int], int]:
    """The joiner group's committed offsets, by topic and partition."""
    async with started(AIOKafkaAdminClient(bootstrap_servers=settings.kafka_address)) as admin:
        offsets = await admin.list_consumer_group_offsets(settings.joiner_group)
    return {(tp.topic, tp.partition): offset.offset for tp, offset in offsets.items()}


async def test_sigterm_finishes_the_batch_commits_it_and_leaves_the_group(
    settings: Settings, client: redis.Redis
) -> None:
    joiner = spawn_worker("joiner", settings, join_batch=20).wait_ready()
    sent = 0

    def events() -> Iterator[InteractionEvent | ReplyEvent]:
        """Yields conversations until one begins after the joiner has ended."""
        nonlocal sent
        for n in itertools.count():
            ended = not joiner.alive
            for event in conversation(n, named=n % 2 == 0):
                sent += 1
                yield event
            if ended:
                return

    sending = asyncio.create_task(send(settings, events()))
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
            kind: type[InteractionEvent] | type[ReplyEvent] = (
                InteractionEvent if is_interaction else ReplyEvent
            )
            done.append(parse(kind, record.value))
    assert 20 < len(done) < sent
    assert summary(replay(settings, client)) == expected(done), "exactly the committed events are processed"


async def test_a_topic_that_is_made_again_is_read_within_seconds_and_its_absence_is_reported(
    settings: Settings, client: redis.Redis
) -> None:
    topics = Topics.of(settings)
    async with (
        joining(settings) as joiner,
        started(AIOKafkaAdminClient(bootstrap_servers=settings.kafka_address)) as admin,
    ):
        events = conversation(1)
        await send(settings, events)
        await async_wait_for(lambda: all_committed(settings), "the first events to be joined")
        await admin.delete_topics([topics.replies])
        await async_wait_for(
            lambda: topics.replies in joiner.worker.missing.get("kafka", ""),
            "the missing topic to be reported",
        )
        await admin.create_topics([NewTopic(topics.replies, settings.partitions, 1)])
        await async_wait_for(lambda: "kafka" not in joiner.worker.missing, "readiness")
        events += conversation(2)
        await send(settings, events[-len(conversation(2)) :])
        await async_wait_for(
            lambda: summary(replay(settings, client)) == expected(events), "the new events to be joined"
        )


@pytest.mark.parametrize("server", ["kafka", "redis"])
async def test_it_reports_an_unavailable_server_and_shuts_down_while_it_waits(
    settings: Settings, server: str
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        unavailable = (
            {"kafka": address} if server == "kafka" else {"redis_url": SecretStr(f"redis://{address}/0")}
        )
        worker = Worker("joiner", settings.model_copy(update=unavailable))
        running = asyncio.create_task(run(worker))
        await async_wait_for(lambda: address in worker.missing[server], "the joiner to report it")
        worker.stopping.set()
        async with asyncio.timeout(settings.shutdown_timeout_s):
            await running


async def test_topics_with_different_partition_counts_end_it_with_code_2(settings: Settings) -> None:
    topics = Topics.of(settings)
    async with started(AIOKafkaAdminClient(bootstrap_servers=settings.kafka_address)) as admin:
        await admin.create_topics([NewTopic(topics.interactions, 1, 1), NewTopic(topics.replies, 3, 1)])
    with pytest.raises(ConfigError, match="must have the same number of partitions"):
        await run(Worker("joiner", settings))
    command = ["-m", "faust", "-A", "streams.joiner", "worker"]
    code, output = await asyncio.to_thread(run_python, *command, settings=settings)
    assert code == 2, output
    assert "must have the same number of partitions" in output


async def test_a_joiner_that_processes_nothing_is_ended(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons: list[str] = []

    async def hang(*_: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(thread, "STALL_S", 1.0)
    monkeypatch.setattr(thread, "PROBE_S", 0.1)
    monkeypatch.setattr(BatchThread, "_end_process", lambda _, reason: reasons.append(reason))
    monkeypatch.setattr(Engine, "join", hang)
    async with joining(settings, shutdown_timeout_s=1.0):
        await send(settings, conversation(1))
        await async_wait_for(lambda: reasons, "the watchdog")
    assert re.fullmatch(r"no event was processed for 1 s: lag of \d+ events", reasons[0])


HANGING = """
import time
from streams.joiner import thread
from streams.joiner.app import main
from streams.joiner.effects import Engine
from streams.settings import Settings

thread.STALL_S, thread.PROBE_S = 1.0, 0.1
Engine.join = lambda *_: time.sleep(3600)
main(Settings.load())
"""


async def test_a_joiner_whose_main_thread_hangs_ends(settings: Settings) -> None:
    settings = settings.model_copy(update={"shutdown_timeout_s": 2.0})  # after which the process must end
    await send(settings, conversation(1))
    code, output = await asyncio.to_thread(run_python, "-c", HANGING, settings=settings)
    assert code == 1, output


async def test_faust_s_signals_report_rebalances(settings: Settings) -> None:
    app = create_app(settings, Worker("joiner", settings))
    received: list[Any] = []

    @app.on_partitions_assigned.connect
    async def on_assigned(*arguments: Any, **_: Any) -> None:
        received.append(("assigned", *arguments[1:]))

    @app.on_partitions_revoked.connect
    async def on_revoked(*arguments: Any, **_: Any) -> None:
        received.append(("revoked", *arguments[1:]))

    topics = Topics.of(settings)
    every = {(topic, p) for topic in (topics.interactions, topics.replies) for p in (0, 1)}
    await app.start()
    try:
        assert received == [("revoked", set()), ("assigned", every)]
        async with other_member(settings) as member:
            await async_wait_for(lambda: len(received) == 4, "the rebalance")
            assert received[2:] == [("revoked", every), ("assigned", every - member.assignment())]
    finally:
        await app.stop()


async def test_a_commit_that_fails_in_a_rebalance_does_not_stop_the_joiner(
    settings: Settings, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    topics = Topics.of(settings)
    events = [event for n in range(8) for event in conversation(n)]
    committing, revoking = asyncio.Event(), asyncio.Event()
    async with joining(settings) as joiner:
        commit_done, wait_empty = joiner.batches.commit_done, joiner.batches.wait_empty

        async def refused(part: Any) -> None:
            monkeypatch.setattr(joiner.batches, "commit_done", commit_done)
            committing.set()
            await revoking.wait()
            raise CommitFailedError("the group has rebalanced")

        async def report_and_wait_empty() -> None:
            revoking.set()
            await wait_empty()

        monkeypatch.setattr(joiner.batches, "commit_done", refused)
        monkeypatch.setattr(joiner.batches, "wait_empty", report_and_wait_empty)
        await send(settings, events)
        await committing.wait()
        records = await read_all(settings, topics.interactions) + await read_all(settings, topics.replies)
        ends = Counter((record.topic, record.partition) for record in records)
        async with other_member(settings) as member:
            its_share = {tp for tp in ends if tp not in member.assignment()}

            async def its_share_is_committed() -> bool:
                committed = await committed_offsets(settings)
                return all(committed.get(tp) == ends[tp] for tp in its_share)

            await async_wait_for(its_share_is_committed, "the joiner to process its remaining partitions")
        await async_wait_for(lambda: all_committed(settings), "all events to be joined")
    assert summary(replay(settings, client)) == expected(events)


async def test_faust_s_worker_command_runs_it(settings: Settings, client: redis.Redis) -> None:
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
            env=os.environ | settings.environment(),
            stdout=out,
            stderr=subprocess.STDOUT,
        )


FAUST_COMMANDS = """
import os, sys
from faust.cli.faust import cli

def run(*arguments):
    sys.argv[1:] = ["-A", "streams.joiner", *arguments]
    try:
        cli()
    except SystemExit as end:
        print(arguments, "ended with", end.code, flush=True)

kafka = os.environ.pop("CORTEX_KAFKA")
run("worker")
os.environ["CORTEX_KAFKA"] = kafka
del os.environ["CORTEX_PORT"]
del sys.modules["streams.joiner"].app  # the module, which the failed command has loaded
run("agents")
from streams.joiner import app
print("port", app.worker.settings.port)
"""


def test_faust_s_commands_find_the_app(settings: Settings) -> None:
    code, output = run_python("-c", FAUST_COMMANDS, settings=settings)
    assert code == 0, output
    assert "Traceback" not in output
    topics = Topics.of(settings)
    for line in (
        "Error: CORTEX_KAFKA not set and no stack runs",
        "('worker',) ended with 2",
        f"@joiner | {topics.interactions}, {topics.replies} | Joins interactions with replies",
        "('agents',) ended with 0",
        "port 8181",  # not the inference worker's
    ):
        assert line in output, output


def test_faust_s_help_needs_no_server(settings: Settings) -> None:
    nowhere = settings.model_copy(update={"kafka": None, "redis_url": None})
    code, output = run_python("-m", "faust", "-A", "streams.joiner", "worker", "--help", settings=nowhere)
    assert code == 0, output
    assert "Usage:" in output
