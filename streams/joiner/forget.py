"""Erases a conversation: records that it is forgotten, then deletes what Redis has of it.

    forgot = await forget(settings, "c-42")

The order matters. Once the record is on the control topic, each joiner leaves out the conversation's events
and what it has cached of it, and its heartbeat says that it has read the record. Only then is Redis erased:
no joiner writes the conversation again. Rebuilds are locked out meanwhile, and honour the record later.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from streams.connections import async_redis_client, redis_client
from streams.events import utc_now
from streams.forgotten import send_forget
from streams.heartbeats import BEAT_S, read_heartbeats
from streams.joiner.conversation import INTERACTION
from streams.joiner.rebuild import locked
from streams.joiner.states import RedisStates
from streams.kafka.topics import MAX_PARTITIONS, create_topics, retention
from streams.replay_store import CHUNK, RedisReplayBuffer, decode, index_key, model_ids
from streams.trail import Trail

if TYPE_CHECKING:
    import redis
    import redis.asyncio

    from streams.settings import Settings

CONFIRM_S = 30.0
"""Seconds to wait until all joiners have read the record."""


@dataclass(slots=True)
class Forgot:
    """What was erased, and what remains."""

    until: datetime
    """Events that occurred or arrived before are forgotten; later ones are joined as those of a new one."""
    entries: dict[str, int] = field(default_factory=dict)
    """Number of erased replay entries, by model."""
    had_state: bool = False
    """Whether the joiners' state had the conversation."""
    unconfirmed: list[str] = field(default_factory=list)
    """Joiners that have not confirmed: they may write the conversation again. Then forget it again."""
    kept: dict[str, datetime | None] = field(default_factory=dict)
    """Topic → when Kafka deletes its last record of the conversation, at the earliest; None: never."""


class _Interaction(Struct):
    conversation_id: str = ""


class _Entry(Struct):
    interaction: _Interaction = msgspec.field(default_factory=_Interaction)


_entry = msgspec.json.Decoder(_Entry)


def _conversation_of(value: bytes) -> str:
    """The conversation of a stored entry; empty if it has none."""
    with contextlib.suppress(msgspec.DecodeError):
        return _entry.decode(decode(value)[1]).interaction.conversation_id
    return ""


async def forget(settings: Settings, conversation_id: str, *, confirm_s: float = CONFIRM_S) -> Forgot:
    """Forgets all events of a conversation up to now; safe to repeat.

    Raises:
        UnavailableError: a rebuild is running.
        redis.RedisError, KafkaError, OSError: a server does not answer.
    """
    settings = settings.resolved()
    await create_topics(settings)
    async with async_redis_client(settings) as client, locked(settings, client) as extend_lock:
        forgot = Forgot(utc_now())
        offset = await send_forget(settings, conversation_id, forgot.until)
        forgot.unconfirmed = await _unconfirmed(settings, client, offset, confirm_s)
        await extend_lock()
        interaction_ids = await _erase_state(settings, client, conversation_id)
        forgot.had_state = interaction_ids is not None
        with redis_client(settings) as store:
            for model_id in await asyncio.to_thread(model_ids, store, settings.topic_prefix):
                erased = await asyncio.to_thread(
                    _erase_entries, settings, store, model_id, conversation_id, interaction_ids or ()
                )
                if erased:
                    forgot.entries[model_id] = erased
                await extend_lock()
    for topic, kept in (await retention(settings)).items():
        forgot.kept[topic] = None if kept is None else forgot.until + kept
    return forgot


async def _unconfirmed(
    settings: Settings, client: redis.asyncio.Redis, offset: int, confirm_s: float
) -> list[str]:
    """Waits until all joiners have read the record at this offset; returns those that have not in time."""
    deadline = asyncio.get_running_loop().time() + confirm_s
    while True:
        joiners = [
            seen.heartbeat
            for seen in await read_heartbeats(client, settings.topic_prefix)
            if seen.heartbeat.kind == "joiner" and not seen.is_missing
        ]
        waiting = [it.name for it in joiners if it.activity.control_position <= offset]
        if not waiting or asyncio.get_running_loop().time() > deadline:
            return waiting
        await asyncio.sleep(BEAT_S / 4)


async def _erase_state(
    settings: Settings, client: redis.asyncio.Redis, conversation_id: str
) -> list[str] | None:
    """Erases the joiners' state; returns the ids of its interactions, or None if there was none."""
    states = RedisStates(
        client, settings.topic_prefix, settings.join_window_s, Trail(client, settings.topic_prefix)
    )
    key = states.key(conversation_id)
    pipe = client.pipeline(transaction=True)
    pipe.hkeys(key)
    pipe.delete(key)
    for partition in range(MAX_PARTITIONS):
        pipe.zrem(states.due_key(partition), conversation_id)
    fields: Any = (await pipe.execute())[0]
    names = [name.decode() for name in fields]
    return [name[2:] for name in names if name.startswith(INTERACTION)] if names else None


def _erase_entries(
    settings: Settings, client: redis.Redis, model_id: str, conversation_id: str, known: Iterable[str]
) -> int:
    """Erases a model's replay entries; returns their number.

    Args:
        known: interactions of the conversation, of which replay may keep only that they were removed.
    """
    buffer = RedisReplayBuffer.of(settings, model_id, client)
    keys = buffer.keys
    found = [
        entry_id
        for entry_id, value in buffer.raw_values(buffer.ids())
        if value is not None and _conversation_of(value) == conversation_id
    ]
    ids = [*found, *known]
    for start in range(0, len(ids), CHUNK):
        chunk = ids[start : start + CHUNK]
        pipe = client.pipeline(transaction=True)
        pipe.hdel(keys.entries, *chunk)
        pipe.zrem(keys.order, *chunk)
        pipe.hdel(keys.removed, *chunk)
        pipe.delete(*(index_key(settings.topic_prefix, entry_id) for entry_id in chunk))
        pipe.execute()
    return len(found)
