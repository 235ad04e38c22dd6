"""The HTTP server of every worker: uvicorn, with checks of each request's head, and bounds on the time in
which it arrives and on the number of connections.

It knows no endpoint but the probes. What a request may do is up to the app.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import re
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, cast

import h11
import structlog
import uvicorn
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from cortex_core.errors import ConfigError
from streams.settings import Settings

log = structlog.get_logger(__name__)

DISCARDED_BYTES = 64_000_000
"""Maximum bytes of a request of which the rest is read after it was answered. Most clients read an answer
when they have sent all, and see a reset instead if the connection is closed before."""
_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+]|[a-z0-9._-]+)(:\d{1,5})?")
PROBES = frozenset({"/healthz", "/readyz"})
"""Answered whatever the Host header says: they tell nothing that a page could use."""


def error_body(type_: str, message: str, fields: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The body of every error response."""
    return {"error": {"type": type_, "message": message, "fields": dict(fields or {})}}


@contextlib.asynccontextmanager
async def serving(app: ASGIApp, name: str, settings: Settings) -> AsyncIterator[int]:
    """Serves `app` while the body runs; yields the port.

    Args:
        name: of the worker, for messages.

    Raises:
        ConfigError: the address is in use or not one of this machine; nothing was started.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((settings.host, settings.port))
        sock.listen()  # a port that another process listens on can be bound, with SO_REUSEADDR
    except OSError as error:
        sock.close()
        raise ConfigError(
            f"{name} cannot listen on {settings.host}:{settings.port}: {error.strerror}. Set CORTEX_PORT to "
            "a free port, or to 0 for any free port, and CORTEX_HOST to an address of this machine"
        ) from error
    port = int(sock.getsockname()[1])
    server = _Server(_Config(HeadChecks(app, settings), settings))
    task = asyncio.create_task(server.serve([sock]))
    try:
        while not server.started and not task.done():  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.005)
        if task.done():
            task.result()
        log.info("listening", worker=name, address=f"http://{settings.host}:{port}")
        yield port
    finally:
        server.should_exit = True
        await asyncio.gather(task, return_exceptions=True)
        sock.close()


# --- who may ask --------------------------------------------------------------------------------------------


class HeadChecks:
    """Refuses requests of other sites' web pages, and requests that two servers would read differently.

    A page of another site can make a browser send requests to a service on loopback. Its Origin header shows
    it. If its own name points to 127.0.0.1 ("DNS rebinding"), page and service have the same origin, and the
    Host header shows it. An IP address as Host is always allowed: it is no name that could point elsewhere.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        allowed = settings.allowed_hosts.lower().replace(",", " ").split()
        own = (settings.host.lower(), socket.gethostname().lower(), "localhost")
        self._names = names = {*own, *allowed}
        self._suffixes = (".localhost", *(name[1:] for name in names if name.startswith("*.")))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def noting(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await (self._refusal(scope) or self._app)(scope, receive, noting)
        except asyncio.CancelledError:
            if has_begun:
                raise
            # The shutdown did not wait longer. Without an answer of ours, uvicorn's is 500: do not repeat it.
            message = "the worker stops; the event may or may not be stored: repeat it with the same ids"
            stopped = JSONResponse(error_body("stopping", message), 503, {"Retry-After": "1"})
            await stopped(scope, receive, send)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        if "transfer-encoding" in headers and "content-length" in headers:
            # RFC 9112, 6.3: a proxy that believes the other one sees two requests where we see one.
            error = error_body("ambiguous_length", "both Content-Length and Transfer-Encoding, expected one")
            return JSONResponse(error, 400, {"Connection": "close"})
        host = headers.get("host", "")
        if scope["path"] not in PROBES and not self._allows(host):
            message = f"Host is {host[:200]!r}, which CORTEX_ALLOWED_HOSTS does not allow"
            return JSONResponse(error_body("host_not_allowed", message), 400)
        origin = headers.get("origin")
        if origin is not None and origin.lower().partition("://")[2] != host.lower():
            message = f"Origin is {origin[:200]!r}: web pages of other sites may not use this service"
            return JSONResponse(error_body("origin_not_allowed", message), 403)
        return None

    def _allows(self, host: str) -> bool:
        found = _HOST.fullmatch(host.lower())
        if found is None:
            return False
        name = found["name"].strip("[]")
        with contextlib.suppress(ValueError):
            return bool(ipaddress.ip_address(name))
        return "*" in self._names or name in self._names or name.endswith(self._suffixes)


# --- how slowly, and over how many connections --------------------------------------------------------------


class _Config(uvicorn.Config):
    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        super().__init__(
            app,
            http=_Protocol,
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=3,
        )
        self.max_connections = settings.max_connections
        self.request_timeout_s = settings.request_timeout_s


class _Server(uvicorn.Server):
    """Leaves the signals to the worker."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Protocol(H11Protocol):
    """One connection. uvicorn itself waits for ever for a request that has begun, and accepts any number."""

    config: _Config

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._expiry: asyncio.TimerHandle | None = None
        self._lingers = False
        self._await_request()
        if len(self.connections) > self.config.max_connections:
            # Not the new one: clients that only hold connections must not keep out those that ask.
            others = (cast(_Protocol, c) for c in self.connections if c is not self)
            waiting = (c for c in others if not c._is_working())
            min(waiting, key=lambda c: c._waits_since, default=self).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._expiry is None:
            self._await_request()
        self._size += len(data)
        if self._size > DISCARDED_BYTES and self.cycle is not None and self.cycle.response_complete:
            self.transport.abort()
        if self._lingers:
            self._unset_keepalive_if_required()
            return
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):  # the request is complete
            self._stop_timer()

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None:
            self.cycle.transport = cast(asyncio.Transport, _ResponseTransport(self))

    def end_response(self) -> None:
        """Closes the connection, once the client has sent the rest of its request, which is discarded."""
        self._lingers = self.conn.their_state is h11.SEND_BODY
        if not self._lingers:
            self.transport.close()

    def on_response_complete(self) -> None:
        self._waits_since = self.loop.time()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, error_body("malformed_http", msg))

    def _is_working(self) -> bool:
        """Whether a request is complete, and its response not."""
        return self._expiry is None and self.cycle is not None and not self.cycle.response_complete

    def _await_request(self) -> None:
        self._waits_since = self.loop.time()
        self._size = 0
        """bytes of the request"""
        self._expiry = self.loop.call_later(self.config.request_timeout_s, self._expire)

    def _stop_timer(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    def _expire(self) -> None:
        message = f"the request was not complete after {self.config.request_timeout_s:g} s"
        self._refuse(408, error_body("request_timeout", message))

    def _refuse(self, status: int, body: Mapping[str, Any]) -> None:
        """Sends a response if none was begun, and closes the connection."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the app's answer, if it gives one, is for nobody
            self.cycle.message_event.set()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            content = json.dumps(body).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(content))),
                ("connection", "close"),
            ]
            head = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
            for event in (head, h11.Data(data=content), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class _ResponseTransport:
    """A connection's transport for the response to one request: closing it lets the client finish sending."""

    def __init__(self, protocol: _Protocol) -> None:
        self._protocol = protocol

    def __getattr__(self, name: str) -> Any:
        return getattr(self._protocol.transport, name)

    def close(self) -> None:
        self._protocol.end_response()
