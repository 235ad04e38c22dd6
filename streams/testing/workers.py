"""Workers as real processes, for tests and benchmarks."""

from __future__ import annotations

import asyncio
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from streams.local.processes import Child
from streams.settings import Settings
from streams.testing.waiting import DEFAULT_TIMEOUT_S, wait_for

_spawned: list[WorkerProcess] = []


class WorkerProcess:
    """A worker process: `python -m streams.cli NAME` with the settings in its environment."""

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
        """Exit code; -9 after SIGKILL; None while the process runs."""
        return self._child.returncode

    @property
    def port(self) -> int:
        """The port of its HTTP service; waits until the worker listens."""

        def listening() -> int:
            for line in self.log_text().splitlines():
                if "listening" in line and (found := re.search(r"http://\S+?:(\d+)", line)):
                    return int(found[1])
            assert self.alive, f"{self.name} {self._child.ending} before it listened:\n{self.log_text()}"
            return 0

        return wait_for(listening, f"{self.name} to listen")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log_text(self) -> str:
        """Its complete log: JSON lines."""
        return self._child.log_text()

    def get(self, path: str) -> httpx.Response:
        # It speaks plain HTTP. Loading the certificates of TLS would cost far more than the request.
        return httpx.get(self.url + path, timeout=DEFAULT_TIMEOUT_S, verify=False)

    def wait_ready(self) -> WorkerProcess:
        """Waits until `/readyz` answers 200; returns the worker."""

        def ready() -> bool:
            assert self.alive, f"{self.name} {self._child.ending} before it was ready:\n{self.log_text()}"
            return self.get("/readyz").status_code == 200

        try:
            wait_for(ready, f"{self.name} to be ready", every_s=0.05)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self._child.log_tail(40)}") from error
        return self

    def signal(self, number: int) -> None:
        self._child.signal(number)

    def kill(self) -> None:
        """Sends SIGKILL."""
        self._child.kill()

    def stop(self, timeout_s: float = DEFAULT_TIMEOUT_S) -> int:
        """Sends SIGTERM, and SIGKILL after `timeout_s`; returns the exit code, -9 after SIGKILL."""
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
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: asyncio.run(child.stop(timeout_s))).result()


def spawn_worker(name: str, settings: Settings, **env: Any) -> WorkerProcess:
    """Starts a joiner, trainer or inference worker as a process; `end_spawned` ends it.

    Args:
        env: further settings by name, as in `spawn_worker("trainer", settings, update_every=1)`, or
            environment variables by name in capitals.
    """
    variables = {k if k.isupper() else f"CORTEX_{k.upper()}": str(v) for k, v in env.items()}
    worker = WorkerProcess(name, settings, variables)
    _spawned.append(worker)
    return worker


def end_spawned() -> None:
    """Kills every process that `spawn_worker` started."""
    while _spawned:
        _spawned.pop().kill()
