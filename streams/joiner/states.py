"""Storage of conversation states: the interface, in memory (rebuild), and in Redis (joiner)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from cachetools import LRUCache

from streams.joiner.conversation import LATE_S, PENDING, Conversation
from streams.trail import GUARD, Trail

if TYPE_CHECKING:
    import redis.asyncio

CACHE_BYTES = 64_000_000
"""Size of a joiner's cache of conversations."""

DUE_LIMIT = 500
"""The most conversations that one call of `States.due` returns."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A conversation as loaded, with the version that a save compares."""

    version: int
    conversation: Conversation


@dataclass(frozen=True, slots=True)
class Save:
    """A changed conversation to be saved."""

    conversation_id: str
    partition: int
    before: Stored
    after: Conversation
    version: int
    """Of `after`; higher than all earlier ones, also if Redis has lost those."""
    due: float | None
    """See `Conversation.due`."""


class States(Protocol):
    """A store of conversations."""

    async def load(self, ids: Iterable[str]) -> dict[str, Stored]:
        """The conversation of each id; an empty one if none is stored."""

    async def save(self, saves: Sequence[Save]) -> set[str]:
        """Writes conversations whose stored version is still that of `before`.

        Returns:
            The ids of the others: they are not written, and the next `load` reads them again.

        Raises:
            WritesLost: the store has lost writes; none of these conversations is written.
        """

    def clear_pending(self, saves: Iterable[Save]) -> None:
        """Marks none of these conversations' experiences as pending: all are in replay and published."""

    async def due(self, partition: int, now: float) -> list[str]:
        """A partition's conversations that are due at `now`, earliest first, at most `DUE_LIMIT`.

        Raises:
            WritesLost: the store has lost writes.
        """

    async def postpone(self, partition: int, conversation_id: str, until: float) -> None:
        """The conversation is due no earlier than this."""


class MemoryStates:
    """Conversations in the memory of one process; used by rebuilds."""

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
            # A conversation with nothing open is due when its last interaction can be removed.
            last = max((i.until for i in save.after.interactions.values()), default=None)
            at = save.due if save.due is not None or last is None else last + LATE_S
            if at is None:
                due.pop(save.conversation_id, None)
            else:
                due[save.conversation_id] = at
        return set()

    def clear_pending(self, saves: Iterable[Save]) -> None:
        for save in saves:
            save.after.pending.clear()

    async def due(self, partition: int, now: float) -> list[str]:
        due = self._due.get(partition, {})
        return sorted((i for i, at in due.items() if at <= now), key=lambda i: (due[i], i))[:DUE_LIMIT]

    async def postpone(self, partition: int, conversation_id: str, until: float) -> None:
        self._due.setdefault(partition, {})[conversation_id] = until


# KEYS: the conversation, the trail, its partition's due times. ARGV: the trail's acknowledged number,
# expected version, new version, conversation_id, when it is due (empty: never), milliseconds until expiry
# (0: none; -1: delete the key now), number of fields to delete, their names, then field, value … to set.
# Returns 1: written; 0: another version is stored; -1: Redis has lost writes.
SAVE = (
    GUARD.format(key=2, arg=1)
    + """
local key = KEYS[1]
if (redis.call('HGET', key, 'v') or '0') ~= ARGV[2] then return 0 end
if ARGV[6] == '-1' then
  redis.call('DEL', key)
  redis.call('ZREM', KEYS[3], ARGV[4])
  return 1
end
local deleted = tonumber(ARGV[7])
redis.call('HSET', key, 'v', ARGV[3]) -- first: if Redis is full, the script fails before any change
for i = 8, 7 + deleted do redis.call('HDEL', key, ARGV[i]) end
for i = 8 + deleted, #ARGV, 2 do redis.call('HSET', key, ARGV[i], ARGV[i+1]) end
if ARGV[6] ~= '0' then redis.call('PEXPIRE', key, ARGV[6]) else redis.call('PERSIST', key) end
if ARGV[5] == '' then redis.call('ZREM', KEYS[3], ARGV[4])
else redis.call('ZADD', KEYS[3], ARGV[5], ARGV[4]) end
return 1
"""
)

# KEYS: the conversation. ARGV: its version, the name of the field with the pending experiences.
CLEAR_PENDING = """
if redis.call('HGET', KEYS[1], 'v') == ARGV[1] then redis.call('HDEL', KEYS[1], ARGV[2]) end
"""


class _Cache(LRUCache[str, Stored]):
    """The most recently used conversations, limited in bytes; calls `evicted` with each that it evicts."""

    def __init__(self, size: int, evicted: Callable[[str, Stored], None]) -> None:
        super().__init__(size, getsizeof=lambda stored: min(stored.conversation.size, size))
        self._evicted = evicted

    def popitem(self) -> tuple[str, Stored]:
        conversation_id, stored = super().popitem()
        self._evicted(conversation_id, stored)
        return conversation_id, stored


