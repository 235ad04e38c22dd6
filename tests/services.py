"""What integration tests stand on: a real Kafka, a real Redis, real worker processes, and waiting."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
from aiokafka.admin import AIOKafkaAdminClient
from redis import Redis

from streams.local.embedded import EmbeddedKafka, EmbeddedRedis, free_port
from streams.local.processes import Child
from streams.settings import Settings, default_cache_dir

T = TypeVar("T")
KAFKA_IMAGE = "apache/kafka:4.3.1"
REDIS_IMAGE = "redis:7-alpine"

# --- waiting ------------------------------------------------------------------------------------------------


def wait_for(
    predicate: Callable[[], T], timeout_s: float = 30.0, what: str = "it", every_s: float = 0.02
) -> T:
    """The first true value of `predicate()`; AssertionError naming `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s} s in vain for {what}; last value: {value!r}")
        time.sleep(every_s)


async def async_wait_for(
    predicate: Callable[[], Any], timeout_s: float = 30.0, what: str = "it", every_s: float = 0.02
) -> Any:
    """Like `wait_for`, on an event loop; `predicate` may be async."""
    deadline = time.monotonic() + timeout_s
    while True:
        result = predicate()
        value = (await result) if inspect.isawaitable(result) else result
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s} s in vain for {what}; last value: {value!r}")
        await asyncio.sleep(every_s)


# --- servers ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def kafka_server(folder: Path) -> Iterator[str]:
    """host:port of a Kafka: from the environment, else in a container where Docker answers, else embedded."""
    given = os.environ.get("CORTEX_TEST_KAFKA") or os.environ.get("CORTEX_KAFKA")
    if given:
        yield given
        return
    port = free_port()
    listener = f"PLAINTEXT://127.0.0.1:{port}"
    variables = {
        "KAFKA_NODE_ID": "1",
        "KAFKA_PROCESS_ROLES": "broker,controller",
        "KAFKA_LISTENERS": f"PLAINTEXT://:{port},CONTROLLER://:9093",
        "KAFKA_ADVERTISED_LISTENERS": listener,
        "KAFKA_CONTROLLER_LISTENER_NAMES": "CONTROLLER",
        "KAFKA_LISTENER_SECURITY_PROTOCOL_MAP": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "KAFKA_CONTROLLER_QUORUM_VOTERS": "1@localhost:9093",
        "KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR": "1",
        "KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR": "1",
        "KAFKA_TRANSACTION_STATE_LOG_MIN_ISR": "1",
        "KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS": "0",
        "KAFKA_GROUP_MIN_SESSION_TIMEOUT_MS": "1000",
        "KAFKA_AUTO_CREATE_TOPICS_ENABLE": "false",
    }
    with container(KAFKA_IMAGE, {port: port}, variables) as started:
        if started:
            address = f"127.0.0.1:{port}"
            wait_for(lambda: asyncio.run(kafka_answers(address)), 60, f"Kafka at {address}", every_s=0.2)
            yield address
            return
    server = EmbeddedKafka(folder, default_cache_dir())
    asyncio.run(server.start())
    try:
        yield server.address
    finally:
        asyncio.run(server.stop())


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """URL of a Redis, found or started like `kafka_server`'s Kafka."""
    given = os.environ.get("CORTEX_TEST_REDIS_URL") or os.environ.get("CORTEX_REDIS_URL")
    if given:
        yield given
        return
    port = free_port()
    with container(REDIS_IMAGE, {6379: port}, {}) as started:
        if started:
            url = f"redis://127.0.0.1:{port}/0"
            wait_for(lambda: redis_answers(url), 30, f"Redis at {url}")
            yield url
            return
    server = EmbeddedRedis(folder)
    asyncio.run(server.start())
    try:
        yield server.url
    finally:
        asyncio.run(server.stop())


@contextlib.contextmanager
def container(image: str, ports: dict[int, int], variables: dict[str, str]) -> Iterator[bool]:
    """Runs the image with container port → port of this machine; yields False where Docker cannot."""
    if not docker_listens():
        yield False
        return
    with contextlib.ExitStack() as stack:
        try:
            import docker  # type: ignore[import-untyped,unused-ignore]
            from testcontainers.core.container import DockerContainer

            client = docker.from_env(timeout=2)
            stack.callback(client.close)
            client.ping()
            it = DockerContainer(image)
            for inside, outside in ports.items():
                it.with_bind_ports(inside, outside)
            for name, value in variables.items():
                it.with_env(name, value)
            stack.enter_context(it)
            started = True
        except Exception:  # no engine, no permission, no image: every reason leads to the embedded server
            started = False
        yield started


def docker_listens() -> bool:
    """Whether there is an engine to ask; its client leaves sockets open when there is none."""
    host = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    if not host.startswith("unix://"):
        return True
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        return probe.connect_ex(host.removeprefix("unix://")) == 0


async def kafka_answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        _, writer = await asyncio.open_connection(host, int(port))
        writer.close()
        admin = AIOKafkaAdminClient(bootstrap_servers=address)
        try:
            await admin.start()
            await admin.list_topics()
        finally:
            await admin.close()
    except Exception:
        return False
    return True


def redis_answers(url: str) -> bool:
    try:
        with Redis.from_url(url) as client:
            return bool(client.ping())
    except Exception:
        return False


def forget(settings: Settings) -> None:
    """Deletes all topics and keys under the settings' prefix, so that a long test run stays small."""

    async def delete_topics() -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka_address)
        try:
            await admin.start()
            mine = [t for t in await admin.list_topics() if t.startswith(f"{settings.topic_prefix}.")]
            if mine:
                await admin.delete_topics(mine)
        finally:
            await admin.close()

    asyncio.run(delete_topics())
    with Redis.from_url(settings.redis_address) as client:
        for keys in iter(lambda: list(client.scan_iter(f"{settings.topic_prefix}:*", count=1000)), []):
            client.delete(*keys)


# --- workers ------------------------------------------------------------------------------------------------

_spawned: list[WorkerProcess] = []


class WorkerProcess:
    """A worker as a real process: `python -m streams.cli NAME` with the settings in its environment."""

    def __init__(self, name: str, settings: Settings, env: dict[str, str]) -> None:
        self.name = name
        log_file = settings.data / "logs" / f"{name}-{len(_spawned)}.log"
        self._child = Child(
            name,
            [sys.executable, "-m", "streams.cli", name],
            log_file,
            env=settings.environment() | {"CORTEX_PORT": "0", "CORTEX_LOG_FORMAT": "json"} | env,
        )
        self._child.start()

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def alive(self) -> bool:
        return self._child.alive

    @property
    def returncode(self) -> int | None:
        """Exit code; -9 after SIGKILL; None while it runs."""
        return self._child.returncode

    @property
    def port(self) -> int:
        """The port of its HTTP service; waits until it listens."""

        def listening() -> int:
            for line in self.log_text().splitlines():
                if "listening" in line and (found := re.search(r"http://\S+?:(\d+)", line)):
                    return int(found[1])
            assert self.alive, f"{self.name} {self._child.ending} before it listened:\n{self.log_text()}"
            return 0

        return wait_for(listening, 30, f"{self.name} to listen")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log_text(self) -> str:
        """All it has logged, JSON lines."""
        return self._child.log_text()

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=10)

    def wait_ready(self, timeout_s: float = 60.0) -> WorkerProcess:
        """Returns once `/readyz` says yes."""

        def ready() -> bool:
            assert self.alive, f"{self.name} {self._child.ending} before it was ready:\n{self.log_text()}"
            return self.get("/readyz").status_code == 200

        try:
            wait_for(ready, timeout_s, f"{self.name} to be ready", every_s=0.05)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self._child.log_tail(40)}") from error
        return self

    def signal(self, number: int) -> None:
        self._child.signal(number)

    def kill(self) -> None:
        """kill -9."""
        self._child.kill()

    def stop(self, timeout_s: float = 10.0) -> int:
        """SIGTERM; its exit code, which is -9 when it had to be killed."""
        asyncio.run(self._child.stop(timeout_s)) if not _loop_runs() else _in_thread(self._child, timeout_s)
        code = self.returncode
        assert code is not None
        return code


def _loop_runs() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _in_thread(child: Child, timeout_s: float) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: asyncio.run(child.stop(timeout_s))).result()


def spawn_worker(name: str, settings: Settings, **env: Any) -> WorkerProcess:
    """Starts joiner, trainer or inference as a process; ended after the test, whatever happens.

    Args:
        env: more settings, by their names: `spawn_worker("trainer", settings, update_every=1)`; or whole
            variable names in capitals.
    """
    variables = {k if k.isupper() else f"CORTEX_{k.upper()}": str(v) for k, v in env.items()}
    worker = WorkerProcess(name, settings, variables)
    _spawned.append(worker)
    return worker


def end_spawned() -> None:
    """Ends every process that `spawn_worker` started."""
    while _spawned:
        _spawned.pop().kill()
