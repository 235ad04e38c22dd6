"""The trainer's process: health answers at once; torch, which takes seconds to load, loads beside it.

What it does is in `streams.training`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from streams.settings import Settings
from streams.worker import Worker, run_worker

if TYPE_CHECKING:
    from streams.trainer.consumer import Trainer

DEPENDENCIES = ("kafka", "redis", "weights", "partitions")
"""What `/readyz` waits for."""


async def run(worker: Worker) -> None:
    """One trainer, until the worker is told to stop."""

    def load() -> type[Trainer]:
        from streams.trainer.consumer import Trainer  # noqa: PLC0415 - loads torch

        return Trainer

    async with worker.serving():
        loading = asyncio.ensure_future(asyncio.to_thread(load))
        stopping = asyncio.create_task(worker.stopping.wait())
        await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not worker.stopping.is_set():
            await loading.result()(worker).run()


def main(settings: Settings) -> None:
    """The trainer process; returns never, exits with 0 after SIGTERM."""
    run_worker("trainer", settings.resolved(), run, dependencies=DEPENDENCIES)