class RedisStates:
    """Conversations in Redis, with a write-through cache of the recently used.

    Keys (braces are hash tags):

        <prefix>:join:{<conversation_id>}   hash   v version, i:<id> each interaction, r:<id> each reply,
                                                   p interactions whose experience is pending
        <prefix>:join-due:{<partition>}     zset   conversation_id by the time when it is due

    A conversation with nothing open expires after `LATE_S` and the window.

    `clear_pending` changes the cache; Redis follows with the conversation's next save, or with any save after
    the conversation was evicted. A worker that takes over earlier repeats idempotent writes.
    """

    def __init__(self, client: redis.asyncio.Redis, prefix: str, window_s: float, trail: Trail) -> None:
        self._client = client
        self._prefix = prefix
        self._trail = trail
        self._expiry_ms = int(1000 * (LATE_S + window_s + 3600))
        self._cache = _Cache(CACHE_BYTES, self._on_evicted)
        self._conflicts: set[str] = set()
        """Cached conversations that another worker changed in Redis."""
        self._save = client.register_script(SAVE)
        self._clear_pending = client.register_script(CLEAR_PENDING)
        self._evicted_versions: dict[str, int] = {}
        """Versions of evicted conversations with nothing pending, which Redis may still store as pending."""

    def key(self, conversation_id: str) -> str:
        return f"{self._prefix}:join:{{{conversation_id}}}"

    def due_key(self, partition: int) -> str:
        return f"{self._prefix}:join-due:{{{partition}}}"

    def clear_cache(self) -> None:
        """Clears the cache. Required at a rebalance, after which other workers change the conversations, and
        when Redis has lost writes."""
        self._cache = _Cache(CACHE_BYTES, self._on_evicted)
        self._conflicts.clear()
        self._evicted_versions.clear()

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
            # Lost or expired in Redis; if it is still cached, version 0 makes the save write all fields.
            cached = self._cache.get(conversation_id)
            return Stored(0, cached.conversation if cached else Conversation())
        version, conversation = int(fields[b"v"]), Conversation.load(fields)
        if self._evicted_versions.get(conversation_id) == version:
            conversation.pending.clear()
        return Stored(version, conversation)

    async def save(self, saves: Sequence[Save]) -> set[str]:
        if not saves:
            return set()
        pipe = self._client.pipeline(transaction=False)
        for save in saves:
            keys = [self.key(save.conversation_id), self._trail.key, self.due_key(save.partition)]
            await self._save(keys, self._arguments(save), client=pipe)
        evicted = self._evicted_versions.copy()
        for conversation_id, version in evicted.items():
            await self._clear_pending([self.key(conversation_id)], [version, PENDING], client=pipe)
        number = await self._trail.note(pipe)
        *answers, noted = await pipe.execute()
        answers = answers[: len(saves)]
        self._trail.check(min(*answers, noted), number)
        conflicts = {s.conversation_id for s, ok in zip(saves, answers, strict=True) if not ok}
        for conversation_id in evicted:
            del self._evicted_versions[conversation_id]
        for save in saves:
            if save.conversation_id in conflicts:
                self._conflicts.add(save.conversation_id)
            else:
                self._conflicts.discard(save.conversation_id)
                version = 0 if save.after.is_empty else save.version
                self._cache[save.conversation_id] = Stored(version, save.after)
        return conflicts

    def clear_pending(self, saves: Iterable[Save]) -> None:
        for save in saves:
            if save.after.pending:
                save.after.pending.clear()
                if save.conversation_id not in self._cache:
                    self._evicted_versions[save.conversation_id] = save.version

    def _on_evicted(self, conversation_id: str, stored: Stored) -> None:
        if stored.conversation.replies and not stored.conversation.pending:
            self._evicted_versions[conversation_id] = stored.version

    def _arguments(self, save: Save) -> list[Any]:
        arguments: list[Any] = [
            self._trail.acknowledged,
            save.before.version,
            save.version,
            save.conversation_id,
            "" if save.due is None else save.due,
        ]
        if save.after.is_empty:
            return [*arguments, -1, 0]
        fields, deleted = save.after.fields(whole=not save.before.version)
        arguments += (self._expiry_ms if save.due is None else 0, len(deleted), *deleted)
        for name, value in fields.items():
            arguments += (name, value)
        return arguments

    async def due(self, partition: int, now: float) -> list[str]:
        pipe = self._client.pipeline(transaction=False)
        pipe.zrangebyscore(self.due_key(partition), "-inf", now, start=0, num=DUE_LIMIT)
        number = await self._trail.note(pipe)
        found, noted = await pipe.execute()
        self._trail.check(noted, number)
        return [conversation_id.decode() for conversation_id in found]

    async def postpone(self, partition: int, conversation_id: str, until: float) -> None:
        await self._client.zadd(self.due_key(partition), {conversation_id: until})
