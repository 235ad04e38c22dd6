"""Finds out why a Kafka broker closes connections: aiokafka reports only that it cannot be reached."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from aiokafka.conn import AIOKafkaConnection, collect_hosts, create_conn
from aiokafka.errors import IllegalSaslStateError, KafkaError
from aiokafka.protocol.admin import SaslHandShakeRequest
from aiokafka.protocol.metadata import MetadataRequest

from cortex_core.errors import ConfigError
from streams.failures import configuration_error

if TYPE_CHECKING:
    from streams.settings import Settings


async def kafka_refusal(options: dict[str, Any], settings: Settings, timeout_s: float) -> ConfigError | None:
    """The reason why a broker refuses connections, if it is the configuration; else None.

    Args:
        options: of a client.
        timeout_s: for each attempt to connect, of which there are two for each broker.
    """
    of_clients = ("bootstrap_servers", "metadata_max_age_ms")
    of_connections = {name: value for name, value in options.items() if name not in of_clients}
    for host, port, _ in collect_hosts(options["bootstrap_servers"]):
        for attempt in (
            partial(_connect_once, partial(create_conn, host, port, **of_connections)),
            partial(_check_tls, host, port, options.get("ssl_context")),
        ):
            try:
                async with asyncio.timeout(timeout_s):
                    await attempt()
                break
            except (KafkaError, OSError) as error:
                if refused := configuration_error(error, settings):
                    return refused
    return None


async def _connect_once(connect: Callable[[], Awaitable[AIOKafkaConnection]]) -> None:
    """Opens a connection, sends a request, and closes it.

    Raises:
        IllegalSaslStateError: the listener requires SASL, and these options do not use it.
        KafkaError, OSError: the broker does not answer or refuses the connection.
    """
    connection = await connect()
    try:
        await connection.send(MetadataRequest([]))
        return
    except KafkaError as error:
        # Without a message, a listener with SASL closes connections that send anything but a handshake.
        closed = error
    finally:
        await connection.close()
    connection = await connect()
    try:
        answer = await connection.send(SaslHandShakeRequest("PLAIN"))
    finally:
        await connection.close()
    if answer.error_code == IllegalSaslStateError.errno:  # the listener does not use SASL, or is past it
        raise closed
    raise IllegalSaslStateError(f"the listener requires SASL: {', '.join(answer.enabled_mechanisms)}")


async def _check_tls(host: str, port: int, context: ssl.SSLContext | None) -> None:
    """Checks whether a listener that closes connections uses TLS as this process does.

    Args:
        context: of this process; None: it does not use TLS.

    Raises:
        IllegalSaslStateError: one of both uses TLS, the other does not.
        OSError: the broker does not answer, or refuses the certificate of this process or its absence.
    """
    if context is None:
        unverified = ssl.create_default_context()
        unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
        _, writer = await asyncio.open_connection(host, port, ssl=unverified)
        writer.close()
        raise IllegalSaslStateError("the listener uses TLS")
    if await _answers_without_tls(host, port):
        raise IllegalSaslStateError("the listener does not use TLS")
    reader, writer = await asyncio.open_connection(host, port, ssl=context)
    try:
        await reader.read(1)  # a broker looks at the certificate once the connection is there
    finally:
        writer.close()


async def _answers_without_tls(host: str, port: int) -> bool:
    try:
        connection = await create_conn(host, port)
    except (KafkaError, OSError):
        return False
    await connection.close()
    return True
