"""Redis servers of a test's own, with a configuration of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from redis import Redis

from streams.local.embedded import EmbeddedRedis

NOWHERE = ("127.0.0.1", 1)
"""An address at which nobody listens."""


class RedisServer(EmbeddedRedis):
    """An embedded Redis with more options, given as `--name value` on its command line."""

    def __init__(self, data: Path, *options: str) -> None:
        super().__init__(data)
        self.options = options

    def prepare(self, cancelled: threading.Event) -> list[str]:
        return [*super().prepare(cancelled), *self.options]

    async def answers(self) -> None:
        # One that wants a password answers nothing else before.
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.close()


@contextlib.contextmanager
def own_redis(folder: Path, *options: str) -> Iterator[str]:
    """URL of a Redis that no other test uses; ended afterwards."""
    server = RedisServer(folder, *options)
    asyncio.run(server.start())
    try:
        yield server.url
    finally:
        asyncio.run(server.stop())


def administer(url: str, *command: str | int) -> None:
    """Runs one command, with a connection of its own."""
    with Redis.from_url(url) as client:
        client.execute_command(*command)
