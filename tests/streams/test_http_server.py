"""The HTTP server of the workers, at the level of bytes: requests that come slowly, twice, or never end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from starlette.types import Message

from streams.http_server import HeadChecks
from streams.local.embedded import free_port
from streams.settings import Settings
from streams.testing import async_wait_for, spawn_worker, wait_for
from streams.worker import Worker
from tests.streams.serving import body, exchange, listening, raw

GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
POST = b"POST /v1/decide HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@contextlib.asynccontextmanager
async def health(folder: Path, **settings: float) -> AsyncIterator[str]:
    """A worker that serves health checks and metrics only."""
    async with Worker("trainer", Settings.load(data=folder, port=0, **settings)).serving() as port:
        yield f"http://127.0.0.1:{port}"


# --- slowly -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "begun",
    [b"", b"G", GET, GET + b"X: " + b"y" * 1_000, GET + b"Transfer-Encoding: chunked\r\n\r\n"],
    ids=["nothing", "a letter", "a line", "half a header", "a body"],
)
async def test_a_request_that_does_not_end_is_cut_off(tmp_path: Path, begun: bytes) -> None:
    async with health(tmp_path, request_timeout_s=0.2) as url:
        answer = await exchange(url, begun)  # until the server closes
        if b"\r\n\r\n" not in begun:
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b'"type": "request_timeout"' in answer


async def test_a_request_that_comes_byte_by_byte_is_cut_off(tmp_path: Path) -> None:
    """Each byte comes in time. So does each byte of a body that nobody reads, after the answer."""
    async with health(tmp_path, request_timeout_s=0.5) as url:
        for begun in (GET, GET + b"Content-Length: 1000000\r\n\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
            writer.write(begun)
            reading = asyncio.create_task(reader.read())

            async def drip(
                writer: asyncio.StreamWriter = writer, reading: asyncio.Task[bytes] = reading
            ) -> bool:
                writer.write(b"x")
                return reading.done()

            await async_wait_for(drip, "the server to close")
            with contextlib.suppress(ConnectionError):
                assert (await reading).startswith((b"HTTP/1.1 408 ", b"HTTP/1.1 200 "))
            writer.transport.abort()


@pytest.mark.integration
async def test_a_body_that_does_not_come_is_cut_off_and_is_no_error_of_the_service(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    content = raw()
    head = POST + f"Content-Length: {len(content)}\r\n\r\n".encode()
    async with (
        listening(settings.model_copy(update={"request_timeout_s": 0.3})) as url,
        httpx.AsyncClient(base_url=url) as http,
    ):
        cut = await exchange(url, head + content[:10])
        assert cut.startswith(b"HTTP/1.1 408 ")
        whole = await exchange(url, head, content[:10], content[10:])  # then nothing: an idle connection
        assert whole.startswith(b"HTTP/1.1 200 ")
        _, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(head + content[:10])
        await writer.drain()
        writer.transport.abort()
        assert (await http.post("/v1/decide", json=body())).status_code == 200
        counted = (await http.get("/metrics")).text
    assert 'status="500"' not in counted
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


# --- many ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [b"", GET], ids=["idle", "half-sent"])
async def test_connections_that_only_wait_make_room_for_those_that_ask(tmp_path: Path, begun: bytes) -> None:
    async with health(tmp_path, max_connections=10) as url:
        port = int(url.rpartition(":")[2])
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(10)]
        for _, writer in held:
            writer.write(begun)
        for _ in range(5):
            async with httpx.AsyncClient() as http:
                assert (await http.get(f"{url}/healthz")).status_code == 200
        closed = 0
        for reader, writer in held:
            with contextlib.suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(0.05):
                    await reader.read()
                closed += 1
            writer.transport.abort()
        assert closed <= 5, "more were closed than asked"
        many = [await asyncio.open_connection("127.0.0.1", port) for _ in range(50)]

        def open_at_the_server() -> bool:
            connections = psutil.Process().net_connections("tcp")
            established = [c for c in connections if c.laddr.port == port and c.status == "ESTABLISHED"]
            return len(established) <= 10

        await async_wait_for(open_at_the_server, "no more than ten connections")
        for _, writer in many:
            writer.transport.abort()


# --- ambiguous or malformed ---------------------------------------------------------------------------------


@pytest.mark.integration
async def test_a_request_with_two_lengths_is_refused(settings: Settings) -> None:
    content = raw()
    chunked = f"{len(content):x}\r\n".encode() + content + b"\r\n0\r\n\r\n"
    both = f"Content-Length: {len(chunked)}\r\nTransfer-Encoding: chunked\r\n"
    async with listening(settings) as url:
        for lengths in (both, "\r\n".join(reversed(both.split("\r\n")[:2])) + "\r\n"):
            answer = await exchange(url, POST + lengths.encode() + b"\r\n" + chunked + GET + b"\r\n")
            assert answer.startswith(b"HTTP/1.1 400 ")
            assert answer.count(b"HTTP/1.1") == 1
            assert b'"type":"ambiguous_length"' in answer
        only = POST + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + chunked
        assert (await exchange(url, only)).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        GET + b"Host: evil.example\r\n\r\n",
        GET + b"X: " + b"y" * 100_000,
        GET + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
        GET + b"Content-Length: -1\r\n\r\n",
    ],
    ids=["TLS", "no host", "two hosts", "a long header", "a bad chunk", "a negative length"],
)
async def test_what_is_no_http_is_refused_in_the_usual_form(
    tmp_path: Path, request_bytes: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with health(tmp_path) as url:
        with contextlib.suppress(ConnectionResetError):  # more is on its way than is read
            answer = await exchange(url, request_bytes)
            assert b'{"error": {"type": "malformed_http"' in answer or b"HTTP/1.1 200" in answer
        async with httpx.AsyncClient() as http:
            assert (await http.get(f"{url}/healthz")).status_code == 200
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


# --- the port -----------------------------------------------------------------------------------------------


@pytest.fixture
def occupied() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.integration
@pytest.mark.parametrize("name", ["joiner", "trainer", "inference"])
def test_a_port_in_use_ends_a_worker_with_what_to_do(settings: Settings, occupied: int, name: str) -> None:
    worker = spawn_worker(name, settings, CORTEX_PORT=occupied)
    wait_for(lambda: not worker.alive, f"the {name} to end")
    log = worker.log_text()
    assert worker.returncode == 2, log
    assert f"cannot listen on 127.0.0.1:{occupied}: Address already in use" in log
    assert "CORTEX_PORT" in log
    assert "Traceback" not in log


async def test_an_address_of_another_machine_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    for host in ("192.0.2.1", "no such host"):
        settings = Settings.load(data=tmp_path, host=host, port=free_port())
        with pytest.raises(ValueError, match="CORTEX_HOST"):
            async with Worker("trainer", settings).serving():
                pass


async def test_a_request_that_the_shutdown_cuts_off_can_be_repeated() -> None:
    began = asyncio.Event()
    sent: list[Message] = []

    async def hangs(*_: object) -> None:
        began.set()
        await asyncio.Event().wait()

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request"}

    scope = {"type": "http", "method": "POST", "path": "/v1/decide", "headers": [(b"host", b"localhost")]}
    request = asyncio.create_task(HeadChecks(hangs, Settings.load())(scope, receive, send))
    await began.wait()
    request.cancel()
    await request
    assert sent[0]["status"] == 503
    assert (b"retry-after", b"1") in sent[0]["headers"]
