"""Idempotency: the event of each id is created and published once, however often the request is repeated."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from prometheus_client import Counter
from pydantic import BaseModel

from streams.inference.api import ConflictError
from streams.kafka.publisher import Publisher

R = TypeVar("R", bound=BaseModel)

IDS_REMEMBERED = 10_000
"""Maximum number of ids kept, for interactions and for replies each."""
BYTES_REMEMBERED = 24_000_000
"""Maximum size of the entries, for interactions and for replies each; about 1 KB per entry."""
OWN_BYTES = 1_000
"""Size of an entry without its answer and its event."""


ACKNOWLEDGED = Counter(
    "cortex_acknowledged_total", "Events that Kafka has acknowledged, each counted once", ["topic"]
)


@dataclass(slots=True)
class Record(Generic[R]):
    """An answer, and the event that must be acknowledged first."""

    response: R
    topic: str
    key: bytes
    value: bytes


@dataclass(slots=True)
class Entry:
    """The request of an id, and its progress."""

    fingerprint: bytes
    conversation_id: str
    made: asyncio.Future[Record[Any]] | None
    """None once the event is acknowledged, to free its memory"""
    delivery: asyncio.Task[None] | None = None
    answer: bytes = b""
    """the response as JSON, once the event is acknowledged"""
    counted: int = 0
    """size in bytes"""


class IdempotentPublisher(Generic[R]):
    """Creates and publishes the event of each id once, also for repeated and concurrent requests.

    A repeated request waits for the first one, sends the same event again if that failed, and is answered
    from memory once the event is acknowledged. Limited in number and bytes: the oldest ids are dropped.
    """

    def __init__(
        self,
        response: type[R],
        what: str,
        publisher: Publisher,
        capacity: int = IDS_REMEMBERED,
        capacity_bytes: int = BYTES_REMEMBERED,
    ) -> None:
        self._response = response
        self._what = what
        self._publisher = publisher
        self._capacity = capacity
        self._capacity_bytes = capacity_bytes
        self._bytes = 0
        # No LRUCache: the limits are a count and bytes, and an entry grows when its answer is known.
        self._entries: OrderedDict[str, Entry] = OrderedDict()

    def known(self, id_: str) -> Entry | None:
        """The entry of an id, if it is still kept."""
        return self._entries.get(id_)

    async def answer(
        self, id_: str, conversation_id: str, fingerprint: bytes, make: Callable[[], Awaitable[Record[R]]]
    ) -> R:
        """The answer of `make`, once its event is acknowledged.

        Args:
            fingerprint: short digest that distinguishes requests with the same id.

        Raises:
            ConflictError: the id was used for a different request.
            UnavailableError: Kafka did not acknowledge in time; retry with the same id.
        """
        entry = self._entries.get(id_)
        if entry is None:
            made = asyncio.ensure_future(make())
            entry = self._entries[id_] = Entry(fingerprint, conversation_id, made)
            made.add_done_callback(partial(self._made, id_, entry))
            self._forget_oldest()
        elif entry.fingerprint != fingerprint:
            raise ConflictError(
                f"{self._what} {id_!r} was used for another request: use a new id, or send the same request"
            )
        if entry.made is None:
            return self._response.model_validate_json(entry.answer)
        record: Record[R] = await asyncio.shield(entry.made)
        if entry.made is not None:
            if entry.delivery is None or _failed(entry.delivery):
                entry.delivery = self._publisher.begin(record.topic, record.key, record.value)
            await self._publisher.wait(entry.delivery)
            self._acknowledged(id_, entry, record)
        return record.response

    def _made(self, id_: str, entry: Entry, made: asyncio.Future[Record[R]]) -> None:
        if made.cancelled() or made.exception() is not None:
            if self._entries.get(id_) is entry:
                del self._entries[id_]
            return
        self._count(id_, entry, len(made.result().value))

    def _acknowledged(self, id_: str, entry: Entry, record: Record[R]) -> None:
        if entry.made is None:  # a concurrent request was first
            return
        entry.made = entry.delivery = None
        ACKNOWLEDGED.labels(record.topic.rpartition(".")[2]).inc()
        entry.answer = record.response.model_dump_json().encode()
        self._count(id_, entry, len(entry.answer))

    def _count(self, id_: str, entry: Entry, size: int) -> None:
        size += OWN_BYTES
        if self._entries.get(id_) is entry:
            self._bytes += size - entry.counted
            entry.counted = size
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        while len(self._entries) > self._capacity or self._bytes > self._capacity_bytes:
            _, oldest = self._entries.popitem(last=False)
            self._bytes -= oldest.counted


def _failed(task: asyncio.Task[None]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
