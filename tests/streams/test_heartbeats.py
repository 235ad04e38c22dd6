"""Heartbeats of a worker in this process; `tests/test_cli.py` has those of real workers."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
from redis.asyncio.client import Pipeline
from rich.console import Console

from streams.cli.status import table
from streams.connections import async_redis_client
from streams.heartbeats import Activity, ModelState, Seen, read_heartbeats
from streams.settings import Settings
from streams.testing import async_wait_for
from streams.testing.waiting import DEFAULT_TIMEOUT_S
from streams.worker import Worker
from tests.streams.redis_servers import RedisServer

pytestmark = pytest.mark.integration


async def heartbeats(settings: Settings) -> Sequence[Seen]:
    async with async_redis_client(settings) as client:
        return await read_heartbeats(client, settings.topic_prefix)


async def test_a_worker_reports_itself_until_it_stops(settings: Settings) -> None:
    worker = Worker("trainer", settings, ("kafka",))
    worker.activity = lambda: Activity(["t-0"], {"m": ModelState(7, pinned=6, paused=True)}, 1)
    async with worker.serving() as port:
        [seen] = await async_wait_for(lambda: heartbeats(settings), "its first heartbeat")
        first = seen.heartbeat
        assert (first.kind, first.url) == ("trainer", f"http://127.0.0.1:{port}")
        assert (first.ready, first.missing) == (False, {"kafka": "not connected yet"})
        assert first.activity == worker.activity()
        assert not seen.is_missing
        worker.ready("kafka")

        async def ready() -> bool:
            return [s.heartbeat.ready for s in await heartbeats(settings)] == [True]

        await async_wait_for(ready, "a heartbeat that says ready")
    assert await heartbeats(settings) == []


async def test_a_worker_without_a_redis_reports_nothing(settings: Settings) -> None:
    worker = Worker("inference", settings.model_copy(update={"redis_url": None}), ())
    async with worker.serving():
        assert await heartbeats(settings) == []


async def test_a_worker_works_on_while_redis_is_away(settings: Settings, tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    await server.start()
    own = Settings.load(**settings.model_dump() | {"redis_url": server.url})
    await server.stop()
    worker, attempts = Worker("joiner", own, ()), 0

    def activity() -> Activity:
        nonlocal attempts
        attempts += 1
        return Activity()

    worker.activity = activity
    async with asyncio.timeout(DEFAULT_TIMEOUT_S), httpx.AsyncClient() as http:
        async with worker.serving() as port:
            await async_wait_for(lambda: attempts >= 2, "two attempts")
            assert (await http.get(f"http://127.0.0.1:{port}/readyz")).status_code == 200
            await server.start()
            await async_wait_for(lambda: heartbeats(own), "a heartbeat")
            await server.stop()
        async with worker.serving():  # it stops while Redis is away, too
            pass


async def test_a_worker_stops_although_its_client_swallows_the_cancellation(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    swallowed = 0
    waiting = asyncio.Event()

    async def execute(_: Pipeline) -> list[object]:
        nonlocal swallowed
        waiting.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            swallowed += 1
        return []

    monkeypatch.setattr(Pipeline, "execute", execute)
    async with asyncio.timeout(DEFAULT_TIMEOUT_S), Worker("joiner", settings, ()).serving():
        await waiting.wait()
    assert swallowed == 1


def test_what_events_have_in_their_ids_does_nothing_to_the_terminal() -> None:
    out = io.StringIO()
    table("Weights", ["model"], [["[/]"], ["[bold]x"], ["\x1b[2J\x00"]], Console(file=out, width=80))
    assert "[/]" in out.getvalue()
    assert "[bold]x" in out.getvalue()
    assert "\x1b" not in out.getvalue()
    assert "\x00" not in out.getvalue()
