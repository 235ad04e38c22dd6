"""From Kafka's records to what happens to a conversation; shared by live joining and rebuilds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from aiokafka import TopicPartition

from cortex_core.errors import InputError
from cortex_core.feedback_collector import DEFAULT_EXTRACTOR, FeedbackCollector
from streams.events import InteractionEvent, ReplyEvent, parse
from streams.joiner.conversation import Conversation
from streams.joiner.effects import Step
from streams.joiner.join import Changes, Join
from streams.kafka.topics import MAX_RECORD_BYTES, Topics
from streams.settings import Settings

ROOM = 1_000_000
"""Bytes left in an experience for the replies' readings: a larger interaction is refused."""


@dataclass(frozen=True, slots=True)
class Read:
    """A record that could be read."""

    conversation_id: str
    occurred_at: datetime
    step: Step
    """What it does to its conversation."""


def read_record(join: Join, topics: Topics, record: Any) -> Read:
    """Reads an interaction or a reply.

    Raises:
        InputError: it cannot be read; the message is the reason for its dead letter.
    """
    size = len(record.value or b"")
    if size > MAX_RECORD_BYTES - ROOM:
        raise InputError(f"the event has {size} bytes, at most {MAX_RECORD_BYTES - ROOM} can be joined")
    arrived = record.timestamp / 1000
    if record.topic == topics.interactions:
        event = parse(InteractionEvent, record.value)

        def interaction(conversation: Conversation, changes: Changes) -> None:
            join.on_interaction(conversation, event, arrived, changes)

        return Read(event.conversation_id, event.occurred_at, interaction)
    said = parse(ReplyEvent, record.value)
    [heard] = join.read([said])

    def reply(conversation: Conversation, changes: Changes) -> None:
        join.on_reply(conversation, heard, arrived, changes)

    return Read(said.conversation_id, said.occurred_at, reply)


def make_join(settings: Settings, extractor: str | None = None) -> Join:
    """The join as the settings ask for it."""
    name = extractor or settings.extractor
    return Join(
        window_s=settings.join_window_s,
        aggregation=settings.reward_aggregation,
        collector=FeedbackCollector(name or DEFAULT_EXTRACTOR, evidence=settings.store_text),
        store_text=settings.store_text,
    )


@dataclass(slots=True)
class EventTime:
    """How far event time has come in each partition, by what was read and when."""

    topics: tuple[str, str]
    _last: dict[TopicPartition, float] = field(default_factory=dict)
    _now: dict[int, float] = field(default_factory=dict)

    def of(self, partition: int, read: Callable[[TopicPartition], tuple[bool, float | None]]) -> float:
        """Unix seconds; never less than at the call before.

        Args:
            read: for a topic-partition: whether all of it has been read, and when the broker last said so.
        """
        times = []
        for topic in self.topics:
            tp = TopicPartition(topic, partition)
            is_at_end, asked_at = read(tp)
            times.append(asked_at if is_at_end and asked_at is not None else self._last.get(tp, 0.0))
        now = max(min(times), self._now.get(partition, 0.0))
        self._now[partition] = now
        return now

    def saw(self, tp: TopicPartition, timestamp_ms: int) -> None:
        """A record was read; broker time is all that is known of what lies behind it."""
        self._last[tp] = timestamp_ms / 1000
