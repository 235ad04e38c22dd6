"""The joiner: a Faust app whose consumer is our own.

    cortex joiner
    faust -A streams.joiner worker

Faust gives the agent, the services' lifecycle and its command line. It does not read Kafka: its consumer can
commit past a message that is still in flight. Batches reach the agent over an in-memory channel instead, and
the agent commits exactly what it has done (`streams.joining`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterable, Iterable
from typing import Any, cast

import faust
import structlog
from faust.app.base import BootStrategy
from mode import Service

from cortex_core.errors import ConfigError
from streams.joiner.consumer import Joining
from streams.settings import Settings
from streams.worker import Worker, configure_logs, run_worker

log = structlog.get_logger(__name__)


class JoiningService(Service):
    """Serves health, connects, and feeds the agent's channel."""

    def __init__(self, app: JoinerApp, worker: Worker, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._app = app
        self.worker = worker
        self.joining = Joining(app.cortex_settings, worker)
        self._open = contextlib.AsyncExitStack()

    async def on_start(self) -> None:
        await self._open.enter_async_context(self.worker.serving())
        # The app's own consumer would open the channel's gate; there is none.
        self._app.flow_control.resume()

    @Service.task
    async def _feed(self) -> None:
        try:
            await self.joining.start()
            while not self.worker.stopping.is_set():
                await self._app.batches.send(value=await self.joining.next_batch())
        except ConfigError as error:
            log.error("cannot run with these settings", error=str(error))
            self._app.exit_code = 2
            self.worker.stop()
        except Exception as error:
            log.exception("fetching ended", error=str(error))
            self.worker.fail(f"fetching ended: {type(error).__name__}: {error}")

    @Service.task
    async def _watch(self) -> None:
        await self.joining.watch()

    @Service.task
    async def _end(self) -> None:
        """A worker that failed, or whose `main` is not ours, ends the process by itself."""
        await self.worker.stopping.wait()
        if self._app.ends_process:
            await self.joining.stop()
            sys.stderr.flush()
            os._exit(self._app.exit_code or int(self.worker.failed is not None))

    async def on_stop(self) -> None:
        self.worker.stopping.set()
        await self.joining.stop()
        await self._open.aclose()


class JoinerBoot(BootStrategy):
    """Starts the agents and our service, and nothing that reads or writes Kafka for Faust."""

    enable_kafka = False
    enable_web = False

    def server(self) -> Iterable[Any]:
        return self._chain(self.sensors(), self.agents(), [cast(JoinerApp, self.app).service_of_joining])


class JoinerApp(faust.App):
    """The Faust app; `create_app` makes one."""

    BootStrategy = JoinerBoot
    cortex_settings: Settings
    service_of_joining: JoiningService
    batches: Any
    """The channel between the fetching service and the agent. One batch waits while another is handled."""
    ends_process = False
    """Whether `faust worker` runs it, so that nobody else turns a failure into an exit code."""
    exit_code = 0

    def _create_directories(self) -> None:
        """Faust keeps tables on disk; there are none."""


def create_app(settings: Settings, worker: Worker | None = None) -> JoinerApp:
    """The app; with `worker`, one that runs inside a process which somebody else starts and ends.

    Raises:
        ConfigError: an address is neither configured nor known from a running stack.
    """
    settings = settings.resolved()
    app = JoinerApp(
        settings.joiner_group,
        broker=f"kafka://{settings.kafka_address.replace(',', ';kafka://')}",
        web_enabled=False,
        topic_allow_declare=False,
        topic_disable_leader=True,
        autodiscover=False,
        monitor=None,
    )
    app.cortex_settings = settings
    app.ends_process = worker is None
    app.batches = app.channel(maxsize=1)
    app.service_of_joining = JoiningService(app, worker or Worker("joiner", settings))

    @app.agent(app.batches, name="joiner")
    async def join_batches(batches: AsyncIterable[Any]) -> None:
        joining, its_worker = app.service_of_joining.joining, app.service_of_joining.worker
        async for batch in batches:
            try:
                await joining.handle(batch)
            except asyncio.CancelledError:
                raise
            except Exception as error:
                # Its offsets are not committed: whoever starts next reads the batch again.
                log.exception("a batch failed", error=str(error))
                its_worker.fail(f"a batch failed: {type(error).__name__}: {error}")
                return

    return app


async def run(worker: Worker) -> None:
    """Runs the joiner until `worker.stopping`."""
    app = create_app(worker.settings, worker)
    await app.start()
    try:
        await worker.stopping.wait()
    finally:
        await app.stop()
    if app.exit_code:
        raise ConfigError("the joiner cannot run with these settings")


def main(settings: Settings) -> None:
    """Runs the joiner as this process."""
    run_worker("joiner", settings, run)


def __getattr__(name: str) -> Any:
    # `faust -A streams.joiner worker` looks for `app`; nobody else needs settings at import.
    if name == "app":
        settings = Settings.load()
        configure_logs(settings)
        globals()["app"] = created = create_app(settings)
        return created
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
