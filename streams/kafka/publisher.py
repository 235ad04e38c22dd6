"""Publishes events to Kafka with acknowledgement by all in-sync replicas; replaces a producer that fails.

    publisher = Publisher(settings, on_state)
    await publisher.start()                          # waits until Kafka answers
    delivery = publisher.begin(topic, key, value)    # a task; it continues even if the caller is cancelled
    await publisher.wait(delivery)                   # acknowledged, or UnavailableError
    await publisher.send(messages)                   # many, as Kafka batches; waits for all acknowledgements
    await publisher.stop()

Failures are handled as follows:

* No acknowledgement within `publish_timeout_s`: the event may or may not arrive; its delivery continues.
  Until the brokers answer again, `unavailable` has the reason and `begin` raises `UnavailableError`.
* A configuration error, such as a refused password: `begin` and `until_refused` raise a `ConfigError`.
* Any other failure: the producer is replaced. An idempotent producer numbers its batches; after one that it
  gave up, the broker rejects all later ones (OutOfOrderSequenceNumber).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError
from aiokafka.partitioner import DefaultPartitioner
from aiokafka.producer.message_accumulator import BatchBuilder
from prometheus_client import Counter, Histogram

from cortex_core.errors import ConfigError, InputError, UnavailableError
from streams.connections import PROBE_TIMEOUT_S, kafka_client_options, retry
from streams.failures import configuration_error, error_text, unavailable_error
from streams.kafka.clients import start, stop
from streams.kafka.reader import PROBE_S
from streams.kafka.refusal import Refusal
from streams.kafka.topics import MAX_RECORD_BYTES, create_topics
from streams.settings import Settings

log = structlog.get_logger(__name__)

MAX_VALUE = MAX_RECORD_BYTES - 10_000
"""Maximum bytes of a value; the rest of a record is for the key and the batch's overhead."""

ACK_S = Histogram(
    "cortex_publish_seconds", "From sending an event or a batch to its acknowledgement", ["topic"]
)
REPLACED = Counter("cortex_producer_replaced_total", "Producers that failed and were replaced")


class Message(NamedTuple):
    """A record to publish."""

    topic: str
    key: bytes
    value: bytes
    headers: Sequence[tuple[str, bytes]] = ()


