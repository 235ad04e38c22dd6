"""Common parts of all worker processes: logs, health over HTTP, heartbeats, signals, a deadline for stopping.

    async def main(worker: Worker) -> None:
        async with worker.serving():            # /healthz, /readyz, /metrics answer from here on
            worker.ready("kafka")               # once it is connected; the same for "redis"
            await worker.stopping.wait()        # SIGTERM or SIGINT

    run_worker("trainer", settings, main)

It does not know what a worker does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from importlib.metadata import version
from typing import Any

import structlog
from prometheus_client import make_asgi_app
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from cortex_core.errors import ConfigError
from streams.failures import error_text
from streams.heartbeats import Activity, Heartbeat, beating
from streams.http_server import serving
from streams.settings import Settings

log = structlog.get_logger(__name__)


class _RateLimit(logging.Filter):
    """Rate-limits repeated log messages of libraries to one per `every_s`."""

    def __init__(self, every_s: float = 10.0) -> None:
        super().__init__()
        self._every_s = every_s
        self._logged_at: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        key = (record.name, str(record.msg)[:200])
        if len(self._logged_at) > 1_000:  # messages formatted before logging are all different
            self._logged_at.clear()
        if record.created - self._logged_at.get(key, 0.0) < self._every_s:
            return False
        self._logged_at[key] = record.created
        return True


class _TracebackOnce:
    """Processor that keeps an error's traceback in the first of several log messages, and else its text.

    What fails is retried, and the traceback is the same each time.
    """

    def __init__(self) -> None:
        self._logged: set[tuple[str, str, str]] = set()

    def __call__(self, _logger: Any, _method: str, event: dict[str, Any]) -> dict[str, Any]:
        info = event.get("exc_info")
        error = sys.exc_info()[1] if info is True else info[1] if isinstance(info, tuple) else info
        if not isinstance(error, BaseException):
            return event
        key = (str(event.get("event"))[:200], type(error).__name__, _where(error))
        if key in self._logged:
            del event["exc_info"]
            event.setdefault("error", error_text(error))
        elif len(self._logged) < 1_000:
            self._logged.add(key)
        return event


def _where(error: BaseException) -> str:
    """File and line that raised the error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else ""


def configure_logs(settings: Settings) -> None:
    """Configures structured logs to stderr: coloured lines for a terminal, or JSON."""
    level = getattr(logging, settings.log_level.upper())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _TracebackOnce(),
        structlog.processors.format_exc_info if settings.log_format == "json" else lambda _l, _m, e: e,
    ]
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if settings.log_format == "json"
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            # The default formatter prints local variables, which may include passwords.
            exception_formatter=structlog.dev.plain_traceback,
        )
    )
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    # Libraries log through the standard library: same format, same stream.
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_RateLimit())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(level, logging.WARNING))


