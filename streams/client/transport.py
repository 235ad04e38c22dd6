"""Transports of the client: HTTP with failover, or in-process.

Both retry until the call is acknowledged. Retries are idempotent, because they carry the same ids.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Protocol, TypeVar

import httpx
from pydantic import ValidationError

from cortex_core.errors import ConfigError, CortexError, UnavailableError
from streams.backoff import delays
from streams.inference.api import (
    ConflictError,
    DecideRequest,
    DecideResponse,
    ErrorResponse,
    ReplyRequest,
    ReplyResponse,
    RequestError,
)
from streams.settings import Settings

if TYPE_CHECKING:
    from streams.inference.service import Service

T = TypeVar("T")
RETRYABLE = frozenset({429, 502, 503, 504})
"""Status codes after which the request is retried, with another service or later."""
DOWN_S = 2.0
"""Seconds for which a failed service has the lowest priority."""


class Transport(Protocol):
    """Sends requests to a service and returns its answers."""

    async def start(self) -> None: ...
    async def decide(self, request: DecideRequest) -> DecideResponse: ...
    async def reply(self, request: ReplyRequest) -> ReplyResponse: ...
    async def close(self) -> None: ...


class Busy(UnavailableError):
    """A service asked for a pause (Retry-After)."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


async def _retried(timeout_s: float, attempt: Callable[[float], Awaitable[T]]) -> T:
    """Calls `attempt(remaining seconds)` until it succeeds, with backoff and the pauses that are asked for.

    Raises:
        UnavailableError: the last error, once no further attempt can begin within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    for delay_s in delays():
        try:
            return await attempt(max(0.1, deadline - time.monotonic()))
        except UnavailableError as error:
            pause_s = max(delay_s, error.retry_after_s if isinstance(error, Busy) else 0.0)
            if time.monotonic() + pause_s > deadline:
                raise UnavailableError(f"{error} (given up: the timeout is {timeout_s:g} s)") from error
            await asyncio.sleep(pause_s)
    raise AssertionError("delays never end")


class Http:
    """Sends requests to inference services, with failover within a call."""

    def __init__(
        self, urls: Sequence[str], timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> None:
        self._urls = list(urls)
        self._timeout_s = timeout_s
        self._down: dict[str, float] = {}
        self._busy: dict[str, float] = {}
        """url → time until which the service asked to be left alone"""
        limits = httpx.Limits(max_connections=None, keepalive_expiry=30.0)
        self._http = httpx.AsyncClient(headers=headers, limits=limits)

    async def start(self) -> None:
        """Does nothing: connections are opened on demand."""

    async def close(self) -> None:
        await self._http.aclose()

    async def decide(self, request: DecideRequest) -> DecideResponse:
        # With an embedding, the service does not read the text.
        slim = [
            m.model_copy(update={"text": None}) if m.embedding is not None else m for m in request.memories
        ]
        body = request.model_copy(update={"memories": slim}).model_dump_json(exclude_none=True)
        return DecideResponse.model_validate_json(
            await self._post("/v1/decide", body, request.conversation_id)
        )

    async def reply(self, request: ReplyRequest) -> ReplyResponse:
        body = request.model_dump_json(exclude_none=True)
        return ReplyResponse.model_validate_json(
            await self._post("/v1/replies", body, request.conversation_id)
        )

    async def _post(self, path: str, body: str, conversation_id: str) -> bytes:
        async def try_all(remaining_s: float) -> bytes:
            failures, pauses_s = [], []
            # With several services, one that hangs may not use all of the time.
            share_s = remaining_s if len(self._urls) == 1 else remaining_s / 2
            for url in self._in_order(conversation_id):
                pause_s = self._busy.get(url, 0.0) - time.monotonic()
                if pause_s > 0:
                    failures.append(f"{url} asked for a pause")
                    pauses_s.append(pause_s)
                    continue
                try:
                    answer = await self._http.post(
                        url + path,
                        content=body,
                        headers={"Content-Type": "application/json"},
                        timeout=httpx.Timeout(share_s, connect=min(2.0, share_s)),
                    )
                except httpx.TransportError as error:
                    failures.append(f"{url} does not answer ({type(error).__name__}: {error})")
                    pauses_s.append(0.0)
                else:
                    if answer.status_code < 400:
                        self._down.pop(url, None)
                        return answer.content
                    why = _reason(answer)
                    if answer.status_code not in RETRYABLE:
                        raise why
                    failures.append(f"{url}: {why}")
                    pauses_s.append(_retry_after_s(answer))
                now = time.monotonic()
                self._down[url] = now + DOWN_S
                self._busy[url] = now + pauses_s[-1]
            raise Busy("; ".join(failures), min(pauses_s))

        return await _retried(self._timeout_s, try_all)

    def _in_order(self, conversation_id: str) -> list[str]:
        """The services, failed ones last; each conversation prefers the same one (rendezvous hashing)."""
        now = time.monotonic()

        def rank(url: str) -> tuple[bool, bytes]:
            digest = hashlib.blake2b(f"{url}\0{conversation_id}".encode(), digest_size=8).digest()
            return self._down.get(url, 0.0) > now, digest

        return sorted(self._urls, key=rank)


def _retry_after_s(answer: httpx.Response) -> float:
    """Seconds of the header Retry-After, which may be a date (RFC 9110, 10.2.3); 0 without a usable one."""
    value = answer.headers.get("retry-after", "")
    if value.isdecimal():
        return float(value)
    with contextlib.suppress(ValueError):
        until = parsedate_to_datetime(value)
        return max(0.0, (until - datetime.now(until.tzinfo)).total_seconds())
    return 0.0


def _reason(answer: httpx.Response) -> Exception:
    try:
        detail = ErrorResponse.model_validate_json(answer.content).error
        message, fields = detail.message, detail.fields
    except ValidationError:  # e.g. the answer of a proxy
        message, fields = f"HTTP {answer.status_code} {answer.text[:200]}", {}
    if answer.status_code == ConflictError.status:
        return ConflictError(message, fields)
    if answer.status_code in (401, 403):
        return ConfigError(f"{answer.url} refused the call: {message}")
    if answer.status_code in RETRYABLE:
        return UnavailableError(message)
    if answer.status_code >= 500:
        return CortexError(f"{answer.url} failed: {message}")
    return RequestError(message, fields)


class InProcess:
    """Decides in this process; uses Kafka for events and weights."""

    def __init__(self, settings: Settings, timeout_s: float, start_timeout_s: float) -> None:
        self._settings = settings
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._service: Service | None = None

    async def start(self) -> None:
        """Raises `UnavailableError` if Kafka does not answer in time."""
        from streams.inference.service import Service  # noqa: PLC0415 - loads torch

        service = self._service = Service(self._settings)
        try:
            async with asyncio.timeout(self._start_timeout_s):
                await service.start()
        except BaseException as error:
            missing = "; ".join(f"{need}: {why}" for need, why in service.missing.items())
            await self.close()
            if isinstance(error, TimeoutError):
                raise UnavailableError(f"not ready within {self._start_timeout_s:g} s: {missing}") from error
            raise

    async def close(self) -> None:
        service, self._service = self._service, None
        if service is not None:
            await service.stop()

    async def decide(self, request: DecideRequest) -> DecideResponse:
        return await self._repeat(lambda service: service.decide(request))

    async def reply(self, request: ReplyRequest) -> ReplyResponse:
        return await self._repeat(lambda service: service.reply(request))

    async def _repeat(self, call: Callable[[Service], Awaitable[T]]) -> T:
        service = self._service
        if service is None:
            raise ConfigError(
                "an in-process client must be started: `async with CortexClient.local(…) as cortex:`"
            )

        async def attempt(left_s: float) -> T:
            try:
                async with asyncio.timeout(left_s):
                    return await call(service)
            except TimeoutError as error:
                raise UnavailableError(f"no answer within {self._timeout_s:g} s") from error

        return await _retried(self._timeout_s, attempt)
