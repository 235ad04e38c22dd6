"""No client leaks a connection or a task, wherever its start or its stop is interrupted."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import struct
import types
import uuid
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from typing import Any, Self

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.cluster import ClusterMetadata
from aiokafka.conn import AIOKafkaConnection
from aiokafka.errors import KafkaError

from streams.kafka import clients
from streams.kafka.topics import Topics, create_topics
from streams.local.embedded import free_port
from streams.settings import Settings
from streams.testing import async_wait_for

Make = Callable[[str, Topics], Any]
"""Creates a client, not started, from a broker's address and topics."""
MAKERS: dict[str, Make] = {
    "admin": lambda address, _: AIOKafkaAdminClient(bootstrap_servers=address),
    "reader": lambda address, topics: AIOKafkaConsumer(topics.replies, bootstrap_servers=address),
    "member": lambda address, topics: AIOKafkaConsumer(
        topics.replies, bootstrap_servers=address, group_id=f"{topics.prefix}-{uuid.uuid4()}"
    ),
    "producer": lambda address, _: AIOKafkaProducer(bootstrap_servers=address, enable_idempotence=True),
    "transactional": lambda address, topics: AIOKafkaProducer(
        bootstrap_servers=address, transactional_id=f"{topics.prefix}-{uuid.uuid4()}"
    ),
}
every_client = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


