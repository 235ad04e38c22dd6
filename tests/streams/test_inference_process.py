"""The inference worker from outside: servers that are away, signals, sockets, swaps under load."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter

import httpx
import pytest

from cortex_core.model import CortexModel
from streams.local.embedded import EmbeddedKafka, free_port
from streams.settings import Settings, default_cache_dir
from streams.testing import async_wait_for, spawn_worker
from streams.testing.waiting import DEFAULT_TIMEOUT_S
from streams.weights.architecture import model_config
from tests.streams.serving import (
    body,
    decided_by,
    interactions,
    listening,
    publish_versions,
    replies,
    version,
)


class Load:
    """Agents that decide and reply as fast as they are answered, and keep what was acknowledged."""

    def __init__(self, url: str, agents: int = 6) -> None:
        self.acknowledged: dict[str, int] = {}
        """interaction id → weights version"""
        self.replies: list[str] = []
        self.statuses: Counter[int] = Counter()
        self.broken: list[str] = []
        """connections that were refused or cut"""
        self._stop = asyncio.Event()
        self._http = httpx.AsyncClient(base_url=url, timeout=DEFAULT_TIMEOUT_S)
        self._tasks = [asyncio.create_task(self._agent(n)) for n in range(agents)]

    async def __aenter__(self) -> Load:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.finish()
        await self._http.aclose()

    async def finish(self) -> None:
        """Returns when every agent has its last answer, or was cut off."""
        self._stop.set()
        await asyncio.gather(*self._tasks)

    async def _agent(self, number: int) -> None:
        turn = 0
        while not self._stop.is_set():
            turn += 1
            conversation = f"agent-{number}"
            try:
                decided = await self._http.post(
                    "/v1/decide", json=body(conversation_id=conversation, message=f"question {turn}")
                )
                self.statuses[decided.status_code] += 1
                if decided.status_code != 200:
                    continue
                answer = decided.json()
                self.acknowledged[answer["interaction_id"]] = answer["weights_version"]
                replied = await self._http.post(
                    "/v1/replies", json={"conversation_id": conversation, "text": f"thanks {turn}"}
                )
                self.statuses[replied.status_code] += 1
                if replied.status_code == 202:
                    self.replies.append(replied.json()["reply_id"])
            except httpx.TransportError as error:
                self.broken.append(f"{type(error).__name__}: {error}")
                return


@pytest.mark.integration
async def test_swaps_and_sigterm_under_load(settings: Settings) -> None:
    """Thirty versions without a failed request, then SIGTERM without losing anything acknowledged."""
    worker = spawn_worker("inference", settings, shutdown_timeout_s=30).wait_ready()
    async with Load(worker.url, agents=8) as load:
        await async_wait_for(lambda: len(load.acknowledged) > 20, "decisions before the first version")
        await publish_versions(settings, *(version(settings, n) for n in range(1, 31)))
        await async_wait_for(lambda: 30 in load.acknowledged.values(), "decisions by version 30")
        assert not load.broken
        assert set(load.statuses) == {200, 202}
        assert "cortex_weights_refused_total" in worker.get("/metrics").text

        worker.signal(signal.SIGTERM)
        await async_wait_for(lambda: not worker.alive, "the worker to end")
        await load.finish()
    assert worker.returncode == 0, worker.log_text()
    assert set(load.statuses) <= {200, 202, 503}

    events = await interactions(settings)
    logged = {e.interaction_id: e.weights_version for e in events}
    assert len(events) == len(logged)
    assert load.acknowledged.items() <= logged.items()
    assert set(load.replies) <= {e.reply_id for e in await replies(settings)}
    assert len(set(load.acknowledged.values())) > 2
    models = {0: CortexModel.create(model_config(settings), "default")}
    models |= {n: version(settings, n).to_model() for n in range(1, 31)}
    few = {e.weights_version: e for e in events}.values()  # of each version the last one
    for event in few:
        assert decided_by(event, models[event.weights_version]), (
            "the version named is not the one that decided"
        )
    for conversation in {e.conversation_id for e in events}:
        seen = [e.weights_version for e in events if e.conversation_id == conversation]
        assert seen == sorted(seen)


@pytest.mark.integration
async def test_it_is_unready_for_a_while_before_it_refuses_connections(settings: Settings) -> None:
    worker = spawn_worker("inference", settings, drain_s=10, shutdown_timeout_s=30).wait_ready()
    url = worker.url
    async with Load(url, agents=4) as load, httpx.AsyncClient(timeout=DEFAULT_TIMEOUT_S) as http:

        async def unready() -> bool:
            # On a new connection, as a load balancer asks.
            return (await http.get(f"{url}/readyz", headers={"connection": "close"})).status_code == 503

        await async_wait_for(lambda: len(load.acknowledged) > 10, "decisions")
        worker.signal(signal.SIGTERM)
        await async_wait_for(unready, "the worker to say so")
        before = len(load.acknowledged)
        await async_wait_for(lambda: len(load.acknowledged) > before + 10, "decisions while it is unready")
        await load.finish()  # as the load balancer has seen that the worker is unready
        assert await unready()
        assert worker.alive
    assert load.broken == []
    assert set(load.statuses) == {200, 202}
    await async_wait_for(lambda: not worker.alive, "the worker to end")
    assert worker.returncode == 0, worker.log_text()
    assert load.acknowledged.keys() <= {e.interaction_id for e in await interactions(settings)}


@pytest.mark.integration
async def test_alone_against_nothing_it_says_which_address(settings: Settings) -> None:
    address = f"127.0.0.1:{free_port()}"
    worker = spawn_worker("inference", settings, kafka=address, shutdown_timeout_s=30)
    async with httpx.AsyncClient(base_url=worker.url) as http:
        await async_wait_for(lambda: _missing(http, address), "/readyz to name the address")
        assert (await http.get("/healthz")).status_code == 200
        assert (await http.get("/readyz")).status_code == 503
        answer = await http.post("/v1/decide", json=body())
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert address in answer.json()["error"]["message"]
        assert (await http.get("/metrics")).status_code == 200
    assert worker.stop(40) == 0, worker.log_text()


async def _missing(http: httpx.AsyncClient, said: str) -> bool:
    return said in str((await http.get("/readyz")).json()["missing"])


@pytest.mark.integration
async def test_kafka_that_dies_and_comes_back(settings: Settings) -> None:
    """503 in time, unready, then all right again by itself; every id once, however often it was sent."""
    broker = EmbeddedKafka(settings.data, default_cache_dir())
    await broker.start()
    own = settings.model_copy(update={"kafka": broker.address})
    try:
        worker = spawn_worker("inference", own, publish_timeout_s=1, shutdown_timeout_s=30).wait_ready()
        async with httpx.AsyncClient(base_url=worker.url, timeout=DEFAULT_TIMEOUT_S) as http:
            first = await http.post("/v1/decide", json=body(interaction_id="before"))
            assert first.status_code == 200
            assert broker.child is not None
            broker.child.kill()

            late = await http.post("/v1/decide", json=body(interaction_id="meanwhile"))
            assert late.status_code == 503
            assert broker.address in late.json()["error"]["message"]
            assert await _missing(http, broker.address)
            refused = await http.post("/v1/decide", json=body(interaction_id="refused"))
            assert refused.status_code == 503

            await broker.start()
            await async_wait_for(lambda: _ready(http), "the worker to be ready again")
            for id_ in ("before", "meanwhile", "refused", "after"):
                again = await http.post("/v1/decide", json=body(interaction_id=id_))
                assert again.status_code == 200, again.text
            assert again.json()["weights_version"] == 0
            logged = Counter(e.interaction_id for e in await interactions(own))
            assert logged == dict.fromkeys(("before", "meanwhile", "refused", "after"), 1)

            # Nobody asks for anything, and yet it notices.
            broker.child.kill()
            await async_wait_for(lambda: _missing(http, broker.address), "the worker to notice")
            await broker.start()
            await async_wait_for(lambda: _ready(http), "the worker to be ready again")

            # With an event that nobody will acknowledge any more, SIGTERM ends it in time all the same.
            broker.child.kill()
            assert (await http.post("/v1/decide", json=body(interaction_id="lost"))).status_code == 503
        assert worker.stop(40) == 0, worker.log_text()
    finally:
        await broker.stop()


async def _ready(http: httpx.AsyncClient) -> bool:
    return (await http.get("/readyz")).status_code == 200


@pytest.mark.integration
async def test_a_body_too_large_is_refused_before_it_is_read(settings: Settings) -> None:
    head = (
        "POST /v1/decide HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {10**9}\r\n\r\n"
    )
    async with listening(settings) as url:
        port = int(url.rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode())  # and not one byte of the body
        answer = await reader.read()  # until the service closes
        writer.close()
        assert answer.startswith(b"HTTP/1.1 413")
        assert b"1000000000 bytes" in answer

        # A client that gives up in the middle costs nothing.
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.replace(str(10**9), "100").encode() + b'{"conver')
        await writer.drain()
        writer.transport.abort()
        async with httpx.AsyncClient(base_url=url) as http:
            assert (await http.post("/v1/decide", json=body())).status_code == 200
