"""From Kafka's records to what happens to a conversation; shared by live joining and rebuilds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from aiokafka import TopicPartition

from cortex_core.errors import InputError
from cortex_core.feedback_collector import DEFAULT_EXTRACTOR, FeedbackCollector
from streams.joiner.conversation import Conversation, ReceivedReply
from streams.joiner.decode import Interaction, Reply, decode_interaction, decode_reply
from streams.joiner.effects import Step, Task
from streams.joiner.join import Changes, Join
from streams.kafka.topics import MAX_RECORD_BYTES, Topics
from streams.settings import Settings

ROOM = 1_000_000
"""Bytes left in an experience for the replies' readings: a larger interaction is refused."""


@dataclass(frozen=True, slots=True)
class Received:
    """An event, and the record that it came in."""

    record: Any
    event: Interaction | Reply


Refuse = Callable[[Any, str], None]
"""Takes a record that cannot be joined, and the reason for its dead letter."""


def read(records: Iterable[Any], topics: Topics, refuse: Refuse, *, store_text: bool) -> list[Received]:
    """The events in records of the two topics.

    Args:
        store_text: whether interactions keep the user's message, where they have it.
    """
    received = []
    for record in records:
        size = len(record.value or b"")
        try:
            if size > MAX_RECORD_BYTES - ROOM:
                raise InputError(
                    f"the event has {size} bytes, at most {MAX_RECORD_BYTES - ROOM} can be joined"
                )
            if record.topic == topics.interactions:
                event = decode_interaction(record.value, store_text=store_text)
                received.append(Received(record, event))
            else:
                received.append(Received(record, decode_reply(record.value)))
        except InputError as error:
            refuse(record, str(error))
    return received


def extract_feedback(received: Sequence[Received], join: Join, refuse: Refuse) -> list[Task]:
    """What each event does to its conversation; the replies are read for what they say, once and for good."""
    replies = [it for it in received if isinstance(it.event, Reply)]
    try:
        read = _read(replies, join)
    except Exception:  # one of them; which one is found by reading them one by one
        read = {}
        for it in replies:
            try:
                read |= _read([it], join)
            except InputError as error:
                refuse(it.record, str(error))
            except Exception as error:
                refuse(it.record, f"reading it failed: {type(error).__name__}: {error}")
    tasks = []
    for it in received:
        arrived = it.record.timestamp / 1000
        if isinstance(it.event, Interaction):
            step: Step = partial(_interaction, join, it.event, arrived)
        elif id(it) in read:
            step = partial(_reply, join, read[id(it)], arrived)
        else:
            continue
        tasks.append(Task(it.event.conversation_id, it.record.partition, step))
    return tasks


def _read(replies: Sequence[Received], join: Join) -> dict[int, ReceivedReply]:
    events = [it.event for it in replies if isinstance(it.event, Reply)]
    return dict(zip(map(id, replies), join.read(events), strict=True))


def _interaction(
    join: Join, event: Interaction, arrived: float, conversation: Conversation, changes: Changes
) -> None:
    join.on_interaction(conversation, event, arrived, changes)


def _reply(
    join: Join, reply: ReceivedReply, arrived: float, conversation: Conversation, changes: Changes
) -> None:
    join.on_reply(conversation, reply, arrived, changes)


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