class Worker:
    """Health, readiness and shutdown of a worker process."""

    def __init__(
        self, name: str, settings: Settings, dependencies: tuple[str, ...] = ("kafka", "redis")
    ) -> None:
        self.name = name
        self.settings = settings
        self.stopping = asyncio.Event()
        self.failed: str | None = None
        self.refused: ConfigError | None = None
        self.notes: dict[str, Callable[[], Mapping[str, Any]]] = {}
        """What `/readyz` says in addition, by name; what is empty is not shown. Changes no readiness."""
        self.activity: Callable[[], Activity] = Activity
        """Called for each heartbeat; the worker's `main` sets it."""
        self._started = time.time()
        self._missing: dict[str, str] = dict.fromkeys(dependencies, "not connected yet")

    def ready(self, dependency: str) -> None:
        """Marks a dependency as ready."""
        self._missing.pop(dependency, None)

    def not_ready(self, dependency: str, reason: str) -> None:
        """Marks a dependency as not ready; `/readyz` shows the reason."""
        self._missing[dependency] = reason

    def report(self, dependency: str, reason: str | None) -> None:
        """Calls `not_ready`, or `ready` where there is no reason."""
        if reason is None:
            self.ready(dependency)
        else:
            self.not_ready(dependency, reason)

    @property
    def missing(self) -> dict[str, str]:
        """Dependency → reason, for each that is not ready; empty if the worker is ready."""
        return dict(self._missing)

    @property
    def is_ready(self) -> bool:
        return not self._missing and not self.stopping.is_set()

    def routes(self) -> list[Route]:
        """The routes `/healthz`, `/readyz` and `/metrics`."""

        async def healthz(_: Request) -> Response:
            return JSONResponse({"status": "ok", "worker": self.name, "pid": os.getpid()})

        async def readyz(_: Request) -> Response:
            body = {"ready": self.is_ready, "worker": self.name, "missing": self.missing}
            body |= {name: note for name, make in self.notes.items() if (note := make())}
            return JSONResponse(body, status_code=200 if self.is_ready else 503)

        # Starlette treats a function as a request handler, and any other callable as an ASGI app.
        metrics = make_asgi_app().__call__  # type: ignore[operator]  # untyped
        return [
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/metrics", metrics, methods=["GET"], name="metrics"),
        ]

    @contextlib.asynccontextmanager
    async def serving(self, app: ASGIApp | None = None) -> AsyncIterator[int]:
        """Serves `app`, by default health and metrics only, while the body runs; yields the port.

        Writes heartbeats meanwhile, unless the worker has no Redis.

        Raises:
            ConfigError: the port is in use; nothing was started.
        """
        serves = serving(app or Starlette(routes=self.routes()), self.name, self.settings)
        async with serves as port, self._beating(port):
            yield port

    def _beating(self, port: int) -> contextlib.AbstractAsyncContextManager[None]:
        if self.settings.redis_url is None:
            log.warning("`cortex status` cannot see this worker: CORTEX_REDIS_URL is not set")
            return contextlib.nullcontext()
        machine, host = socket.gethostname(), self.settings.host
        # A worker that listens on all addresses is reached by the name of its machine.
        shown = machine if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
        name, release = f"{self.name}@{machine}:{port}", version("cortex-streams")

        def current() -> Heartbeat:
            return Heartbeat(
                name=name,
                kind=self.name,
                host=machine,
                pid=os.getpid(),
                url=f"http://{shown}:{port}",
                started=self._started,
                release=release,
                ready=self.is_ready,
                missing=self.missing,
                activity=self.activity(),
            )

        return beating(self.settings, name, current)

    async def drain(self) -> None:
        """Waits for `drain_s`, unless an error caused the shutdown; requests are still served meanwhile."""
        if self.failed is None and self.refused is None:
            await asyncio.sleep(self.settings.drain_s)

    def stop(self) -> None:
        """Requests shutdown, at which `/readyz` answers 503.

        Ends the process with code 1 if it still runs after `drain_s` and `shutdown_timeout_s`.
        """
        if self.stopping.is_set():
            return
        self.stopping.set()

        allowed_s = self.settings.drain_s + self.settings.shutdown_timeout_s

        def end() -> None:
            log.error("did not stop in time", worker=self.name, seconds=allowed_s)
            os._exit(1)

        timer = threading.Timer(allowed_s, end)
        timer.daemon = True
        timer.start()

    def fail(self, why: str) -> None:
        """Requests shutdown because of an error that a restart may fix; the exit code is 1."""
        self.failed = self.failed or why
        log.error("stopping after an error", worker=self.name, why=why)
        self.stop()

    def refuse(self, error: ConfigError) -> None:
        """Requests shutdown because of an error that a restart cannot fix; the exit code is 2."""
        if self.refused is None:
            self.refused = error
            log.error("invalid configuration", error=str(error))
            self.stop()


def config_error(error: BaseException) -> ConfigError | None:
    """The error itself or the one inside a task group's exception, if it is a `ConfigError`; else None."""
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(config_error, error.exceptions)), None)
    return error if isinstance(error, ConfigError) else None


def run_worker(
    name: str,
    settings: Settings,
    main: Callable[[Worker], Awaitable[None]],
    dependencies: tuple[str, ...] = ("kafka", "redis"),
) -> None:
    """Runs `main` until it returns, or until SIGINT or SIGTERM; then exits the process.

    Exit codes: 0 for success, 1 for an error, 2 for a `ConfigError`, which a restart cannot fix.
    """
    configure_logs(settings)

    async def body() -> int:
        worker = Worker(name, settings, dependencies)
        structlog.contextvars.bind_contextvars(worker=name)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, worker.stop)
        try:
            await main(worker)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            if refused := config_error(error):
                log.error("invalid configuration", error=str(refused))
                return 2
            log.exception("crashed", error=str(error))
            return 1
        return 2 if worker.refused else 1 if worker.failed else 0

    import uvloop  # noqa: PLC0415 - not needed by commands that only read settings

    async def run_and_exit() -> None:
        code = await body()
        log.info("stopped", worker=name, code=code)
        sys.stderr.flush()
        # Exit here, so that neither threads of libraries nor tasks that ignore cancellation keep the process
        # alive.
        os._exit(code)

    uvloop.run(run_and_exit())
