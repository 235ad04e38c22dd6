"""Where the state of conversations is kept: the port, in memory (rebuild), and in Redis (the joiner)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from cachetools import LRUCache

from streams.joiner.conversation import LATE_S, PENDING, Conversation

if TYPE_CHECKING:
    import redis.asyncio

CACHE_BYTES = 64_000_000
"""Conversations of the partitions it owns that a joiner keeps in memory, beside Redis."""


DUE_AT_ONCE = 500
"""Conversations that one round of the timer takes."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A conversation as it was read, and the version that a write must still find."""

    version: int
    conversation: Conversation
    is_cached: bool = False
    """Whether this process wrote it. Else a worker may have died before it noted what is due."""


@dataclass(frozen=True, slots=True)
class Save:
    """A conversation on its way back into its store."""

    conversation_id: str
    partition: int
    before: Stored
    after: Conversation
    version: int
    """Of `after`; higher than the one before, and higher than any that has been lost."""
    due: float | None


class States(Protocol):
    """Where conversations are kept."""

    async def load(self, ids: Iterable[str]) -> dict[str, Stored]:
        """Every id's conversation, an empty one where none is kept."""

    async def save(self, saves: Sequence[Save]) -> set[str]:
        """Writes; returns the ids whose version was no longer the one read: those are not written, and the
        next `load` reads them anew."""

    def written(self, saves: Iterable[Save]) -> None:
        """The experiences that these conversations had pending are in replay, and published."""

    async def due(self, partition: int, now: float) -> list[str]:
        """Conversations of a partition with something to close, earliest first, up to `DUE_AT_ONCE`."""

    async def postpone(self, partition: int, conversation_id: str, until: float) -> None:
        """The conversation is due no earlier than this."""


class MemoryStates:
    """Conversations of one process; what a rebuild uses."""

    def __init__(self) -> None:
        self.conversations: dict[str, Stored] = {}
        self._due: dict[int, dict[str, float]] = {}

    async def load(self, ids: Iterable[str]) -> dict[str, Stored]:
        return {i: self.conversations.get(i) or Stored(0, Conversation()) for i in ids}

    async def save(self, saves: Sequence[Save]) -> set[str]:
        for save in saves:
            if save.after.is_empty:
                self.conversations.pop(save.conversation_id, None)
            else:
                self.conversations[save.conversation_id] = Stored(save.version, save.after)
            due = self._due.setdefault(save.partition, {})
            # A conversation with nothing open still has to be forgotten one day.
            last = max((i.until for i in save.after.interactions.values()), default=None)
            at = save.due if save.due is not None or last is None else last + LATE_S
            if at is None:
                due.pop(save.conversation_id, None)
            else:
                due[save.conversation_id] = at
        return set()

    def written(self, saves: Iterable[Save]) -> None:
        for save in saves:
            save.after.pending.clear()

    def partitions(self) -> dict[str, int]:
        """The partition of each conversation."""
        return {i: partition for partition, due in self._due.items() for i in due}

    async def due(self, partition: int, now: float) -> list[str]:
        due = self._due.get(partition, {})
        return sorted((i for i, at in due.items() if at <= now), key=lambda i: (due[i], i))[:DUE_AT_ONCE]

    async def postpone(self, partition: int, conversation_id: str, until: float) -> None:
        self._due.setdefault(partition, {})[conversation_id] = until


# KEYS: the conversation. ARGV: version wanted, new version, milliseconds to live (0: for ever; -1: it is
# deleted), number of fields to delete, those, then field, value … to set.
SAVE = """
local key = KEYS[1]
if (redis.call('HGET', key, 'v') or '0') ~= ARGV[1] then return 0 end
if ARGV[3] == '-1' then redis.call('DEL', key) return 1 end
local gone = tonumber(ARGV[4])
redis.call('HSET', key, 'v', ARGV[2]) -- first: a full Redis refuses it, and then nothing is half done
for i = 5, 4 + gone do redis.call('HDEL', key, ARGV[i]) end
for i = 5 + gone, #ARGV, 2 do redis.call('HSET', key, ARGV[i], ARGV[i+1]) end
if ARGV[3] ~= '0' then redis.call('PEXPIRE', key, ARGV[3]) else redis.call('PERSIST', key) end
return 1
"""

# KEYS: the conversation. ARGV: its version, the field of what was pending.
WRITTEN = """
if redis.call('HGET', KEYS[1], 'v') == ARGV[1] then redis.call('HDEL', KEYS[1], ARGV[2]) end
"""


class _Cache(LRUCache[str, Stored]):
    """The conversations used last, up to so many bytes; tells which one leaves."""

    def __init__(self, size: int, evicted: Callable[[str, Stored], None]) -> None:
        super().__init__(size, getsizeof=lambda stored: min(stored.conversation.size, size))
        self._evicted = evicted

    def popitem(self) -> tuple[str, Stored]:
        conversation_id, stored = super().popitem()
        self._evicted(conversation_id, stored)
        return conversation_id, stored


