"""What every worker process has in common: logs, health over HTTP, signals, and a hard end.

    async def main(worker: Worker) -> None:
        async with worker.serving():            # /healthz, /readyz, /metrics answer from here on
            worker.ready("kafka")               # once it is connected; likewise "redis"
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
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import structlog
import uvicorn
from prometheus_client import make_asgi_app
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cortex_core.errors import ConfigError
from streams.settings import Settings

log = structlog.get_logger(__name__)


class _Rarely(logging.Filter):
    """Lets a library say one thing once in ten seconds; of a broker that is away they speak without end."""

    def __init__(self, every_s: float = 10.0) -> None:
        super().__init__()
        self._every_s = every_s
        self._said: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        key = (record.name, str(record.msg)[:200])
        if len(self._said) > 1_000:  # texts that were put together before logging
            self._said.clear()
        if record.created - self._said.get(key, 0.0) < self._every_s:
            return False
        self._said[key] = record.created
        return True


def configure_logs(settings: Settings) -> None:
    """Structured logs to stderr: coloured lines for a terminal, JSON where `log_format` is json."""
    level = getattr(logging, settings.log_level.upper())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info if settings.log_format == "json" else lambda _l, _m, e: e,
    ]
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if settings.log_format == "json"
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            # Not the default one, which prints local variables: a password may be among them.
            exception_formatter=structlog.dev.plain_traceback,
        )
    )
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    # Libraries log through the standard library; theirs go the same way.
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_Rarely())
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
    """One process's health, readiness and wish to stop."""

    def __init__(self, name: str, settings: Settings, needs: tuple[str, ...] = ("kafka", "redis")) -> None:
        self.name = name
        self.settings = settings
        self.stopping = asyncio.Event()
        self.failed: str | None = None
        self._missing: dict[str, str] = dict.fromkeys(needs, "not connected yet")

    def ready(self, need: str) -> None:
        """`need` answers."""
        self._missing.pop(need, None)

    def not_ready(self, need: str, why: str) -> None:
        """`need` does not answer; `/readyz` says no and why."""
        self._missing[need] = why

    @property
    def missing(self) -> dict[str, str]:
        """What is not ready, and why; empty when `/readyz` says yes."""
        return dict(self._missing)

    def routes(self) -> list[Route]:
        """`/healthz`, `/readyz`, `/metrics`, for a worker's own HTTP application."""

        async def healthz(_: Request) -> Response:
            return JSONResponse({"status": "ok", "worker": self.name, "pid": os.getpid()})

        async def readyz(_: Request) -> Response:
            ok = not self._missing and not self.stopping.is_set()
            body = {"ready": ok, "worker": self.name, "missing": self.missing}
            return JSONResponse(body, status_code=200 if ok else 503)

        # A function would be taken for a handler of requests; its `__call__` is taken for the ASGI app it is.
        metrics = make_asgi_app().__call__  # type: ignore[operator]
        return [
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/metrics", metrics, methods=["GET"], name="metrics"),
        ]

    @contextlib.asynccontextmanager
    async def serving(self, app: Any = None) -> AsyncIterator[int]:
        """Serves `app` (or health and metrics alone) while the body runs; yields the port.

        A port that is taken is an error at once (`OSError`), before anything else starts.
        """
        sock = socket.socket(socket.AF_INET6 if ":" in self.settings.host else socket.AF_INET)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((self.settings.host, self.settings.port))
        except OSError as error:
            sock.close()
            raise OSError(
                f"{self.name} cannot listen on {self.settings.host}:{self.settings.port}: {error.strerror}. "
                "Set CORTEX_PORT to a free port, or to 0 for any"
            ) from error
        port = int(sock.getsockname()[1])
        config = uvicorn.Config(
            app or Starlette(routes=self.routes()),
            log_config=None,
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=3,
        )
        server = uvicorn.Server(config)
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined,unused-ignore]
        task = asyncio.create_task(server._serve([sock]))  # `serve` would take over the signals
        try:
            while not server.started and not task.done():  # noqa: ASYNC110 - uvicorn has no event for it
                await asyncio.sleep(0.005)
            if task.done():
                task.result()
            log.info("listening", worker=self.name, address=f"http://{self.settings.host}:{port}")
            yield port
        finally:
            server.should_exit = True
            await asyncio.gather(task, return_exceptions=True)
            sock.close()

    def stop(self) -> None:
        """Asks the worker to finish its batch and leave; ends the process hard if it does not in time."""
        if self.stopping.is_set():
            return
        self.stopping.set()

        def end() -> None:
            log.error("did not stop in time", worker=self.name, seconds=self.settings.shutdown_timeout_s)
            os._exit(1)

        timer = threading.Timer(self.settings.shutdown_timeout_s, end)
        timer.daemon = True
        timer.start()

    def fail(self, why: str) -> None:
        """Something that this process cannot mend: it stops and exits 1; its offsets are read again."""
        self.failed = self.failed or why
        log.error("failing", worker=self.name, why=why)
        self.stop()


def config_error(error: BaseException) -> ConfigError | None:
    """The `ConfigError` that this is, or that a task group has wrapped; None for any other error."""
    if isinstance(error, BaseExceptionGroup):
        return next(filter(None, map(config_error, error.exceptions)), None)
    return error if isinstance(error, ConfigError) else None


def run_worker(
    name: str,
    settings: Settings,
    main: Callable[[Worker], Awaitable[None]],
    needs: tuple[str, ...] = ("kafka", "redis"),
) -> None:
    """Runs `main` until it returns or SIGINT/SIGTERM comes; exits the process.

    Exit codes: 0; 1 on failure; 2 where `ConfigError` says that starting it again would change nothing.
    """
    configure_logs(settings)

    async def body() -> int:
        worker = Worker(name, settings, needs)
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
                log.error("cannot run with these settings", error=str(refused))
                return 2
            log.exception("crashed", error=str(error))
            return 1
        return 1 if worker.failed else 0

    import uvloop  # noqa: PLC0415 - faster start of everything that only reads settings

    async def to_the_end() -> None:
        code = await body()
        log.info("stopped", worker=name, code=code)
        sys.stderr.flush()
        # Here and not after the loop: neither threads of torch or of a client nor a task that ignores its
        # cancellation may keep a finished worker alive.
        os._exit(code)

    uvloop.run(to_the_end())
