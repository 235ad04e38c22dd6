"""How every worker reaches Kafka and Redis: options from the settings, and waiting until they answer."""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import structlog
from aiokafka.errors import KafkaError

from cortex_core.errors import UnavailableError

if TYPE_CHECKING:
    import redis
    import redis.asyncio

    from streams.settings import Settings

log = structlog.get_logger(__name__)
T = TypeVar("T")

REACHABILITY_ERRORS: tuple[type[Exception], ...] = (KafkaError, OSError, UnavailableError)
"""What a client raises while its server is away. redis-py's errors are added where Redis is imported."""


def kafka_client_options(settings: Settings) -> dict[str, Any]:
    """Keyword arguments that every aiokafka client (admin, producer, consumer) takes."""
    options: dict[str, Any] = {
        "bootstrap_servers": settings.kafka_address,
        "security_protocol": settings.kafka_security_protocol,
        "request_timeout_ms": 15_000,
    }
    if settings.kafka_security_protocol.endswith("SSL"):
        context = ssl.create_default_context(
            cafile=str(settings.kafka_ssl_cafile) if settings.kafka_ssl_cafile else None
        )
        if settings.kafka_ssl_certfile:
            context.load_cert_chain(str(settings.kafka_ssl_certfile), settings.kafka_ssl_keyfile)
        options["ssl_context"] = context
    if settings.kafka_security_protocol.startswith("SASL"):
        options["sasl_mechanism"] = settings.kafka_sasl_mechanism
        options["sasl_plain_username"] = settings.kafka_sasl_username
        password = settings.kafka_sasl_password
        options["sasl_plain_password"] = password.get_secret_value() if password else None
    return options


_REDIS_OPTIONS: dict[str, Any] = {
    "socket_timeout": 10.0,
    "socket_connect_timeout": 5.0,
    "health_check_interval": 30,
}


def redis_client(settings: Settings) -> redis.Redis:
    """A synchronous client that answers in bytes; for threads."""
    import redis as redis_py  # noqa: PLC0415 - a worker without Redis need not load it

    return redis_py.Redis.from_url(settings.redis_address, **_REDIS_OPTIONS)


def async_redis_client(settings: Settings) -> redis.asyncio.Redis:
    """An asyncio client that answers in bytes; for event loops."""
    import redis.asyncio as redis_aio  # noqa: PLC0415

    return redis_aio.Redis.from_url(settings.redis_address, **_REDIS_OPTIONS)


async def backoff(first_s: float = 0.2, most_s: float = 5.0) -> AsyncIterator[int]:
    """Yields 1, 2, 3 … for ever, sleeping longer before each but the first (full jitter, doubling)."""
    attempt, delay = 1, first_s
    while True:
        yield attempt
        await asyncio.sleep(random.uniform(0.5, 1.0) * delay)
        attempt, delay = attempt + 1, min(most_s, 2 * delay)


async def until_reachable(
    what: str,
    address: str,
    attempt: Callable[[], Awaitable[T]],
    on_failure: Callable[[str], None] | None = None,
) -> T:
    """Calls `attempt` until it succeeds, with backoff, saying each time which address does not answer.

    Args:
        what: "Kafka" or "Redis".
        address: as shown in messages; without secrets.
        attempt: opens the connection; raises while the server is away.
        on_failure: told the message too, for `/readyz`.
    """
    import redis as redis_py  # noqa: PLC0415

    away: tuple[type[Exception], ...] = (*REACHABILITY_ERRORS, redis_py.RedisError, TimeoutError)
    async for n in backoff():
        try:
            return await attempt()
        except away as error:
            message = f"{what} at {address} does not answer ({type(error).__name__}: {error}); trying again"
            log.warning("unreachable", what=what, address=address, attempt=n, error=str(error))
            if on_failure:
                on_failure(message)
    raise AssertionError("backoff never ends")
