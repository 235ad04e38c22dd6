"""Dead letters: creates, lists and retries them."""

from __future__ import annotations

import base64
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from aiokafka import AIOKafkaProducer, TopicPartition

from cortex_core.errors import InputError, shown
from streams.connections import kafka_client_options
from streams.events import DeadLetter, parse
from streams.kafka.clients import started
from streams.kafka.publisher import MAX_VALUE
from streams.kafka.reader import reading, records_to_end
from streams.kafka.topics import MAX_RECORD_BYTES, Topics, create_topics

if TYPE_CHECKING:
    from streams.settings import Settings


@dataclass(frozen=True, slots=True)
class Retried:
    """The result of a retry."""

    sent: list[str]
    """Ids of the letters whose bytes were sent to their original topic with their original key."""
    unknown: list[str]
    """Ids without a dead letter."""
    lost: list[str]
    """Ids of the letters that were too large to copy and whose records have been deleted by retention."""
    refused: dict[str, str]
    """Id → reason, of the letters that no worker can have written: nothing is sent."""


async def list_dead_letters(settings: Settings, limit: int | None = 100) -> list[DeadLetter]:
    """The newest `limit` dead letters (None: all), oldest first, without duplicates."""
    settings = settings.resolved()
    await create_topics(settings)
    letters: dict[str, DeadLetter] = {}
    tp = TopicPartition(Topics.of(settings).dead_letters, 0)
    async with reading(settings, [tp.topic]) as reader:
        if limit is not None:
            end = (await reader.end_offsets([tp]))[tp]
            start = (await reader.beginning_offsets([tp]))[tp]
            # A joiner that crashed may have written some of them twice, so read more than `limit`.
            reader.seek(tp, max(start, end - 2 * limit - 1000))
        async for record in records_to_end(reader, settings):
            try:
                letter = parse(DeadLetter, record.value)
            except InputError:  # of a newer schema version
                continue
            letters.setdefault(letter.dead_letter_id, letter)
    found = list(letters.values())
    return found if limit is None else found[len(found) - min(limit, len(found)) :]


async def retry_dead_letters(settings: Settings, ids: Collection[str] | None = None) -> Retried:
    """Sends the raw bytes of dead letters (None: of all) to their topics again.

    The letters remain. A record that still cannot be processed becomes another dead letter; an event that was
    joined meanwhile is a duplicate, which changes nothing.
    """
    settings = settings.resolved()
    topics = Topics.of(settings)
    letters = {letter.dead_letter_id: letter for letter in await list_dead_letters(settings, None)}
    wanted = list(letters) if ids is None else [i for i in dict.fromkeys(ids) if i in letters]
    lost: list[str] = []
    sent: list[str] = []
    refused: dict[str, str] = {}
    client = AIOKafkaProducer(
        **kafka_client_options(settings),
        acks="all",
        enable_idempotence=True,
        max_request_size=MAX_RECORD_BYTES,
    )
    async with started(client) as producer:
        for letter_id in wanted:
            letter = letters[letter_id]
            try:
                key, value = _record_of(letter, topics)
            except InputError as error:
                refused[letter_id] = str(error)
                continue
            if letter.raw_at_source:
                value = await _at_source(settings, letter)
                if value is None:
                    lost.append(letter_id)
                    continue
            await producer.send_and_wait(letter.topic, value, key=key)
            sent.append(letter_id)
    return Retried(sent, [] if ids is None else [i for i in ids if i not in letters], lost, refused)


def _record_of(letter: DeadLetter, topics: Topics) -> tuple[bytes | None, bytes | None]:
    """Key and value of the record that a letter is about.

    Raises:
        InputError: the letter was not written by a worker: its bytes are not base64, or workers do not read
            its topic.
    """
    expected = (topics.interactions, topics.replies, topics.experiences)
    if letter.topic not in expected:
        raise InputError(f"its topic is {shown(letter.topic)}, expected {', '.join(expected)}")
    fields = {"key": letter.key, "raw": letter.raw}
    decoded: dict[str, bytes | None] = {}
    for name, text in fields.items():
        try:
            decoded[name] = None if text is None else base64.b64decode(text, validate=True)
        except ValueError as error:
            raise InputError(f"{name} is {shown(text)}, expected base64 ({error})") from error
    return decoded["key"], decoded["raw"]


async def _at_source(settings: Settings, letter: DeadLetter) -> bytes | None:
    tp = TopicPartition(letter.topic, letter.partition)
    async with reading(settings, start={tp: 0}, committed_only=False) as reader:
        if letter.offset < (await reader.beginning_offsets([tp]))[tp]:
            return None
        reader.seek(tp, letter.offset)
        async for record in records_to_end(reader, settings):
            return bytes(record.value) if record.offset == letter.offset else None
    return None


def dead_letter(record: Any, reason: str) -> DeadLetter:
    """The dead letter of a record; a function of the record and the reason alone."""
    raw = base64.b64encode(record.value or b"").decode()
    fits = len(raw) < MAX_VALUE - 20_000
    return DeadLetter(
        occurred_at=_moment(record.timestamp),
        dead_letter_id=f"{record.topic}-{record.partition}-{record.offset}",
        reason=reason[:8000],
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        key=None if record.key is None else base64.b64encode(record.key).decode(),
        raw=raw if fits else "",
        raw_at_source=not fits,
        worker="joiner",
    )


def _moment(timestamp_ms: int) -> datetime:
    """A record's timestamp, which its producer may have set to any number; 1970 if it is no date."""
    try:
        return datetime.fromtimestamp(timestamp_ms / 1000, UTC)
    except (ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(0, UTC)
