"""Converts Kafka records to tasks on conversations; used by the joiner and by rebuilds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from aiokafka import TopicPartition

from cortex_core.errors import InputError
from cortex_core.feedback_collector import DEFAULT_EXTRACTOR, FeedbackCollector
from streams.forgotten import Forgotten
from streams.joiner.conversation import Conversation, ReceivedReply
from streams.joiner.decode import Interaction, Reply, decode_interaction, decode_reply
from streams.joiner.effects import Step, Task
from streams.joiner.join import Changes, Join
from streams.kafka.topics import MAX_RECORD_BYTES, Topics
from streams.settings import Settings

RESERVED_BYTES = 1_000_000
"""Bytes of an experience that are reserved for the replies' readings. A larger interaction is refused."""


@dataclass(frozen=True, slots=True)
class Received:
    """An event and its record."""

    record: Any
    event: Interaction | Reply
    is_published: bool = False
    """Whether its experiences were published, and only Redis has lost them."""


Refuse = Callable[[Any, str], None]
"""Called with a record that cannot be joined and the reason for its dead letter."""


def read(
    records: Iterable[Any],
    topics: Topics,
    refuse: Refuse,
    *,
    store_text: bool,
    is_published: Callable[[Any], bool] = lambda _: False,
    check_model: Callable[[str], None] = lambda _model_id: None,
) -> list[Received]:
    """Decodes records of the two topics into events.

    Args:
        refuse: called for each record that is not a valid event.
        store_text: whether interactions keep the text of the user's message, if they have it.
        is_published: whether what follows from a record was published before.
        check_model: raises `InputError` for the id of a model that may not be used.
    """
    received = []
    for record in records:
        size = len(record.value or b"")
        try:
            if size > MAX_RECORD_BYTES - RESERVED_BYTES:
                raise InputError(
                    f"the event has {size} bytes; the maximum is {MAX_RECORD_BYTES - RESERVED_BYTES}"
                )
            if record.topic == topics.interactions:
                interaction = decode_interaction(record.value, store_text=store_text)
                check_model(interaction.model_id)
                event: Interaction | Reply = interaction
            else:
                event = decode_reply(record.value)
            received.append(Received(record, event, is_published(record)))
        except InputError as error:
            refuse(record, str(error))
    return received


def drop_forgotten(received: Sequence[Received], forgotten: Forgotten) -> list[Received]:
    """The events without those of forgotten conversations and models."""
    kept = []
    for it in received:
        event = it.event
        occurred = event.at if isinstance(event, Interaction) else event.occurred_at.timestamp()
        arrived = it.record.timestamp / 1000
        if forgotten.has(event.conversation_id, occurred, arrived):
            continue
        if isinstance(event, Interaction) and forgotten.has_model(event.model_id, arrived):
            continue
        kept.append(it)
    return kept


def extract_feedback(received: Sequence[Received], join: Join, refuse: Refuse) -> list[Task]:
    """Creates the task of each event; extracts the feedback of all replies in one call.

    Args:
        refuse: called for each reply whose feedback cannot be extracted.
    """
    replies = [it for it in received if isinstance(it.event, Reply)]
    try:
        read = _read(replies, join)
    except Exception:  # a single reply causes it: extract one by one to find it
        read = {}
        for it in replies:
            try:
                read |= _read([it], join)
            except InputError as error:
                refuse(it.record, str(error))
            except Exception as error:
                refuse(it.record, f"feedback extraction failed: {type(error).__name__}: {error}")
    tasks = []
    for it in received:
        arrived = it.record.timestamp / 1000
        if isinstance(it.event, Interaction):
            step: Step = partial(_interaction, join, it.event, arrived)
        elif id(it) in read:
            step = partial(_reply, join, read[id(it)], arrived)
        else:
            continue
        conversation_id = it.event.conversation_id
        tasks.append(Task(conversation_id, it.record.partition, step, is_published=it.is_published))
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
    """Creates the join from the settings.

    Args:
        extractor: replaces the settings' extractor.
    """
    name = extractor or settings.extractor
    return Join(
        window_s=settings.join_window_s,
        aggregation=settings.reward_aggregation,
        collector=FeedbackCollector(name or DEFAULT_EXTRACTOR, evidence=settings.store_text),
        store_text=settings.store_text,
    )


@dataclass(slots=True)
class EventTime:
    """Tracks event time in each partition: all events sent before it have been read."""

    topics: tuple[str, str]
    _last: dict[TopicPartition, float] = field(default_factory=dict)
    _now: dict[int, float] = field(default_factory=dict)

    def of(self, partition: int, read: Callable[[TopicPartition], tuple[bool, float | None]]) -> float:
        """The partition's event time, Unix seconds; never decreases.

        Args:
            read: returns, for a topic-partition, whether it was read to its end, and when (Unix seconds) the
                broker last reported that end.
        """
        times = []
        for topic in self.topics:
            tp = TopicPartition(topic, partition)
            is_at_end, polled_at = read(tp)
            times.append(polled_at if is_at_end and polled_at is not None else self._last.get(tp, 0.0))
        now = max(min(times), self._now.get(partition, 0.0))
        self._now[partition] = now
        return now

    def advance(self, tp: TopicPartition, timestamp_ms: int) -> None:
        """Records the broker time of the last record read: later records are not older."""
        self._last[tp] = timestamp_ms / 1000
