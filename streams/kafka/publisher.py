"""Events to Kafka, each acknowledged by all in-sync replicas, and a producer that is replaced when it breaks.

    publisher = Publisher(settings, on_state)
    await publisher.start()                          # waits until Kafka answers
    delivery = publisher.begin(topic, key, value)    # handed over; goes on whatever the caller does
    await publisher.wait(delivery)                   # acknowledged, or UnavailableError
    await publisher.send(messages)                   # many, in whole Kafka batches, and waits for all
    await publisher.stop()

What a failure means, and what is done:

* No acknowledgement within `publish_timeout_s`: the event may or may not get there; its delivery goes on.
  Until the brokers answer again, `away` says why and callers should not begin anything.
* A refusal for good, as of a password or a permission: `begin` and `until_refused` raise a `ConfigError`.
* Any other failure: the producer is replaced. An idempotent producer numbers its batches, and one that was
  given up leaves a gap after which the broker refuses all later ones (OutOfOrderSequenceNumber).
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
from streams.failures import answered, configuration_error
from streams.kafka.clients import start, stop
from streams.kafka.topics import MAX_RECORD_BYTES, create_topics
from streams.settings import Settings

log = structlog.get_logger(__name__)

MAX_VALUE = MAX_RECORD_BYTES - 10_000
"""Bytes; the rest is left for the key and the batch's own overhead."""

