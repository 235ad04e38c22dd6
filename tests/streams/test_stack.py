"""`cortex up`: everything comes up, what dies comes back, and stopping leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from redis import Redis

from cortex_core.errors import ConfigError
from streams.kafka.topics import Topics
from streams.local.stack import ManagedWorker, Stack, run_until_signal
from streams.settings import Settings
from streams.testing import async_wait_for, wait_for
from streams.testing.waiting import DEFAULT_TIMEOUT_S
from tests.streams.test_embedded import gone


class Up:
    """`cortex up` as a process of its own, and all that it started."""

    def __init__(self, data: Path, *flags: str) -> None:
        self.file = data / "stack.json"
        self.output = data / "output"
        with self.output.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "streams.cli", "up", "--data", str(data), "--port", "0", *flags],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "CORTEX_ENCODER": "hashing"},
                start_new_session=True,
            )

    def said(self) -> str:
        return self.output.read_text()

    def stack(self) -> dict[str, Any]:
        """stack.json once the stack is up."""

        def up() -> dict[str, Any]:
            assert self.process.poll() is None, self.said()
            content: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
            mine = content.get("pid") == self.process.pid and "kafka" in content
            return content if mine else {}

        return wait_for(up, "the stack")

    def children(self) -> list[int]:
        return [p.pid for p in psutil.Process(self.process.pid).children(recursive=True)]


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Callable[..., Up]]:
    started: list[Up] = []

    def start(*flags: str) -> Up:
        started.append(Up(tmp_path, *flags))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.wait()


def test_one_command_brings_up_everything_and_sigterm_ends_it_all(
    up: Callable[..., Up], tmp_path: Path
) -> None:
    it = up("--inference", "1")
    stack = it.stack()
    assert set(stack["workers"]) == {"joiner-1", "trainer-1", "inference-1"}
    for worker in stack["workers"].values():
        assert httpx.get(f"http://127.0.0.1:{worker['port']}/readyz").status_code == 200
    assert stack["inference"] == [f"http://127.0.0.1:{stack['workers']['inference-1']['port']}"]
    with Redis.from_url(stack["redis_url"]) as client:
        assert client.ping()
    children = it.children()
    assert len(children) >= 5

    it.process.send_signal(signal.SIGTERM)
    assert it.process.wait() == 0, it.said()
    assert all(gone(pid) for pid in children)
    assert not it.file.exists()
    said = it.said()
    assert "kafka is ready" in said
    assert "inference-1 is ready" in said
    assert said.rstrip().endswith("stopped")
    assert {f.stem for f in (tmp_path / "logs").glob("*.log")} == {
        "kafka",
        "redis",
        "joiner-1",
        "trainer-1",
        "inference-1",
    }


def test_ctrl_c_while_it_starts_ends_it_all(up: Callable[..., Up], settings: Settings) -> None:
    it = up("--kafka", settings.kafka_address, "--redis", settings.redis_address, "--joiners", "0")
    children = wait_for(it.children, "its first worker")
    os.killpg(it.process.pid, signal.SIGINT)  # as a terminal does, to all of the group
    assert it.process.wait() == 0, it.said()
    assert all(gone(pid) for pid in children)
    assert "Traceback" not in it.said()


def test_a_killed_supervisor_leaves_nothing_behind_and_its_folder_usable(
    up: Callable[..., Up], settings: Settings
) -> None:
    flags = ("--kafka", settings.kafka_address, "--joiners", "0", "--trainers", "0", "--inference", "0")
    it = up(*flags)
    stack = it.stack()
    redis = stack["servers"]["redis"]
    with Redis.from_url(stack["redis_url"]) as client:
        client.set("kept", "1")
    it.process.kill()
    it.process.wait()
    wait_for(lambda: gone(redis["pid"]), "the server's end")

    again = up(*flags)
    assert again.stack()["servers"]["redis"]["port"] == redis["port"]
    with Redis.from_url(stack["redis_url"]) as client:
        assert client.get("kept") == b"1"


def no_workers(settings: Settings) -> Stack:
    return Stack(settings, joiners=0, trainers=0, inference=0)


async def test_two_stacks_do_not_share_a_folder(settings: Settings) -> None:
    async with no_workers(settings):
        with pytest.raises(ConfigError, match=rf"in use by another stack \(process {os.getpid()}\).*--data"):
            await no_workers(settings).__aenter__()
        assert settings.running_stack()["pid"] == os.getpid()  # the loser has not touched it
    assert settings.running_stack() == {}
    async with no_workers(settings):
        pass


async def test_a_folder_that_cannot_be_used_is_said(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used as data folder"):
        await Stack(settings.model_copy(update={"data": tmp_path / "file"})).__aenter__()


async def test_servers_that_are_killed_come_back_with_their_data(tmp_path: Path) -> None:
    said: list[str] = []
    settings = Settings.load(data=tmp_path, partitions=1, topic_prefix="kept")
    async with Stack(settings, joiners=0, trainers=0, inference=0, on_event=said.append) as stack:
        topic = Topics.of(settings).replies
        kafka, redis_url = stack.kafka, stack.redis_url
        async with AIOKafkaProducer(bootstrap_servers=kafka, enable_idempotence=True) as producer:
            await producer.send_and_wait(topic, b"said")
        with Redis.from_url(redis_url) as client:
            client.set("kept", "1")

        for server in stack.servers:
            assert server.child is not None
            os.kill(server.child.pid, signal.SIGKILL)
        both = {"kafka has restarted", "redis has restarted"}
        await async_wait_for(lambda: both <= set(said), "both servers again")

        for server in stack.servers:
            assert f"{server.name} was killed by SIGKILL; restarting it" in said
        assert (stack.kafka, stack.redis_url) == (kafka, redis_url)
        with Redis.from_url(redis_url) as client:
            assert client.get("kept") == b"1"
        consumer = AIOKafkaConsumer(bootstrap_servers=kafka, auto_offset_reset="earliest")
        await consumer.start()
        try:
            consumer.assign([TopicPartition(topic, 0)])
            assert (await consumer.getone()).value == b"said"
        finally:
            await consumer.stop()
    assert not any(server.alive for server in stack.servers)


async def test_a_worker_that_is_killed_is_started_again_at_its_port(settings: Settings) -> None:
    said: list[str] = []
    async with Stack(settings, joiners=0, trainers=0, inference=1, on_event=said.append) as stack:
        [worker] = stack.workers
        [url] = stack.inference_urls
        first = worker.child.pid
        os.kill(first, signal.SIGKILL)

        async def ready() -> bool:
            try:
                async with httpx.AsyncClient(timeout=5, verify=False) as http:
                    return worker.child.pid != first and (await http.get(f"{url}/readyz")).status_code == 200
            except httpx.HTTPError:
                return False

        await async_wait_for(ready, "the worker again", every_s=0.1)
        assert "inference-1 was killed by SIGKILL; restarting it" in said
        assert stack.inference_urls == [url]
        assert settings.running_stack()["workers"]["inference-1"]["pid"] == worker.child.pid
    assert not worker.alive


async def test_a_worker_that_refuses_its_settings_is_an_error_at_once(settings: Settings) -> None:
    wrong = settings.model_copy(update={"text_dim": 7})
    with pytest.raises(ConfigError, match=r"(?s)inference-1 rejects its settings.*CORTEX_TEXT_DIM is 7"):
        await Stack(wrong, joiners=0, trainers=0, inference=1).__aenter__()
    assert settings.running_stack() == {}


def rejecting_its_settings(worker: ManagedWorker) -> None:
    """Kills a worker, whose restart then rejects its settings."""
    worker.settings = worker.settings.model_copy(update={"text_dim": 7})
    os.kill(worker.child.pid, signal.SIGKILL)


def test_a_restarted_worker_that_rejects_its_settings_ends_the_command(settings: Settings) -> None:
    said: list[str] = []
    stack = Stack(settings, joiners=0, trainers=0, inference=1, on_event=said.append)
    with pytest.raises(ConfigError, match=r"(?s)inference-1 rejects its settings.*CORTEX_TEXT_DIM is 7"):
        run_until_signal(stack, lambda: rejecting_its_settings(stack.workers[0]))
    assert said.count("inference-1 was killed by SIGKILL; restarting it") == 1
    assert said[-1] == "stopped"
    assert settings.running_stack() == {}


async def test_an_error_of_the_supervisor_ends_the_stack(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class UnforeseenError(Exception):
        pass

    async def fail(_: ManagedWorker) -> None:
        raise UnforeseenError

    async def run() -> None:
        stack = Stack(settings, joiners=1, trainers=0, inference=0)
        async with stack, asyncio.timeout(DEFAULT_TIMEOUT_S):
            monkeypatch.setattr(ManagedWorker, "start", fail)
            os.kill(stack.workers[0].child.pid, signal.SIGKILL)
            await asyncio.Event().wait()

    with pytest.raises(UnforeseenError):
        await run()
    assert settings.running_stack() == {}


async def test_an_error_of_the_body_leaves_the_stack_as_it_is(settings: Settings) -> None:
    cause = OSError("cause")
    with pytest.raises(ConfigError, match="of the body") as raised:
        async with no_workers(settings):
            raise ConfigError("of the body") from cause
    assert raised.value.__cause__ is cause
    assert settings.running_stack() == {}