@pytest.fixture(autouse=True)
def _collects_fast() -> Iterator[None]:
    """Hundreds of collections look only at objects of the test: with torch loaded they took two minutes."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@contextlib.asynccontextmanager
async def leaving_nothing() -> AsyncIterator[None]:
    """Checks that the body leaks no connection, leaves no task running and no error unretrieved."""
    gc.collect()
    before = asyncio.all_tasks()
    reported: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, what: reported.append(what["message"]))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", ResourceWarning)
        yield
        await async_wait_for(lambda: asyncio.all_tasks() == before, "all its tasks to end")
        gc.collect()
    assert [str(w.message) for w in seen] == []
    assert [message for message in reported if "never retrieved" in message] == []


@types.coroutine
def cancelled_at(step: int, work: Coroutine[Any, Any, Any]) -> Generator[Any, Any, bool]:
    """Runs `work` and cancels its task at its `step`th wait; returns whether it got so far."""
    resume: Callable[[], Any] = lambda: work.send(None)  # noqa: E731
    for n in itertools.count():
        try:
            waiting_for = resume()
        except StopIteration:
            return False
        if n == step:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        try:
            yield waiting_for
        except BaseException as error:
            resume = _throwing(work, error)
        else:
            resume = lambda: work.send(None)  # noqa: E731
    raise AssertionError("unreachable")


def _throwing(work: Coroutine[Any, Any, Any], error: BaseException) -> Callable[[], Any]:
    return lambda: work.throw(error)


async def at_every_step(work: Callable[[], Coroutine[Any, Any, Any]]) -> int:
    """Runs `work` repeatedly, cancelled one step later each time, until it completes; returns the steps."""
    for step in itertools.count():
        async with leaving_nothing():
            task = asyncio.create_task(_run(step, work()))
            await asyncio.wait({task})
            if not task.cancelled():
                task.result()
                return step
            del task
    raise AssertionError("unreachable")


async def _run(step: int, work: Coroutine[Any, Any, Any]) -> None:
    await cancelled_at(step, work)


@pytest.fixture
async def topics(settings: Settings) -> Topics:
    await create_topics(settings)
    return Topics.of(settings)


@pytest.mark.integration
@every_client
async def test_a_start_cancelled_anywhere_leaks_nothing(
    settings: Settings, topics: Topics, make: Make
) -> None:
    async def start_and_stop() -> None:
        async with clients.started(make(settings.kafka_address, topics)):
            pass

    assert await at_every_step(start_and_stop) > 3


# --- a broker that is unavailable or stops answering ------------------------------------------------------


@every_client
async def test_a_failed_start_leaks_nothing(make: Make) -> None:
    async with leaving_nothing():
        with pytest.raises(KafkaError, match="Unable to bootstrap"):
            await clients.start(make(f"127.0.0.1:{free_port()}", Topics("none", 1)))


class SilentBroker:
    """A proxy to a real broker that returns only its first `answers` answers."""

    def __init__(self, address: str, answers: int) -> None:
        self.address = ""
        self.silent = asyncio.Event()
        """Set once an answer was dropped."""
        self._broker = address
        self._left = answers
        self._connections: list[asyncio.Task[None]] = []
        self._patch = pytest.MonkeyPatch()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        # The broker returns its own address; clients must connect to this proxy instead.
        real = ClusterMetadata.broker_metadata
        self._patch.setattr(
            ClusterMetadata, "broker_metadata", lambda *args: (b := real(*args)) and b._replace(port=port)
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        self._patch.undo()
        self._server.close()
        await asyncio.gather(*self._connections)

    def silence(self) -> None:
        """Stops answering."""
        self._left = 0

    async def _connected(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.append(task)
        broker, to_broker = await asyncio.open_connection(*self._broker.split(":"))
        answering = asyncio.create_task(self._answer(broker, to_client))
        while request := await client.read(65_536):
            to_broker.write(request)
        for writer in (to_broker, to_client):
            writer.close()
            await writer.wait_closed()
        await answering

    async def _answer(self, broker: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                size = await broker.readexactly(4)
                answer = await broker.readexactly(struct.unpack(">i", size)[0])
                if self._left > 0:
                    self._left -= 1
                    to_client.write(size + answer)
                else:
                    self.silent.set()


@pytest.fixture
def _stops_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "STOP_S", 0.1)


@pytest.mark.integration
@pytest.mark.usefixtures("_stops_soon")
@every_client
async def test_a_start_cancelled_while_the_broker_is_silent_leaks_nothing(
    settings: Settings, topics: Topics, make: Make
) -> None:
    for answers in itertools.count():
        async with SilentBroker(settings.kafka_address, answers) as broker, leaving_nothing():
            start = asyncio.create_task(clients.start(make(broker.address, topics)))
            silent = asyncio.create_task(broker.silent.wait())
            await asyncio.wait({start, silent}, return_when=asyncio.FIRST_COMPLETED)
            done = start.done()
            silent.cancel()
            start.cancel()
            await asyncio.wait({start, silent})
            if done:
                await clients.stop(start.result())
            del start, silent
        if done:
            break
    assert answers > 1


@pytest.mark.integration
@pytest.mark.usefixtures("_stops_soon")
@every_client
async def test_a_stop_while_the_broker_is_silent_leaks_nothing(
    settings: Settings, topics: Topics, make: Make
) -> None:
    async with SilentBroker(settings.kafka_address, 10_000) as broker, leaving_nothing():
        client = await clients.start(make(broker.address, topics))
        if isinstance(client, AIOKafkaProducer):
            await client.partitions_for(topics.replies)
        broker.silence()
        if isinstance(client, AIOKafkaProducer):
            if client._txn_manager.transactional_id:
                await client.begin_transaction()
            await client.send(topics.replies, b"never acknowledged", partition=0)
            await broker.silent.wait()  # what is sent now waits behind what is under way
            await client.send(topics.replies, b"never sent", partition=0)
        await clients.stop(client)
        del client


@pytest.mark.integration
@pytest.mark.usefixtures("_stops_soon")
@every_client
async def test_a_stop_while_connections_do_not_close_is_no_cancellation(
    settings: Settings, topics: Topics, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over TLS, where closing waits for the other side."""
    client = await clients.start(make(settings.kafka_address, topics))
    if isinstance(client, AIOKafkaAdminClient):
        await client.list_topics()  # else it has no connection
    close = AIOKafkaConnection.close
    never: dict[AIOKafkaConnection, asyncio.Future[None]] = {}

    def closes(connection: AIOKafkaConnection, *args: Any, **options: Any) -> asyncio.Future[None]:
        close(connection, *args, **options)
        return never.setdefault(connection, asyncio.get_running_loop().create_future())

    monkeypatch.setattr(AIOKafkaConnection, "close", closes)
    await clients.stop(client)
    assert never
