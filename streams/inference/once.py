"""Idempotency: each id's event is made and published once, however often it is asked for."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from streams.events import Float16Array
from streams.inference.api import (
    ConflictError,
    DecideResponse,
    ReplyResponse,
)
from streams.kafka.publisher import Publisher

R = TypeVar("R", DecideResponse, ReplyResponse)


RECENT = 10_000
"""Interactions and replies, each, that a repetition is recognised among; about 5 KB each."""


@dataclass(slots=True)
class Record(Generic[R]):
    """An answer, and the event that must be acknowledged before it is given."""

    response: R
    topic: str
    key: bytes
    value: bytes
    message: Float16Array | None = None
    """(D,) of the user's message; of interactions"""


@dataclass(slots=True)
class Entry(Generic[R]):
    """One id: what was asked under it, and how far it got."""

    fingerprint: bytes
    conversation_id: str
    made: asyncio.Future[Record[R]]
    delivery: asyncio.Task[None] | None = None
    acknowledged: bool = False


class IdempotentPublisher(Generic[R]):
    """Makes and delivers each id's event once, however often and however concurrently it is asked for.

    A repetition waits for what is under way, sends the very same event again where that failed, and is
    answered from memory once it was acknowledged. Bounded: the oldest id is forgotten.
    """

    def __init__(self, what: str, publisher: Publisher, capacity: int = RECENT) -> None:
        self._what = what
        self._publisher = publisher
        self._capacity = capacity
        self._entries: OrderedDict[str, Entry[R]] = OrderedDict()

    def known(self, id_: str) -> Entry[R] | None:
        """The entry of an id that is remembered."""
        return self._entries.get(id_)

    async def answer(
        self, id_: str, conversation_id: str, fingerprint: bytes, make: Callable[[], Awaitable[Record[R]]]
    ) -> R:
        """What `make` answers, once its event is acknowledged.

        Raises:
            ConflictError: the id stands for another request.
            UnavailableError: Kafka did not acknowledge in time; repeat with the same id.
        """
        entry = self._entries.get(id_)
        if entry is None:
            entry = self._entries[id_] = Entry(fingerprint, conversation_id, asyncio.ensure_future(make()))
            entry.made.add_done_callback(lambda made: self._forget_failed(id_, made))
            while len(self._entries) > self._capacity:
                self._entries.popitem(last=False)
        elif entry.fingerprint != fingerprint:
            raise ConflictError(
                f"{self._what} {id_!r} was used for another request; take a new id, or send the same request"
            )
        record = await asyncio.shield(entry.made)
        if not entry.acknowledged:
            if entry.delivery is None or _failed(entry.delivery):
                entry.delivery = self._publisher.begin(record.topic, record.key, record.value)
            await self._publisher.wait(entry.delivery)
            entry.acknowledged, entry.delivery, record.value = True, None, b""
        return record.response

    def _forget_failed(self, id_: str, made: asyncio.Future[Record[R]]) -> None:
        if made.cancelled() or made.exception() is not None:
            self._entries.pop(id_, None)


def _failed(task: asyncio.Task[None]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)