class RedisStates:
    """Conversations in Redis, with those of late in memory.

    Keys (braces are hash tags):

        <prefix>:join:{<conversation_id>}   hash   v version, i:<id> each interaction, r:<id> each reply,
                                                   p interactions whose experience is pending
        <prefix>:join-due:{<partition>}     zset   conversation_id by the time when something closes

    A conversation in which nothing is open expires by itself after `LATE_S` and the window.

    That nothing is pending any more is noted in memory, and in Redis with the next change, or when the
    conversation leaves the memory: who takes over earlier repeats what was done already.
    """

    def __init__(self, client: redis.asyncio.Redis, prefix: str, window_s: float) -> None:
        self._client = client
        self._prefix = prefix
        self._expiry_ms = int(1000 * (LATE_S + window_s + 3600))
        self._cache = _Cache(CACHE_BYTES, self._evicted)
        self._conflicts: set[str] = set()
        """Conversations that Redis has otherwise than the cache."""
        self._save = client.register_script(SAVE)
        self._written = client.register_script(WRITTEN)
        self._to_note: dict[str, int] = {}
        """Version of the conversations that left the memory, and have nothing pending."""

    def key(self, conversation_id: str) -> str:
        return f"{self._prefix}:join:{{{conversation_id}}}"

    def due_key(self, partition: int) -> str:
        return f"{self._prefix}:join-due:{{{partition}}}"

    def forget_cache(self) -> None:
        """After a rebalance: others may have changed what is cached."""
        self._cache = _Cache(CACHE_BYTES, self._evicted)
        self._conflicts.clear()
        self._to_note.clear()

    async def load(self, ids: Iterable[str]) -> dict[str, Stored]:
        out: dict[str, Stored] = {}
        missing = []
        for conversation_id in ids:
            cached = self._cache.get(conversation_id)
            if cached is not None and conversation_id not in self._conflicts:
                out[conversation_id] = cached
            else:
                missing.append(conversation_id)
        if missing:
            pipe = self._client.pipeline(transaction=False)
            for conversation_id in missing:
                pipe.hgetall(self.key(conversation_id))
            for conversation_id, fields in zip(missing, await pipe.execute(), strict=True):
                out[conversation_id] = self._read(conversation_id, fields)
        return out

    def _read(self, conversation_id: str, fields: Mapping[bytes, bytes]) -> Stored:
        if not fields:
            # Redis lost it or let it expire; where this process has it still, it is written anew, whole.
            cached = self._cache.get(conversation_id)
            return Stored(0, cached.conversation if cached else Conversation())
        version, conversation = int(fields[b"v"]), Conversation.load(fields)
        if self._to_note.get(conversation_id) == version:
            conversation.pending.clear()
        return Stored(version, conversation)

    async def save(self, saves: Sequence[Save]) -> set[str]:
        if not saves:
            return set()
        pipe = self._client.pipeline(transaction=False)
        due: dict[int, dict[str, float]] = {}
        no_longer_due: dict[int, list[str]] = {}
        for save in saves:
            await self._save([self.key(save.conversation_id)], self._arguments(save), client=pipe)
            if save.due is None:
                no_longer_due.setdefault(save.partition, []).append(save.conversation_id)
            else:
                due.setdefault(save.partition, {})[save.conversation_id] = save.due
        for partition, times in due.items():
            pipe.zadd(self.due_key(partition), times)
        for partition, ids in no_longer_due.items():
            pipe.zrem(self.due_key(partition), *ids)
        noted = self._to_note.copy()
        for conversation_id, version in noted.items():
            await self._written([self.key(conversation_id)], [version, PENDING], client=pipe)
        answers = (await pipe.execute())[: len(saves)]
        conflicts = {s.conversation_id for s, ok in zip(saves, answers, strict=True) if not ok}
        for conversation_id in noted:
            del self._to_note[conversation_id]
        for save in saves:
            if save.conversation_id in conflicts:
                self._conflicts.add(save.conversation_id)
            else:
                self._conflicts.discard(save.conversation_id)
                version = 0 if save.after.is_empty else save.version
                self._cache[save.conversation_id] = Stored(version, save.after, is_cached=True)
        return conflicts

    def written(self, saves: Iterable[Save]) -> None:
        for save in saves:
            if save.after.pending:
                save.after.pending.clear()
                if save.conversation_id not in self._cache:
                    self._to_note[save.conversation_id] = save.version

    def _evicted(self, conversation_id: str, stored: Stored) -> None:
        if stored.conversation.replies and not stored.conversation.pending:
            self._to_note[conversation_id] = stored.version

    def _arguments(self, save: Save) -> list[Any]:
        if save.after.is_empty:
            return [save.before.version, save.version, -1, 0]
        fields, gone = save.after.fields(whole=not save.before.version)
        arguments: list[Any] = [
            save.before.version,
            save.version,
            self._expiry_ms if save.due is None else 0,
            len(gone),
            *gone,
        ]
        for name, value in fields.items():
            arguments += (name, value)
        return arguments

    async def due(self, partition: int, now: float) -> list[str]:
        key = self.due_key(partition)
        found: Any = await self._client.zrangebyscore(key, "-inf", now, start=0, num=DUE_AT_ONCE)
        return [conversation_id.decode() for conversation_id in found]

    async def postpone(self, partition: int, conversation_id: str, until: float) -> None:
        await self._client.zadd(self.due_key(partition), {conversation_id: until})
