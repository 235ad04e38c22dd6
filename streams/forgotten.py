"""Forgotten conversations and models: their events up to a time are never joined again, however often they
are read.

The records are on the compacted control topic, so that they outlive Redis and each joiner. That of a
conversation contains a digest of its id, not the id:

    key                             value
    ["<digest>", "forget"]          ForgetEvent
    ["<model_id>", "forget-model"]  ControlEvent of the action "forget", then "forgotten"

Joiners follow the topic (`ForgottenFollower`); rebuilds and audits read it once (`read_forgotten`).
`streams.joiner.forget` writes it and erases what Redis has.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any

from aiokafka import AIOKafkaProducer

from cortex_core.errors import InputError
from streams.connections import kafka_client_options
from streams.events import ControlEvent, ForgetEvent, parse
from streams.kafka.clients import started
from streams.kafka.follower import StateFollower
from streams.kafka.reader import reading, records_to_end
from streams.kafka.topics import Topics
from streams.settings import Settings

_SUBJECT = b', "forget"]'
"""The end of the keys of these records; those of operator commands for models end otherwise."""


def digest(conversation_id: str) -> str:
    """SHA-256 of a conversation's id, in hexadecimal."""
    return hashlib.sha256(conversation_id.encode()).hexdigest()


def is_forget(key: bytes | None) -> bool:
    """Whether a record of the control topic is about a conversation, by its key."""
    return (key or b"").endswith(_SUBJECT)


class Forgotten:
    """The forgotten conversations and models, about 200 bytes each."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}
        self.models: dict[str, float] = {}
        """Model → Unix seconds when it was last forgotten."""

    def add(self, record: Any) -> bool:
        """Adds a record of the control topic; returns whether it is of a conversation.

        Raises:
            InputError: it is not a valid record.
        """
        if record.value is None:
            return False
        if is_forget(record.key):
            event = parse(ForgetEvent, record.value)
            until = event.occurred_at.timestamp()
            self._until[event.conversation] = max(until, self._until.get(event.conversation, until))
            return True
        if b'"forg' in record.value:
            control = parse(ControlEvent, record.value)
            # From the request on: a joiner knows before the trainer erases what it has written.
            if control.action in ("forget", "forgotten"):
                self.models[control.model_id] = control.occurred_at.timestamp()
        return False

    def has_model(self, model_id: str, arrived: float) -> bool:
        """Whether an interaction must not be joined, because its model was forgotten after it was sent."""
        return arrived < self.models.get(model_id, 0.0)

    def until(self, conversation_id: str) -> float | None:
        """The time up to which a conversation is forgotten, Unix seconds; None: it is not."""
        return self._until.get(digest(conversation_id)) if self._until else None

    def has(self, conversation_id: str, occurred: float, arrived: float) -> bool:
        """Whether an event must not be joined, because its conversation was forgotten.

        Args:
            occurred: its time, Unix seconds.
            arrived: when it was sent, Unix seconds.
        """
        until = self.until(conversation_id)
        return until is not None and min(occurred, arrived) <= until


async def send_forget(settings: Settings, conversation_id: str, now: datetime) -> int:
    """Records that a conversation's events up to `now` are forgotten; returns the offset of the record.

    Raises:
        KafkaError, OSError: the broker does not answer.
    """
    event = ForgetEvent(occurred_at=now, conversation=digest(conversation_id))
    key = json.dumps([event.conversation, "forget"]).encode()
    async with started(
        AIOKafkaProducer(**kafka_client_options(settings), enable_idempotence=True)
    ) as producer:
        sent = await producer.send_and_wait(
            Topics.of(settings).control, event.to_bytes(), key=key, partition=0
        )
    return int(sent.offset)


async def read_forgotten(settings: Settings) -> Forgotten:
    """All forgotten conversations and models at the time of the call.

    Raises:
        UnavailableError, KafkaError, OSError: the broker does not answer.
    """
    forgotten = Forgotten()
    async with reading(settings, [Topics.of(settings).control]) as consumer:
        async for record in records_to_end(consumer, settings):
            with contextlib.suppress(InputError):  # refused and logged by the followers
                forgotten.add(record)
    return forgotten


class ForgottenFollower(StateFollower):
    """Follows what is forgotten."""

    def __init__(self, settings: Settings, on_forget: Callable[[], Awaitable[None]]) -> None:
        """
        Args:
            on_forget: awaited after each new conversation, which `forgotten` then has.
        """
        super().__init__(settings, Topics.of(settings).control, None)
        self.forgotten = Forgotten()
        self._on_forget = on_forget

    @property
    def position(self) -> int:
        """Offset of the next record: all before it are in `forgotten`, and `on_forget` has returned."""
        return sum(self._topic.positions.values())  # the topic has one partition

    async def _add(self, record: Any) -> None:
        if self.forgotten.add(record):
            await self._on_forget()