class Publisher:
    """One idempotent producer at a time. All methods run on one event loop."""

    def __init__(self, settings: Settings, on_state: Callable[[str | None], None] | None = None) -> None:
        """
        Args:
            on_state: called with the reason why Kafka is unavailable, or None if it is available.
        """
        self.settings = settings
        self.unavailable: str | None = "not connected yet"
        """Why nothing can be published at present; None if it can."""
        self._on_state = on_state or (lambda _why: None)
        self._producer: AIOKafkaProducer | None = None
        self._partitioner = DefaultPartitioner()
        self._deliveries: set[asyncio.Task[None]] = set()
        self._broken = False
        self._late = 0
        self._failed = asyncio.Event()
        self._refusal = Refusal()
        self._recovery: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Creates missing topics and connects; waits until a broker answers.

        Raises:
            ConfigError: a configuration error, or existing topics have unequal numbers of partitions.
        """
        self._producer = await self._connect()
        self._set_unavailable(None)
        self._recovery = asyncio.create_task(self._recover())

    async def stop(self, timeout_s: float = 2.0) -> None:
        """Waits up to `timeout_s` for deliveries in flight, then closes; safe to call twice."""
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.gather(self._recovery, return_exceptions=True)
        self.unavailable = "this service is stopping"
        await self._close(timeout_s)

    def begin(self, topic: str, key: bytes, value: bytes) -> asyncio.Task[None]:
        """Starts the delivery of an event. The task ends with its acknowledgement, or an `UnavailableError`.

        Raises:
            UnavailableError: Kafka is unavailable; nothing was sent.
            ConfigError: Kafka refused the configuration of this process; nothing was sent.
            InputError: the event exceeds the maximum size of a record.
        """
        producer = self._usable()
        _check_size(value)
        return self._deliver(producer, topic, partial(producer.send, topic, value=value, key=key))

    async def wait(self, delivery: asyncio.Task[None]) -> None:
        """Returns once the event is acknowledged. Cancelling the wait does not cancel the delivery.

        Raises:
            UnavailableError: no acknowledgement within `publish_timeout_s`, or the delivery failed.
            ConfigError: Kafka refused the configuration of this process.
        """
        done, _ = await asyncio.wait({delivery}, timeout=self.settings.publish_timeout_s)
        if not done:
            self._note_failure(
                f"Kafka at {self.settings.kafka_address} did not acknowledge within "
                f"{self.settings.publish_timeout_s:g} s"
            )
            raise UnavailableError(
                f"{self.unavailable}; the event may or may not be stored: repeat it with the same id"
            )
        if delivery.cancelled():
            raise UnavailableError("the connection to Kafka was lost: repeat the event with the same id")
        delivery.result()

    async def send(self, messages: Iterable[Message]) -> None:
        """Sends messages, and returns once all are acknowledged.

        They are sent as Kafka batches, in order for each partition: much cheaper than one by one.

        Raises:
            UnavailableError, InputError: as `begin` and `wait`; some messages may be stored nonetheless.
        """
        producer = self._usable()
        batches = await self._batched(producer, messages)
        deliveries = [
            self._deliver(producer, topic, partial(producer.send_batch, batch, topic, partition=partition))
            for (topic, partition), its_batches in batches.items()
            for batch in its_batches
        ]
        for delivery in deliveries:
            await self.wait(delivery)

    async def until_refused(self) -> NoReturn:
        """Waits until Kafka refuses the configuration of this process, if that ever happens.

        Raises:
            ConfigError: it happened.
        """
        await self._refusal.wait()

    async def _batched(
        self, producer: AIOKafkaProducer, messages: Iterable[Message]
    ) -> dict[tuple[str, int], list[BatchBuilder]]:
        """The messages in Kafka batches, by topic and partition."""
        batches: dict[tuple[str, int], list[BatchBuilder]] = {}
        partitions: dict[str, list[int]] = {}
        for topic, key, value, headers in messages:
            _check_size(value)
            if topic not in partitions:
                with self._explained(producer):
                    partitions[topic] = sorted(await producer.partitions_for(topic))
            partition = self._partitioner(key, partitions[topic], [])
            its_batches = batches.setdefault((topic, partition), [])
            record = {"timestamp": None, "key": key, "value": value, "headers": [*headers]}
            if not its_batches or its_batches[-1].append(**record) is None:
                its_batches.append(producer.create_batch())
                its_batches[-1].append(**record)
        return batches

    def _usable(self) -> AIOKafkaProducer:
        if self._refusal.error is not None:
            raise self._refusal.error
        if self.unavailable is not None or self._producer is None:
            raise UnavailableError(self.unavailable or "not connected yet")
        return self._producer

    def _deliver(
        self, producer: AIOKafkaProducer, topic: str, send: Callable[[], Awaitable[Awaitable[Any]]]
    ) -> asyncio.Task[None]:
        async def deliver() -> None:
            with self._explained(producer), ACK_S.labels(topic.rpartition(".")[2]).time():
                await (await send())
            self._late = 0

        task = asyncio.create_task(deliver())
        self._deliveries.add(task)
        task.add_done_callback(self._delivered)
        return task

    @contextlib.contextmanager
    def _explained(self, producer: AIOKafkaProducer) -> Iterator[None]:
        """Converts the producer's errors into ours, and requests a new producer."""
        try:
            yield
        except (KafkaError, OSError) as error:
            if refused := configuration_error(error, self.settings):
                self._refuse(refused)
                raise refused from error
            why = f"Kafka at {self.settings.kafka_address} refused an event ({error_text(error)})"
            if producer is self._producer:
                self._broken = True
                self._note_failure(why)
            if isinstance(error, MessageSizeTooLargeError):
                raise InputError(
                    f"{why}: retrieve fewer memories (top_k), or raise max.message.bytes"
                ) from error
            raise UnavailableError(why) from error

    def _delivered(self, task: asyncio.Task[None]) -> None:
        self._deliveries.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved here, as nobody may wait for the task any more

    def _note_failure(self, why: str) -> None:
        self._late += 1
        if self._late > 1 and self.unavailable is None:
            # The brokers answer, but have acknowledged nothing since the last late delivery.
            self._broken = True
        self._set_unavailable(why)
        self._failed.set()

    def _refuse(self, error: ConfigError) -> None:
        self._refusal.set(error)
        self._set_unavailable(str(error))

    def _set_unavailable(self, why: str | None) -> None:
        if why is not None and self.unavailable is None:
            log.warning("kafka unavailable", why=why)
        elif why is None and self.unavailable is not None:
            log.info("kafka available", address=self.settings.kafka_address)
        self.unavailable = why
        self._on_state(why)

    async def _recover(self) -> None:
        """After each failure and every `PROBE_S`, waits until Kafka answers; replaces a broken producer."""
        while self._refusal.error is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PROBE_S):
                    await self._failed.wait()
            self._failed.clear()
            try:
                await retry(self._probe, self.settings, lambda _, why: self._set_unavailable(why))
                if self._broken:
                    REPLACED.inc()
                    await self._close(1.0)
                    self._producer = await self._connect()
            except ConfigError as error:
                self._refuse(error)
            else:
                if self.unavailable is not None:
                    self._set_unavailable(None)

    async def _probe(self) -> None:
        """Returns if the brokers answer, or if the producer is replaced anyway."""
        if self._broken:
            return
        assert self._producer is not None
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                if not await self._producer.client.force_metadata_update():
                    raise KafkaError("no broker answers")
        except (KafkaError, OSError) as error:
            # At once: it may take seconds to find out why.
            self._set_unavailable(str(unavailable_error(error, self.settings)))
            raise

    async def _connect(self) -> AIOKafkaProducer:
        async def attempt() -> AIOKafkaProducer:
            await create_topics(self.settings)
            producer = AIOKafkaProducer(
                **kafka_client_options(self.settings),
                acks="all",
                enable_idempotence=True,
                # The next batch fills while one is in flight; lingering would only add latency.
                linger_ms=0,
                max_batch_size=1_000_000,
                partitioner=self._partitioner,
                max_request_size=MAX_RECORD_BYTES,
            )
            async with asyncio.timeout(10.0):
                return await start(producer)

        self._broken, self._late = False, 0
        return await retry(attempt, self.settings, lambda _, why: self._set_unavailable(why))

    async def _close(self, timeout_s: float) -> None:
        producer, self._producer = self._producer, None
        if producer is None:
            return
        await stop(producer, timeout_s)
        for task in list(self._deliveries):
            task.cancel()
        await asyncio.gather(*self._deliveries, return_exceptions=True)


def _check_size(value: bytes) -> None:
    if len(value) > MAX_VALUE:
        raise InputError(
            f"the event has {len(value)} bytes, at most {MAX_VALUE}: retrieve fewer memories (top_k)"
        )