ACK_S = Histogram(
    "cortex_publish_seconds", "From handing an event or a batch to Kafka to its acknowledgement", ["topic"]
)
REPLACED = Counter("cortex_producer_replaced_total", "Producers that broke and were replaced")


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
            on_state: told why Kafka does not answer, or None when it does.
        """
        self.settings = settings
        self.away: str | None = "not connected yet"
        """Why nothing can be published at the moment; None when it can."""
        self._on_state = on_state or (lambda _why: None)
        self._producer: AIOKafkaProducer | None = None
        self._partitioner = DefaultPartitioner()
        self._deliveries: set[asyncio.Task[None]] = set()
        self._broken = False
        self._late = 0
        self._trouble = asyncio.Event()
        self._refused: ConfigError | None = None
        self._refusal = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Creates missing topics and connects; waits for a broker that is away.

        Raises:
            ConfigError: topics exist that do not fit.
        """
        self._producer = await self._connect()
        self._say(None)
        self._keeper = asyncio.create_task(self._keep())

    async def stop(self, timeout_s: float = 2.0) -> None:
        """Gives deliveries under way a last chance, then closes; safe to call twice."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        self.away = "this service is stopping"
        await self._close(timeout_s)

    def begin(self, topic: str, key: bytes, value: bytes) -> asyncio.Task[None]:
        """Hands an event over. The task ends when it is acknowledged, or raises `UnavailableError`.

        Raises:
            UnavailableError: Kafka is away; nothing was handed over.
            ConfigError: Kafka refuses this process for good; nothing was handed over.
            InputError: larger than a record may be.
        """
        producer = self._usable()
        _check_size(value)
        return self._deliver(producer, topic, partial(producer.send, topic, value=value, key=key))

    async def wait(self, delivery: asyncio.Task[None]) -> None:
        """Returns once it is acknowledged. Giving up waiting does not stop the delivery.

        Raises:
            UnavailableError: not within `publish_timeout_s`, or the delivery failed.
            ConfigError: Kafka refuses this process for good.
        """
        done, _ = await asyncio.wait({delivery}, timeout=self.settings.publish_timeout_s)
        if not done:
            self._suspect(
                f"Kafka at {self.settings.kafka_address} did not acknowledge within "
                f"{self.settings.publish_timeout_s:g} s"
            )
            raise UnavailableError(
                f"{self.away}; the event may or may not be there: repeat it with the same id"
            )
        if delivery.cancelled():
            raise UnavailableError("the connection to Kafka was lost meanwhile: repeat with the same id")
        delivery.result()

    async def send(self, messages: Iterable[Message]) -> None:
        """Hands over messages together, and returns once all are acknowledged.

        They go as whole Kafka batches, one after the other for each partition: much cheaper than one by one.

        Raises:
            UnavailableError, InputError: as `begin` and `wait`; some messages may be there nonetheless.
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
        """Waits until Kafka refuses this process for good, if it ever does.

        Raises:
            ConfigError: it does.
        """
        await self._refusal.wait()
        assert self._refused is not None
        raise self._refused

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
            place = topic, self._partitioner(key, partitions[topic], [])
            its_batches = batches.setdefault(place, [])
            record = {"timestamp": None, "key": key, "value": value, "headers": [*headers]}
            if not its_batches or its_batches[-1].append(**record) is None:
                its_batches.append(producer.create_batch())
                its_batches[-1].append(**record)
        return batches

    def _usable(self) -> AIOKafkaProducer:
        if self._refused is not None:
            raise self._refused
        if self.away is not None or self._producer is None:
            raise UnavailableError(self.away or "not connected yet")
        return self._producer

    def _deliver(
        self, producer: AIOKafkaProducer, topic: str, hand_over: Callable[[], Awaitable[Awaitable[Any]]]
    ) -> asyncio.Task[None]:
        async def deliver() -> None:
            with self._explained(producer), ACK_S.labels(topic.rpartition(".")[2]).time():
                await (await hand_over())
            self._late = 0

        task = asyncio.create_task(deliver())
        self._deliveries.add(task)
        task.add_done_callback(self._delivered)
        return task

    @contextlib.contextmanager
    def _explained(self, producer: AIOKafkaProducer) -> Iterator[None]:
        """Turns what the producer raises into our errors, and has it replaced."""
        try:
            yield
        except (KafkaError, OSError) as error:
            if refused := configuration_error(error, self.settings):
                self._refuse(refused)
                raise refused from error
            why = f"Kafka at {self.settings.kafka_address} refused an event ({answered(error)})"
            if producer is self._producer:
                self._broken = True
                self._suspect(why)
            if isinstance(error, MessageSizeTooLargeError):
                raise InputError(
                    f"{why}: retrieve fewer memories (top_k), or raise max.message.bytes"
                ) from error
            raise UnavailableError(why) from error

    def _delivered(self, task: asyncio.Task[None]) -> None:
        self._deliveries.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited for it may be gone

    def _suspect(self, why: str) -> None:
        self._late += 1
        if self._late > 1 and self.away is None:
            # The brokers answer, yet nothing has been acknowledged since the last time it was late.
            self._broken = True
        self._say(why)
        self._trouble.set()

    def _refuse(self, error: ConfigError) -> None:
        self._refused = error
        self._refusal.set()
        self._say(str(error))

    def _say(self, why: str | None) -> None:
        if why is not None and self.away is None:
            log.warning("kafka away", why=why)
        elif why is None and self.away is not None:
            log.info("kafka answers", address=self.settings.kafka_address)
        self.away = why
        self._on_state(why)

    async def _keep(self) -> None:
        """Brings the producer back whenever something went wrong."""
        while self._refused is None:
            await self._trouble.wait()
            self._trouble.clear()
            try:
                await retry(self._probe, self.settings, lambda _, why: self._say(why))
                if self._broken:
                    REPLACED.inc()
                    await self._close(1.0)
                    self._producer = await self._connect()
            except ConfigError as error:
                self._refuse(error)
            else:
                self._say(None)

    async def _probe(self) -> None:
        """Returns when the brokers answer, or the producer is to be replaced anyway."""
        if not self._broken:
            assert self._producer is not None
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                await self._producer.client.fetch_all_metadata()

    async def _connect(self) -> AIOKafkaProducer:
        async def attempt() -> AIOKafkaProducer:
            await create_topics(self.settings)
            producer = AIOKafkaProducer(
                **kafka_client_options(self.settings),
                acks="all",
                enable_idempotence=True,
                # While one batch is under way the next one fills by itself: lingering would only add delay.
                linger_ms=0,
                max_batch_size=1_000_000,
                partitioner=self._partitioner,
                max_request_size=MAX_RECORD_BYTES,
            )
            async with asyncio.timeout(10.0):
                return await start(producer)

        self._broken, self._late = False, 0
        return await retry(attempt, self.settings, lambda _, why: self._say(why))

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
