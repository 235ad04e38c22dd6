"""Everything on this machine: servers where none are given, topics, workers; kept running, stopped in order.

    async with Stack(settings, joiners=1, trainers=1, inference=2, on_event=print) as stack:
        print(stack.kafka, stack.redis_url, stack.inference_urls)

Inside the body all of it answers. What dies is started again, and said. On leaving, everything is stopped
within ten seconds: inference first, then joiners and trainers (they finish their batch and commit), then the
servers. It learns nothing and reads no event.
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
"""For a worker to finish its batch and leave its group; twice this and the servers' make less than 10 s."""
SERVER_GRACE_S = 2.5
READY_TIMEOUT_S = 240.0
"""A busy machine of two cores takes a minute to load the sentence encoder in each inference worker."""
SAY_WAITING_S = 15.0
STARTS_BEFORE_GIVING_UP = 3
"""A worker that ends this often before the stack is up would end for ever."""


class Member(Protocol):
    """A server or a worker, as the supervisor sees it."""

    name: str

    @property
    def alive(self) -> bool: ...
    @property
    def ending(self) -> str: ...
    async def start(self) -> None: ...
    async def stop(self, grace_s: float = ...) -> object: ...
    def rotate_log(self) -> None: ...


class Worker:
    """One worker process: `python -m streams.cli KIND` with its settings in the environment."""

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
    """The servers, the topics and the workers of one data folder.

    Args:
        settings: `kafka` and `redis_url` None: the embedded ones. `port`: of the first inference worker, the
            others take the next ones; 0: free ones.
        joiners: number of joiner processes; likewise `trainers` and `inference`.
        on_event: told in one sentence what happens: what is up, what died, what was started again.

    Raises (on entering):
        ConfigError: another stack runs on the data folder, or a setting is unusable.
        UnavailableError: a server or a worker does not come up; the message holds the end of its log.
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
        """With both addresses filled in once the servers are up."""
        self.workers: list[Worker] = []
        self.servers: list[EmbeddedServer] = []
        self._counts = {"joiner": joiners, "trainer": trainers, "inference": inference}
        self._say = on_event or (lambda _: None)
        self._keepers: list[asyncio.Task[None]] = []
        self._lock = filelock.FileLock(settings.data / "lock")

    # --- what it offers -------------------------------------------------------------------------------------

    @property
    def kafka(self) -> str:
        """Bootstrap servers."""
        return self.settings.kafka_address

    @property
    def redis_url(self) -> str:
        return self.settings.redis_address

    @property
    def inference_urls(self) -> list[str]:
        """http://host:port of each inference worker."""
        return [w.url for w in self.workers if w.kind == "inference"]

    # --- starting -------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        self._take_lock()
        try:
            await self._start_servers()
            await create_topics(self.settings)
            await self._start_workers()
            self._write_stack_file()
            members: list[Member] = [*self.servers, *self.workers]
            self._keepers = [asyncio.create_task(self._keep(m), name=m.name) for m in members]
        except BaseException:
            await self.stop()
            raise
        return self

    def _take_lock(self) -> None:
        data = self.settings.data
        try:
            data.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            owner = self.settings.running_stack().get("pid", "unknown")
            raise ConfigError(
                f"{data} is in use by another stack (process {owner}): stop that one, or choose another "
                "folder with --data"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{data} cannot be used as data folder ({error.strerror}): choose another with --data"
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
        self._say(f"{server.name} is up at {server.address} ({time.monotonic() - before:.1f} s)")

    def _adopt_addresses(self) -> None:
        """Puts the embedded servers' addresses into the settings of all that use them."""
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
                self.workers.append(Worker(kind, number, self.settings, self._port(kind, number)))
        for worker in self.workers:
            await worker.start()
        async with httpx.AsyncClient(timeout=5) as http:
            await _all(self._until_ready(worker, http) for worker in self.workers)

    def _port(self, kind: str, number: int) -> int:
        if kind == "inference" and self.settings.port:
            wanted = self.settings.port + number - 1
            if is_free(wanted):
                return wanted
            port = remembered_port(self.settings.data, f"{kind}-{number}")
            self._say(f"port {wanted} is taken: {kind}-{number} listens on {port}")
            return port
        return remembered_port(self.settings.data, f"{kind}-{number}")

    async def _until_ready(self, worker: Worker, http: httpx.AsyncClient) -> None:
        before = time.monotonic()
        starts, said = 1, before
        missing = "it does not answer yet"
        while time.monotonic() - before < READY_TIMEOUT_S:
            if not worker.alive:
                tail = f"the end of {worker.child.log_file}:\n{worker.child.log_tail()}"
                if worker.child.returncode == 2:  # what every command exits with on unusable settings
                    raise ConfigError(f"{worker.name} refuses its settings; {tail}")
                if starts == STARTS_BEFORE_GIVING_UP:
                    raise UnavailableError(f"{worker.name} {worker.ending}, {starts} times; {tail}")
                self._say(f"{worker.name} {worker.ending} while starting; starting it again")
                await worker.start()
                starts += 1
            with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
                answer = await http.get(f"{worker.url}/readyz")
                if answer.status_code == 200:
                    self._say(f"{worker.name} is ready at {worker.url} ({time.monotonic() - before:.1f} s)")
                    return
                missing = "; ".join(f"{k}: {v}" for k, v in answer.json()["missing"].items())
            if time.monotonic() - said > SAY_WAITING_S:
                said = time.monotonic()
                self._say(f"waiting for {worker.name} ({missing})")
            await asyncio.sleep(0.1)
        raise UnavailableError(
            f"{worker.name} was not ready within {READY_TIMEOUT_S:.0f} s ({missing}); the end of "
            f"{worker.child.log_file}:\n{worker.child.log_tail()}"
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

    # --- keeping it running ---------------------------------------------------------------------------------

    async def _keep(self, member: Member) -> None:
        """Starts the member again whenever it has died; waits longer each time it dies young."""
        delay, alive_since = 0.2, time.monotonic()
        while True:
            while member.alive:
                await asyncio.sleep(0.1)
                member.rotate_log()
            if time.monotonic() - alive_since > 30:
                delay = 0.2
            self._say(f"{member.name} {member.ending}; starting it again")
            await asyncio.sleep(delay)
            delay = min(2 * delay, 10.0)
            before = (self.settings.kafka, self.settings.redis_url)
            try:
                await member.start()
            except (UnavailableError, OSError) as error:
                self._say(str(error))
                continue
            alive_since = time.monotonic()
            self._adopt_addresses()
            self._write_stack_file()
            self._say(f"{member.name} runs again")
            if before != (self.settings.kafka, self.settings.redis_url):
                self._say(f"the port of {member.name} was taken meanwhile: starting all workers again")
                await _all(worker.stop() for worker in self.workers)

    # --- stopping -------------------------------------------------------------------------------------------

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Stops everything, whatever happens meanwhile; also safe after a failed start, and twice."""
        self._say("stopping")
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
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
                self._say("stopped")

    def kill(self) -> None:
        """SIGKILL for everything that still runs."""
        for child in [*(w.child for w in self.workers), *(s.child for s in self.servers if s.child)]:
            child.kill()


async def _all(steps: Iterable[Coroutine[Any, Any, object]]) -> None:
    """Runs coroutines side by side; the first error cancels the others and is raised as it is."""
    tasks = [asyncio.create_task(step) for step in steps]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def run_until_signal(stack: Stack, on_up: Callable[[], None]) -> None:
    """Runs the stack until SIGINT or SIGTERM; a second one ends all at once.

    Args:
        on_up: called once everything answers.

    Raises:
        ConfigError, UnavailableError: as `Stack` does.
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
