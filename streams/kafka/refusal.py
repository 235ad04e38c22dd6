"""A configuration error found by a background task, for the main task of the process to raise."""

from __future__ import annotations

import asyncio
from typing import NoReturn

from cortex_core.errors import ConfigError


class Refusal:
    """The first configuration error with which Kafka refused this process, if any."""

    def __init__(self) -> None:
        self.error: ConfigError | None = None
        self._set = asyncio.Event()

    def set(self, error: ConfigError) -> None:
        """Stores the error, unless there is one already."""
        self.error = self.error or error
        self._set.set()

    async def wait(self) -> NoReturn:
        """Waits for a refusal, if it ever happens.

        Raises:
            ConfigError: Kafka refused the configuration of this process.
        """
        await self._set.wait()
        assert self.error is not None
        raise self.error
