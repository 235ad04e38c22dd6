"""Connections to Kafka and Redis for all workers: client options, and retries of transient errors."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import redis
import redis.asyncio
import redis.asyncio.retry
import redis.retry
import structlog
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from cortex_core.errors import ConfigError, CortexError, UnavailableError
from streams.backoff import MOST_S, delays
from streams.failures import configuration_error, is_redis, is_transient, unavailable_error
from streams.probe import kafka_refusal

if TYPE_CHECKING:
    from streams.settings import Settings

log = structlog.get_logger(__name__)
T = TypeVar("T")

PROBE_TIMEOUT_S = 5.0
METADATA_AGE_MS = 5_000
"""How soon Kafka clients see that a topic was created, deleted or got more partitions. aiokafka's default is
five minutes, in which nobody would read them."""


# --- clients ------------------------------------------------------------------------------------------------


def kafka_client_options(settings: Settings) -> dict[str, Any]:
    """Keyword arguments for any aiokafka client: admin, producer or consumer.

    Raises:
        ConfigError: a certificate or key file cannot be read, or SASL has no user or no password.
    """
    options: dict[str, Any] = {
        "bootstrap_servers": settings.kafka_address,
        "security_protocol": settings.kafka_security_protocol,
        "request_timeout_ms": 15_000,
        "metadata_max_age_ms": METADATA_AGE_MS,
    }
    if settings.kafka_security_protocol.endswith("SSL"):
        files = (settings.kafka_ssl_cafile, settings.kafka_ssl_certfile, settings.kafka_ssl_keyfile)
        names = "CORTEX_KAFKA_SSL_CAFILE, CORTEX_KAFKA_SSL_CERTFILE or CORTEX_KAFKA_SSL_KEYFILE"
        options["ssl_context"] = _tls_context(names, *files)
    if settings.kafka_security_protocol.startswith("SASL"):
        user, password = settings.kafka_sasl_username, settings.kafka_sasl_password
        if not user or password is None:
            raise ConfigError(
                "CORTEX_KAFKA_SASL_USERNAME and CORTEX_KAFKA_SASL_PASSWORD: expected both with "
                f"CORTEX_KAFKA_SECURITY_PROTOCOL={settings.kafka_security_protocol}"
            )
        options["sasl_mechanism"] = settings.kafka_sasl_mechanism
        options["sasl_plain_username"] = user
        options["sasl_plain_password"] = password.get_secret_value()
    return options


def _tls_context(
    names: str, ca: Path | str | None, certificate: Path | str | None, key: Path | str | None
) -> ssl.SSLContext:
    """What verifies a server, and shows it a certificate.

    Args:
        names: of the settings of the three files, for a message.

    Raises:
        ConfigError: a file cannot be read.
    """
    try:
        context = ssl.create_default_context(cafile=ca)
        if certificate:
            context.load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(
            f"{names} cannot be read ({type(error).__name__}: {error}): expected PEM files"
        ) from error
    return context


class _RetryOnce(redis.retry.Retry):
    """Retries a command once, immediately and on a new connection, if its error is transient.

    Closes the connection also if the server answers READONLY, LOADING and the like, which redis-py would keep
    open: the new one resolves the address again, and so reaches the primary after a failover. `retry` does
    the longer waits.
    """

    def __init__(self) -> None:
        super().__init__(NoBackoff(), 1)

    def call_with_retry(self, do: Any, fail: Any, *_: Any, **options: Any) -> Any:
        try:
            return do()
        except RedisError as error:
            if not is_transient(error):
                raise
            fail(error, 1) if options.get("with_failure_count") else fail(error)
        return do()


class _AsyncRetryOnce(redis.asyncio.retry.Retry):
    """`_RetryOnce` for event loops."""

    def __init__(self) -> None:
        super().__init__(NoBackoff(), 1)

    async def call_with_retry(self, do: Any, fail: Any, *_: Any, **options: Any) -> Any:
        try:
            return await do()
        except RedisError as error:
            if not is_transient(error):
                raise
            await (fail(error, 1) if options.get("with_failure_count") else fail(error))
        return await do()


_REDIS_OPTIONS: dict[str, Any] = {
    "socket_timeout": 10.0,
    "socket_connect_timeout": 5.0,
    "health_check_interval": 30,
}


def redis_client(settings: Settings) -> redis.Redis:
    """A synchronous client, for threads; its replies are bytes.

    Raises:
        ConfigError: the URL has an invalid option, or names a file that cannot be read.
    """
    with _checking_url(settings):
        client = redis.Redis.from_url(settings.redis_address, retry=_RetryOnce(), **_REDIS_OPTIONS)
        _check_options(client.connection_pool)
    return client


def async_redis_client(settings: Settings) -> redis.asyncio.Redis:
    """An asyncio client, for event loops; its replies are bytes.

    Raises:
        ConfigError: as `redis_client`.
    """
    with _checking_url(settings):
        client = redis.asyncio.Redis.from_url(
            settings.redis_address, retry=_AsyncRetryOnce(), **_REDIS_OPTIONS
        )
        _check_options(client.connection_pool)
    return client


@contextlib.contextmanager
def _checking_url(settings: Settings) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except (TypeError, ValueError, RedisError) as error:
        raise ConfigError(
            f"CORTEX_REDIS_URL {settings.redis_shown}: an option is unknown or invalid ({error}); options of "
            "TLS need rediss://"
        ) from None


def _check_options(pool: redis.ConnectionPool | redis.asyncio.ConnectionPool) -> None:
    """Checks the options of the URL, which redis-py does at the first connection, as one unreachable."""
    pool.connection_class(**pool.connection_kwargs)
    names = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
    files = [pool.connection_kwargs.get(name) for name in names]
    if any(files):
        _tls_context(f"CORTEX_REDIS_URL: {', '.join(names)}", *files)


# --- retrying -----------------------------------------------------------------------------------------------


async def explain(error: BaseException, settings: Settings) -> CortexError | None:
    """The meaning of a client's error for the process (see `streams.failures`).

    Connects to Kafka if aiokafka may hide the reason: when a broker refuses a password, aiokafka reports only
    that no broker could be reached, or retries until a timeout.

    Returns:
        `ConfigError`: the process should end; the message says what to change. `UnavailableError`: transient;
        the message has the server's answer. None: neither; the caller decides.
    """
    if refused := configuration_error(error, settings):
        return refused
    if not is_transient(error):
        return None
    if not is_redis(error) and (
        refused := await kafka_refusal(kafka_client_options(settings), settings, PROBE_TIMEOUT_S)
    ):
        return refused
    return unavailable_error(error, settings)


async def why_unavailable(error: Exception, settings: Settings) -> UnavailableError:
    """A transient error as an `UnavailableError`; any other error is raised.

    Raises:
        ConfigError: `error` is a configuration error.
        Exception: `error` itself, if it is neither.
    """
    meaning = await explain(error, settings)
    if isinstance(meaning, UnavailableError):
        return meaning
    if meaning is None or meaning is error:
        raise error
    raise meaning from error


async def backoff(stop: asyncio.Event | None = None, *, most_s: float = MOST_S) -> AsyncIterator[int]:
    """Yields 1, 2, 3 …; before each but the first, sleeps with exponential backoff and full jitter.

    Args:
        stop: ends the iteration, also during a sleep.
        most_s: the longest sleep.
    """
    for attempt, delay_s in enumerate(delays(most_s), 1):
        if stop and stop.is_set():
            return
        yield attempt
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s):
                await (stop or asyncio.Event()).wait()


async def retry(
    work: Callable[[], Awaitable[T]],
    settings: Settings,
    on_failure: Callable[[str, str], None] | None = None,
) -> T:
    """Calls `work` until it succeeds, with backoff, as long as its errors are transient.

    Cancel it to stop waiting, or let `work` raise an error that is not transient.

    Args:
        on_failure: called after each failure with "kafka" or "redis" and the server's answer, as
            `worker.not_ready` is. The caller of `retry` reports that the server is ready again.

    Raises:
        ConfigError: a configuration error.
        Exception: any other error of `work` that is not transient.
    """
    async for attempt in backoff():
        try:
            return await work()
        except Exception as error:
            why = await why_unavailable(error, settings)
            log.warning("retrying", attempt=attempt, why=str(why))
            if on_failure:
                on_failure("redis" if is_redis(error) else "kafka", str(why))
    raise AssertionError("backoff never ends")
