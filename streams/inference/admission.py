"""Admission of requests, before their body is read: by API key, by rate, and by what is already in work."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

from cachetools import LRUCache
from starlette.exceptions import HTTPException
from starlette.requests import Request

from streams.api_keys import ApiKey, Scope, find_key
from streams.settings import Settings

CALLERS_REMEMBERED = 10_000
"""Maximum number of callers whose rate is known; about 200 bytes each."""
BODIES = 16
"""Bodies of the maximum size that may be in work."""


class HttpError(HTTPException):
    """An error response of the HTTP layer."""

    def __init__(
        self,
        status: int,
        type_: str,
        message: str,
        fields: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.type = type_
        self.fields = dict(fields or {})


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request."""

    name: str
    """of its key; without keys, its address"""
    models: frozenset[str] = frozenset()
    """the models that it is limited to; empty: all"""

    def may_use(self, model_id: str) -> bool:
        return not self.models or model_id in self.models

    def check_model(self, model_id: str) -> None:
        """Raises `HttpError` (403) if its key is limited to other models."""
        if not self.may_use(model_id):
            raise _forbidden(f"key {self.name!r} is limited to other models, expected one for {model_id!r}")


class Admission:
    """Decides which requests are worked on. All methods run on one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._keys = settings.access_keys
        self._rate = RateLimiter(settings.rate_limit) if settings.rate_limit else None
        self._max_requests = settings.max_requests
        self._max_body = settings.max_body_bytes
        self._requests = 0
        self._bytes = 0

    @contextlib.contextmanager
    def admit(self, request: Request, scope: Scope) -> Iterator[Caller]:
        """Counts the request as in work while the body runs.

        Raises:
            HttpError: 401 without a valid key, 403 if the key lacks the scope, 429 beyond the caller's rate,
                503 beyond the service's capacity.
        """
        caller = self._caller(request, scope)
        if self._rate is not None and (wait_s := self._rate.wait_s(caller.name, time.monotonic())):
            raise HttpError(
                429,
                "rate_limited",
                f"{caller.name} sent more than {self._rate.per_s:g} requests per second (CORTEX_RATE_LIMIT)",
                headers={"Retry-After": str(math.ceil(wait_s))},
            )
        size = self._reserved(request)
        if self._requests >= self._max_requests or self._bytes + size > BODIES * self._max_body:
            raise HttpError(
                503,
                "overloaded",
                f"{self._requests} requests with {self._bytes:,} bytes are in work, at most "
                f"{self._max_requests} and {BODIES * self._max_body:,} (CORTEX_MAX_REQUESTS): retry, or "
                "start more inference workers",
                headers={"Retry-After": "1"},
            )
        self._requests += 1
        self._bytes += size
        try:
            yield caller
        finally:
            self._requests -= 1
            self._bytes -= size

    def _caller(self, request: Request, scope: Scope) -> Caller:
        if not self._keys:
            return Caller(_network(request.client.host if request.client else ""))
        key = self._presented(request)
        if key is None:
            raise HttpError(
                401,
                "unauthorized",
                "no valid API key, expected Authorization: Bearer KEY (CORTEX_API_KEY for CortexClient)",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if scope not in key.scopes:
            raise _forbidden(
                f"key {key.name!r} has the scopes {'+'.join(sorted(key.scopes))}, expected {scope}"
            )
        return Caller(key.name, key.models)

    def _presented(self, request: Request) -> ApiKey | None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        return find_key(self._keys, key.strip().encode()) if scheme.lower() == "bearer" else None

    def _reserved(self, request: Request) -> int:
        """Bytes of the body that may be held; a body of unknown length counts as one of the maximum size."""
        declared = request.headers.get("content-length", "")
        if declared.isdigit():
            return int(declared) if int(declared) <= self._max_body else 0  # refused without reading it
        return self._max_body if "transfer-encoding" in request.headers else 0


class RateLimiter:
    """A token bucket for each caller, with tokens for one second, at least one.

    Args:
        per_s: requests per second.
    """

    def __init__(self, per_s: float, capacity: int = CALLERS_REMEMBERED) -> None:
        self.per_s = per_s
        self._burst = max(1.0, per_s)
        self._buckets: LRUCache[str, tuple[float, float]] = LRUCache(capacity)

    def wait_s(self, caller: str, now: float) -> float:
        """Takes a token, and returns 0; or seconds until there is one.

        Args:
            now: seconds on a monotonic clock.
        """
        tokens, since = self._buckets.get(caller, (self._burst, now))
        tokens = min(self._burst, tokens + (now - since) * self.per_s)
        taken = tokens >= 1.0
        self._buckets[caller] = (tokens - taken, now)
        return 0.0 if taken else (1.0 - tokens) / self.per_s


def _forbidden(message: str) -> HttpError:
    return HttpError(403, "forbidden", message)


def _network(host: str) -> str:
    """The address that a limit applies to: of IPv6 the network, of whose addresses a client has 2**64."""
    try:
        address = ip_address(host)
    except ValueError:  # a socket of this machine
        return host or "this machine"
    if isinstance(address, IPv6Address) and address.ipv4_mapped is None:
        return f"{IPv6Address(int(address) >> 64 << 64)}/64"
    return host
