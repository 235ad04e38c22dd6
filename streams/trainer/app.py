"""The trainer's process: serves health and metrics at once, and imports torch meanwhile, which takes seconds.

Its work is in `streams.trainer.consumer`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from streams.settings import Settings
from streams.worker import Worker, run_worker

if TYPE_CHECKING:
    from streams.trainer.consumer import Trainer

DEPENDENCIES = ("kafka", "redis", "weights", "partitions")
"""What must be ready before `/readyz` answers 200."""


async def run(worker: Worker) -> None:
    """Runs one trainer until shutdown is requested."""

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
    """Runs the trainer process; does not return. Exits with code 0 after SIGTERM."""
    run_worker("trainer", settings.resolved(), run, dependencies=DEPENDENCIES)
