"""Redis servers for a single test, with their own configuration."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from redis import Redis

from streams.local.embedded import EmbeddedRedis

NOWHERE = ("127.0.0.1", 1)
"""An address without a listener."""


class RedisServer(EmbeddedRedis):
    """An embedded Redis with additional command-line options `--name value`."""

    def __init__(self, data: Path, *options: str) -> None:
        super().__init__(data)
        self.options = options

    def prepare(self, cancelled: threading.Event) -> list[str]:
        return [*super().prepare(cancelled), *self.options]

    async def answers(self) -> None:
        # A server with a password refuses any command before it.
        _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.close()


@contextlib.contextmanager
def own_redis(folder: Path, *options: str) -> Iterator[str]:
    """URL of a Redis that no other test uses; stopped at the end."""
    server = RedisServer(folder, *options)
    asyncio.run(server.start())
    try:
        yield server.url
    finally:
        asyncio.run(server.stop())


def administer(url: str, *command: str | int) -> None:
    """Runs one command on a new connection."""
    with Redis.from_url(url) as client:
        client.execute_command(*command)
