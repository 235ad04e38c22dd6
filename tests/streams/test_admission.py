"""Rate limits and back-pressure: what is refused, what the client makes of it, and what is remembered."""

from __future__ import annotations

import asyncio
import contextlib

import httpx
import psutil
import pytest

from cortex_core.errors import UnavailableError
from streams.api_keys import create_key
from streams.client.client import CortexClient
from streams.inference.admission import RateLimiter
from streams.settings import Settings
from streams.testing import async_wait_for, spawn_worker, wait_for
from tests.streams.serving import JSON, body, listening, raw, scripted


def test_a_caller_has_one_second_of_tokens_and_gets_them_back_in_time() -> None:
    limiter = RateLimiter(per_s=2.0)
    assert [limiter.wait_s("a", 10.0) for _ in range(3)] == [0.0, 0.0, 0.5]
    assert limiter.wait_s("b", 10.0) == 0.0
    assert limiter.wait_s("a", 10.25) == pytest.approx(0.25)
    assert [limiter.wait_s("a", 10.5), limiter.wait_s("a", 10.5)] == [0.0, 0.5]
    assert [limiter.wait_s("a", 99.0) for _ in range(3)] == [0.0, 0.0, 0.5]
    slow = RateLimiter(per_s=0.1)
    assert [slow.wait_s("a", 0.0), slow.wait_s("a", 0.0)] == [0.0, 10.0]


def test_the_number_of_callers_remembered_is_bounded() -> None:
    limiter = RateLimiter(per_s=1.0, capacity=10)
    for n in range(1_000):
        assert limiter.wait_s(f"caller {n}", 0.0) == 0.0
    assert len(limiter._buckets) == 10
    assert limiter.wait_s("caller 999", 0.0) > 0.0


@pytest.mark.integration
async def test_each_key_has_its_own_rate(settings: Settings) -> None:
    keys = [create_key(name, ["decide", "operate"]) for name in ("one", "two")]
    entries = ",".join(entry.entry for _, entry in keys)
    limited = Settings.load(
        **settings.model_dump(exclude_unset=True) | {"api_keys": entries, "rate_limit": 0.001}
    )
    async with listening(limited) as url, httpx.AsyncClient(base_url=url) as http:
        for secret, entry in keys:
            headers = {"Authorization": f"Bearer {secret}"}
            assert (await http.get("/v1/models", headers=headers)).status_code == 200
            refused = await http.post("/v1/decide", json=body(), headers=headers)
            assert refused.status_code == 429
            assert 990 < int(refused.headers["retry-after"]) <= 1000
            assert refused.json()["error"]["type"] == "rate_limited"
            assert entry.name in refused.json()["error"]["message"]
        assert (await http.get("/v1/models")).status_code == 401
        assert (await http.get("/readyz")).status_code == 200


@pytest.mark.integration
async def test_beyond_its_capacity_the_service_says_when_to_retry(settings: Settings) -> None:
    content = raw()
    head = (
        "POST /v1/decide HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    )
    async with (
        listening(settings.model_copy(update={"max_requests": 2})) as url,
        httpx.AsyncClient(base_url=url) as http,
        CortexClient(url) as cortex,
    ):
        assert (await http.post("/v1/decide", json=body())).status_code == 200
        held = [await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2])) for _ in range(2)]
        for _, writer in held:
            writer.write(head.encode() + content[:-1])

        async def is_full() -> bool:
            answer = await http.get("/v1/models")
            return answer.status_code == 503

        await async_wait_for(is_full, "both to be in work")
        refused = await http.post("/v1/decide", json=body())
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "CORTEX_MAX_REQUESTS" in refused.json()["error"]["message"]
        assert (await http.get("/readyz")).status_code == 200

        waiting = asyncio.create_task(cortex.decide("hello", conversation_id="c"))
        for reader, writer in held:
            writer.write(content[-1:])
            assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
            writer.close()
            await writer.wait_closed()
        assert (await waiting).weights_version == 0


