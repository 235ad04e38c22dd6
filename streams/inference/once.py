"""Idempotency: each id's event is made and published once, however often it is asked for."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from streams.inference.api import ConflictError
from streams.kafka.publisher import Publisher

R = TypeVar("R", bound=BaseModel)

IDS_REMEMBERED = 10_000
"""Interactions and replies, each, that a repetition is recognised among."""
BYTES_REMEMBERED = 24_000_000
"""Most that they take, interactions and replies each; 1 KB each as a rule."""
OWN_BYTES = 1_000
"""What an id takes beside its answer and its event."""


@dataclass(slots=True)
class Record(Generic[R]):
    """An answer, and the event that must be acknowledged before it is given."""

    response: R
    topic: str
    key: bytes
    value: bytes


@dataclass(slots=True)
class Entry:
    """One id: what was asked under it, and how far it got."""

    fingerprint: bytes
    conversation_id: str
    made: asyncio.Future[Record[Any]] | None
    """None once it is acknowledged; the rest is then all that is kept"""
    delivery: asyncio.Task[None] | None = None
    answer: bytes = b""
    """The response as JSON, once it is acknowledged"""
    counted: int = 0
    """Bytes that it counts for"""


class IdempotentPublisher(Generic[R]):
    """Makes and delivers each id's event once, however often and however concurrently it is asked for.

    A repetition waits for what is under way, sends the very same event again where that failed, and is
    answered from memory once it was acknowledged. Bounded in number and bytes: the oldest id is forgotten.
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
        self._entries: OrderedDict[str, Entry] = OrderedDict()

    def known(self, id_: str) -> Entry | None:
        """The entry of an id that is remembered."""
        return self._entries.get(id_)

    async def answer(
        self, id_: str, conversation_id: str, fingerprint: bytes, make: Callable[[], Awaitable[Record[R]]]
    ) -> R:
        """What `make` answers, once its event is acknowledged.

        Args:
            fingerprint: tells requests apart under one id; short, as it is kept.

        Raises:
            ConflictError: the id stands for another request.
            UnavailableError: Kafka did not acknowledge in time; repeat with the same id.
        """
        entry = self._entries.get(id_)
        if entry is None:
            made = asyncio.ensure_future(make())
            entry = self._entries[id_] = Entry(fingerprint, conversation_id, made)
            made.add_done_callback(partial(self._made, id_, entry))
            self._forget_oldest()
        elif entry.fingerprint != fingerprint:
            raise ConflictError(
                f"{self._what} {id_!r} was used for another request; take a new id, or send the same request"
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
        if entry.made is None:  # another one waited, too
            return
        entry.made = entry.delivery = None
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
