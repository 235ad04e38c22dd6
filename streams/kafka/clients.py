"""Starts and stops aiokafka clients without leaking connections, also on errors and cancellation.

    async with started(AIOKafkaProducer(**kafka_client_options(settings))) as producer:
        await producer.send_and_wait(topic, value)

aiokafka 0.14 leaks connections in two cases: if `start` is cancelled in its first request, and if `stop` is
cancelled anywhere (https://github.com/aio-libs/aiokafka/issues/715). Once both are fixed there, this module
needs no private names of aiokafka.
"""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections.abc import AsyncIterator, Iterator
from itertools import chain
from typing import Any, TypeVar

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.conn import AIOKafkaConnection
from aiokafka.errors import KafkaConnectionError, KafkaError

C = TypeVar("C", AIOKafkaConsumer, AIOKafkaProducer, AIOKafkaAdminClient)

STOP_S = 3.0
"""Seconds that a client has for its last requests: to leave its group, to send its last events."""


@contextlib.asynccontextmanager
async def started(client: C) -> AsyncIterator[C]:
    """Starts the client, and stops it at the end of the block.

    Raises:
        KafkaError, OSError: the brokers do not answer.
    """
    await start(client)
    try:
        yield client
    finally:
        await stop(client)


async def start(client: C) -> C:
    """Starts the client; stops it if the start fails or is cancelled.

    Raises:
        KafkaError, OSError: the brokers do not answer.
    """
    try:
        await client.start()
    except BaseException as error:
        # Until the first broker answers, its connection is only a local variable of aiokafka's bootstrap.
        for frame, _ in traceback.walk_tb(error.__traceback__):
            for value in frame.f_locals.values():
                if isinstance(value, AIOKafkaConnection):
                    value.close()
        await stop(client)
        raise
    return client


async def stop(client: C, timeout_s: float | None = None) -> None:
    """Stops the client within `timeout_s` (None: `STOP_S`) plus a second; leaves no task and no connection.

    Raises nothing if the brokers do not answer; a producer's unacknowledged events are then lost.
    """
    try:
        with contextlib.suppress(KafkaError, OSError):
            async with asyncio.timeout(STOP_S if timeout_s is None else timeout_s):
                await (client.close() if isinstance(client, AIOKafkaAdminClient) else client.stop())
    finally:
        await _clean_up(client)


async def _clean_up(client: Any) -> None:
    """Ends the tasks and connections that remain if `stop` failed or was cancelled."""
    inner = client.client if isinstance(client, AIOKafkaProducer) else client._client
    left = {task for task in _tasks(client) if task is not None and not task.done()}
    if isinstance(client, AIOKafkaProducer):
        _give_up_events(client._message_accumulator)
    for _ in range(3):
        for task in left:
            task.cancel()
        # This fails the requests in flight, the only thing that a cancelled task may still wait for. In a
        # task of its own: if a connection took too long to close, as with TLS, the next `close` is cancelled.
        closing = asyncio.ensure_future(inner.close())
        try:
            await asyncio.wait({closing}, timeout=0.3)
        finally:
            closing.cancel()
        await asyncio.wait({closing})
        if not closing.cancelled():
            closing.exception()  # which marks it as retrieved
        if not left:
            return
        _, left = await asyncio.wait(left, timeout=0.3)


def _give_up_events(accumulator: Any) -> None:
    """Fails events that are not acknowledged; asyncio reports none for which nobody waits any more."""
    batches = [*chain(*accumulator._batches.values()), *accumulator._pending_batches]
    accumulator.fail_all(KafkaConnectionError("the producer was stopped"))
    for batch in batches:
        for future in (batch.future, *(future for future, _ in batch._msg_futures)):
            if not future.cancelled():
                future.exception()  # which marks it as retrieved


def _tasks(client: Any) -> Iterator[asyncio.Task[Any] | None]:
    if isinstance(client, AIOKafkaProducer):
        yield client._sender.sender_task
    if isinstance(client, AIOKafkaConsumer):
        if (fetcher := client._fetcher) is not None:
            yield from (fetcher._fetch_task, *fetcher._pending_tasks)
        for name in (
            "_reset_committed_task",
            "_coordination_task",
            "_heartbeat_task",
            "_commit_refresh_task",
        ):
            yield getattr(client._coordinator, name, None)
