"""The supervisor of `cortex up`: starts servers (if none are configured), topics and workers on this machine.

    async with Stack(settings, joiners=1, trainers=1, inference=2, on_event=print) as stack:
        print(stack.kafka, stack.redis_url, stack.inference_urls)

In the body everything is ready. A process that ends is restarted and reported. A worker that rejects its
settings (exit code 2) is not: it cancels the body, and the `async with` raises its error; so does an error of
the supervisor itself. On exit everything is stopped within ten seconds: inference first, then joiners and
trainers (they finish their batch and commit), then the servers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterable
from types import TracebackType
from typing import Any, Protocol, Self

import filelock
import httpx
from pydantic import SecretStr

from cortex_core.errors import ConfigError, UnavailableError
from streams.api_keys import require_keys
from streams.connections import backoff
from streams.kafka.topics import create_topics
from streams.local.embedded import (
    EmbeddedKafka,
    EmbeddedRedis,
    EmbeddedServer,
    free_port,
    is_free,
    remembered_port,
    write_atomically,
)
from streams.local.processes import Child
from streams.settings import Settings

WORKER_GRACE_S = 3.5
"""Time for a worker to finish its batch and leave its group; twice this plus SERVER_GRACE_S is below 10 s."""
SERVER_GRACE_S = 2.5
READY_TIMEOUT_S = 240.0
"""A busy machine with two cores takes a minute to load the sentence encoder in each inference worker."""
REPORT_WAITING_S = 15.0
STABLE_S = 30.0
"""A process that ends after this time is restarted at once, an earlier one with backoff."""
MAX_STARTS = 3
"""A worker that has ended this often before the stack was ready is not restarted."""


class Member(Protocol):
    """A supervised server or worker."""

    name: str

    @property
    def alive(self) -> bool: ...
    @property
    def ending(self) -> str: ...
    async def start(self) -> None: ...
    async def stop(self, grace_s: float = ...) -> object: ...
    def rotate_log(self) -> None: ...


class ManagedWorker:
    """A worker process: `python -m streams.cli KIND`, with its settings in the environment."""

    def __init__(self, kind: str, number: int, settings: Settings, port: int) -> None:
        self.kind = kind
        self.name = f"{kind}-{number}"
        self.port = port
        self.settings = settings
        self.child = self._child()

    def _child(self) -> Child:
        return Child(
            self.name,
            [sys.executable, "-m", "streams.cli", self.kind],
            self.settings.data.absolute() / "logs" / f"{self.name}.log",
            env=self.settings.environment() | {"CORTEX_PORT": str(self.port)},
        )

    @property
    def url(self) -> str:
        return f"http://{self.settings.local_host}:{self.port}"

    @property
    def alive(self) -> bool:
        return self.child.alive

    @property
    def ending(self) -> str:
        return self.child.ending

    @property
    def log_end(self) -> str:
        """The end of its log, for an error message."""
        return f"end of {self.child.log_file}:\n{self.child.log_tail()}"

    def check_settings(self) -> None:
        """Raises a `ConfigError` if it has ended because it rejects its settings: a restart cannot help."""
        if self.child.returncode == 2:  # the exit code of every command for invalid settings
            raise ConfigError(f"{self.name} rejects its settings; {self.log_end}")

    async def start(self) -> None:
        if not is_free(self.port):
            self.port = free_port()
        self.child = self._child()
        self.child.start()

    async def stop(self, grace_s: float = WORKER_GRACE_S) -> bool:
        return await self.child.stop(grace_s)

    def rotate_log(self) -> None:
        self.child.rotate_log()


class Stack:
    """The servers, topics and workers of one data folder.

    Args:
        settings: if `kafka` or `redis_url` is None, the embedded server is used. `port` is that of the first
            inference worker, the others use the following ports; 0 means free ports.
        joiners: number of joiner processes.
        trainers: number of trainer processes.
        inference: number of inference workers.
        on_event: called with one sentence for each event: a process is ready, has ended, or is restarted.

    Raises (on entering):
        ConfigError: another stack uses the data folder, or a setting is invalid.
        UnavailableError: a server or a worker does not start; the message contains the end of its log.

    Raises (on leaving):
        ConfigError: a server or a worker that was restarted rejects its settings.
        Exception: an error of the supervisor.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        joiners: int = 1,
        trainers: int = 1,
        inference: int = 2,
        on_event: Callable[[str], None] | None = None,
    ) -> None:
        self.settings = settings
        """Includes the addresses of the embedded servers, once they have started."""
        self.workers: list[ManagedWorker] = []
        self.servers: list[EmbeddedServer] = []
        self._counts = {"joiner": joiners, "trainer": trainers, "inference": inference}
        self._report = on_event or (lambda _: None)
        self._supervisors: asyncio.TaskGroup | None = None
        self._supervising: list[asyncio.Task[None]] = []
        self._lock = filelock.FileLock(settings.data / "lock")

    # --- addresses ------------------------------------------------------------------------------------------

    @property
    def kafka(self) -> str:
        """Bootstrap servers."""
        return self.settings.kafka_address

    @property
    def redis_url(self) -> str:
        return self.settings.redis_address

    @property
    def inference_urls(self) -> list[str]:
        """The URL http://host:port of each inference worker."""
        return [w.url for w in self.workers if w.kind == "inference"]

    # --- starting -------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._counts["inference"]:
            require_keys(self.settings)
        self._take_lock()
        try:
            await self._start_servers()
            await create_topics(self.settings)
            await self._start_workers()
            self._write_stack_file()
            members: list[Member] = [*self.servers, *self.workers]
            # A task group cancels the body of the `async with` when one of its tasks fails.
            self._supervisors = await asyncio.TaskGroup().__aenter__()
            self._supervising = [self._supervisors.create_task(self._supervise(m)) for m in members]
        except BaseException:
            await self.stop()
            raise
        return self

    def _take_lock(self) -> None:
        data = self.settings.data
        try:
            data.mkdir(parents=True, exist_ok=True, mode=0o700)
            data.chmod(0o700)  # the texts of replies are in Kafka's log, and passwords in stack.json
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            owner = self.settings.running_stack().get("pid", "unknown")
            raise ConfigError(
                f"{data} is in use by another stack (process {owner}): stop it, or choose another folder "
                "with --data"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{data} cannot be used as data folder ({error.strerror}): choose another one with --data"
            ) from error
        write_atomically(self.settings.stack_file, json.dumps({"pid": os.getpid()}))

    async def _start_servers(self) -> None:
        kafka: EmbeddedKafka | None = None
        redis: EmbeddedRedis | None = None
        if self.settings.kafka is None:
            kafka = EmbeddedKafka(self.settings.data, self.settings.cache)
            self.servers.append(kafka)
        if self.settings.redis_url is None:
            redis = EmbeddedRedis(self.settings.data)
            self.servers.append(redis)
        await _all(self._timed_start(server) for server in self.servers)
        self._adopt_addresses()

    async def _timed_start(self, server: EmbeddedServer) -> None:
        before = time.monotonic()
        await server.start()
        self._report(f"{server.name} is ready at {server.address} ({time.monotonic() - before:.1f} s)")

    def _adopt_addresses(self) -> None:
        """Copies the addresses of the embedded servers to the settings of the stack and its workers."""
        update: dict[str, object] = {}
        for server in self.servers:
            if isinstance(server, EmbeddedRedis):
                update["redis_url"] = SecretStr(server.url)
            else:
                update["kafka"] = server.address
        self.settings = self.settings.model_copy(update=update)
        for worker in self.workers:
            worker.settings = self.settings

    async def _start_workers(self) -> None:
        for kind, count in self._counts.items():
            for number in range(1, count + 1):
                self.workers.append(ManagedWorker(kind, number, self.settings, self._port(kind, number)))
        for worker in self.workers:
            await worker.start()
        async with httpx.AsyncClient(timeout=5) as http:
            await _all(self._until_ready(worker, http) for worker in self.workers)

    def _port(self, kind: str, number: int) -> int:
        if kind == "inference" and self.settings.port:
            preferred = self.settings.port + number - 1
            if is_free(preferred):
                return preferred
            port = remembered_port(self.settings.data, f"{kind}-{number}")
            self._report(f"port {preferred} is in use: {kind}-{number} listens on {port}")
            return port
        return remembered_port(self.settings.data, f"{kind}-{number}")

    async def _until_ready(self, worker: ManagedWorker, http: httpx.AsyncClient) -> None:
        before = time.monotonic()
        starts, reported = 1, before
        missing = "no answer yet"
        while time.monotonic() - before < READY_TIMEOUT_S:
            if not worker.alive:
                worker.check_settings()
                if starts == MAX_STARTS:
                    raise UnavailableError(f"{worker.name} {worker.ending}, {starts} times; {worker.log_end}")
                self._report(f"{worker.name} {worker.ending} while starting; restarting it")
                await worker.start()
                starts += 1
            with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
                answer = await http.get(f"{worker.url}/readyz")
                if answer.status_code == 200:
                    took = time.monotonic() - before
                    self._report(f"{worker.name} is ready at {worker.url} ({took:.1f} s)")
                    return
                missing = "; ".join(f"{k}: {v}" for k, v in answer.json()["missing"].items())
            if time.monotonic() - reported > REPORT_WAITING_S:
                reported = time.monotonic()
                self._report(f"waiting for {worker.name} ({missing})")
            await asyncio.sleep(0.1)
        raise UnavailableError(
            f"{worker.name} was not ready within {READY_TIMEOUT_S:.0f} s ({missing}); {worker.log_end}"
        )

    def _write_stack_file(self) -> None:
        content = {
            "pid": os.getpid(),
            "kafka": self.kafka,
            "redis_url": self.redis_url,
            "inference": self.inference_urls,
            "workers": {w.name: {"pid": w.child.pid, "port": w.port} for w in self.workers},
            "servers": {s.name: {"pid": s.child.pid, "port": s.port} for s in self.servers if s.child},
        }
        file = self.settings.stack_file
        write_atomically(file, json.dumps(content, indent=1))

    # --- supervising ----------------------------------------------------------------------------------------

    async def _supervise(self, member: Member) -> None:
        """Restarts the member whenever it ends: at once, and with backoff if it ends soon after its start.

        Raises:
            ConfigError: it rejects its settings.
        """
        attempts, alive_since = backoff(most_s=10.0), time.monotonic()
        while True:
            while member.alive:
                await asyncio.sleep(0.1)
                member.rotate_log()
            if isinstance(member, ManagedWorker):
                member.check_settings()
            if time.monotonic() - alive_since > STABLE_S:
                attempts = backoff(most_s=10.0)
            self._report(f"{member.name} {member.ending}; restarting it")
            await anext(attempts)
            before = (self.settings.kafka, self.settings.redis_url)
            try:
                await member.start()
            except (UnavailableError, OSError) as error:
                self._report(str(error))
                continue
            alive_since = time.monotonic()
            self._adopt_addresses()
            self._write_stack_file()
            self._report(f"{member.name} has restarted")
            if before != (self.settings.kafka, self.settings.redis_url):
                self._report(
                    f"{member.name} has a new port, because the old one is in use: restarting all workers"
                )
                await _all(worker.stop() for worker in self.workers)

    # --- stopping -------------------------------------------------------------------------------------------

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self.stop()
        finally:
            await self._end_supervision(kind, error, trace)

    async def _end_supervision(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises the first error of a supervisor, if one failed before the body did."""
        if self._supervisors is None:
            return
        try:
            await self._supervisors.__aexit__(kind, error, trace)
        except BaseExceptionGroup as group:
            first = group.exceptions[0]
            if first is not error:  # which leaves the `async with` by itself
                raise first from first.__cause__

    async def stop(self) -> None:
        """Stops everything; can be called after a failed start, and repeatedly."""
        self._report("stopping")
        for task in self._supervising:
            task.cancel()
        await asyncio.gather(*self._supervising, return_exceptions=True)
        try:
            first = [w for w in self.workers if w.kind == "inference"]
            then = [w for w in self.workers if w.kind != "inference"]
            await _all(w.stop(WORKER_GRACE_S) for w in first)
            await _all(w.stop(WORKER_GRACE_S) for w in then)
            await _all(s.stop(SERVER_GRACE_S) for s in self.servers)
        finally:
            self.kill()
            if self._lock.is_locked:
                self.settings.stack_file.unlink(missing_ok=True)
                self._lock.release()
                self._report("stopped")

    def kill(self) -> None:
        """Sends SIGKILL to every process that still runs."""
        for child in [*(w.child for w in self.workers), *(s.child for s in self.servers if s.child)]:
            child.kill()


async def _all(steps: Iterable[Coroutine[Any, Any, object]]) -> None:
    """Runs coroutines concurrently; the first error cancels the others and is raised."""
    tasks = [asyncio.create_task(step) for step in steps]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def run_until_signal(stack: Stack, on_up: Callable[[], None]) -> None:
    """Runs the stack until SIGINT or SIGTERM; a second signal kills everything.

    Args:
        on_up: called once everything is ready.

    Raises:
        ConfigError, UnavailableError, Exception: see `Stack`.
    """

    async def body() -> None:
        loop, main = asyncio.get_running_loop(), asyncio.current_task()
        assert main is not None
        signals = 0

        def on_signal() -> None:
            nonlocal signals
            signals += 1
            if signals == 1:
                main.cancel()
            else:
                stack.kill()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)
        try:
            async with stack:
                on_up()
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            if not signals:
                raise

    asyncio.run(body())