@pytest.mark.integration
async def test_bodies_of_unknown_length_count_as_the_largest(settings: Settings) -> None:
    small = settings.model_copy(update={"max_body_bytes": 20_000})
    head = (
        b"POST /v1/decide HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    async with listening(small) as url, httpx.AsyncClient(base_url=url) as http:
        held = [await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2])) for _ in range(16)]
        for _, writer in held:
            writer.write(head)

        async def status(size: int) -> int:
            content = raw() + b" " * size
            return (await http.post("/v1/decide", content=content, headers=JSON)).status_code

        async def is_full() -> bool:
            return await status(0) == 503

        await async_wait_for(is_full, "16 bodies to be in work")
        # What is refused without being read needs no room.
        assert await status(30_000) == 413
        assert (await http.get("/v1/models")).status_code == 200
        for _, writer in held:
            writer.transport.abort()

        async def has_room() -> bool:
            return await status(0) == 200

        await async_wait_for(has_room, "room again")


@pytest.mark.integration
def test_memory_stays_flat_however_many_send_large_bodies(settings: Settings) -> None:
    """150 requests of 3.9 MB, each but for its last byte."""
    worker = spawn_worker("inference", settings).wait_ready()
    process = psutil.Process(worker.pid)
    before = process.memory_info().rss
    size = 3_900_000
    head = (
        "POST /v1/decide HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {size}\r\n\r\n"
    ).encode()
    part = b" " * (size - 1)

    async def flood() -> None:
        async def one() -> None:
            _, writer = await asyncio.open_connection("127.0.0.1", worker.port)
            writers.append(writer)
            writer.write(head + part)
            await writer.drain()

        writers: list[asyncio.StreamWriter] = []
        await asyncio.gather(*(one() for _ in range(150)))
        assert process.memory_info().rss - before < 250_000_000
        async with httpx.AsyncClient() as http:
            answer = await http.post(f"{worker.url}/v1/decide", content=raw() + b" " * size, headers=JSON)
        assert answer.status_code == 503
        assert answer.json()["error"]["type"] == "overloaded"
        for writer in writers:
            writer.transport.abort()

    asyncio.run(flood())

    def works_again() -> bool:
        answer = httpx.post(f"{worker.url}/v1/decide", json=body(), verify=False)
        return answer.status_code == 200

    wait_for(works_again, "the worker to have room again")


# --- the client ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 503])
async def test_a_pause_longer_than_the_timeout_ends_the_call(status: int) -> None:
    async with (
        scripted(status, retry_after="3600") as (url, bodies),
        CortexClient(url, timeout_s=5.0) as cortex,
    ):
        with pytest.raises(UnavailableError, match=f"said {status}"):
            await cortex.decide("hello", conversation_id="c")
        # Nor does another call disturb the service before.
        with pytest.raises(UnavailableError, match="asked for a pause"):
            await cortex.decide("hello", conversation_id="c")
    assert len(bodies) == 1


@pytest.mark.parametrize("retry_after", ["1", "Wed, 21 Oct 2015 07:28:00 GMT", "soon", "-1", ""])
async def test_a_short_pause_or_an_odd_one_is_followed_by_another_attempt(retry_after: str) -> None:
    async with scripted(429, 200, retry_after=retry_after) as (url, bodies), CortexClient(url) as cortex:
        assert (await cortex.decide("hello", conversation_id="c")).weights_version == 3
    assert len(bodies) == 2


async def test_while_one_service_asks_for_a_pause_another_is_used() -> None:
    async with (
        scripted(503, retry_after="3600") as (busy, at_busy),
        scripted(502, 200) as (good, at_good),
        CortexClient([busy, good]) as cortex,
    ):
        for turn in range(10):
            await cortex.decide("hello", conversation_id=f"c-{turn}")
    assert len(at_busy) == 1
    assert len(at_good) == 11


async def test_a_date_far_away_is_a_pause_too() -> None:
    async with (
        scripted(503, retry_after="Fri, 31 Dec 2100 23:59:59 GMT") as (url, bodies),
        CortexClient(url, timeout_s=5.0) as cortex,
    ):
        with contextlib.suppress(UnavailableError):
            await cortex.decide("hello", conversation_id="c")
    assert len(bodies) == 1
