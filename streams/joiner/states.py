"""Where the state of conversations is kept: the port, in memory (rebuild), and in Redis (the joiner)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from streams.joiner.conversation import LATE_S, Conversation

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


@dataclass(frozen=True, slots=True)
class Save:
    """A conversation on its way back into its store."""

    conversation_id: str
    partition: int
    before: Stored
    after: Conversation
    due: float | None


class States(Protocol):
    """Where conversations are kept."""

    async def load(self, ids: Iterable[str], *, fresh: bool = False) -> dict[str, Stored]:
        """Every id's conversation, an empty one where none is kept. `fresh`: past any cache."""

    async def save(self, saves: Sequence[Save]) -> set[str]:
        """Writes; returns the ids whose version was no longer the one read: those are not written."""

    async def due(self, partition: int, now: float) -> list[str]:
        """Conversations of a partition with something to close, earliest first, up to `DUE_AT_ONCE`."""


class MemoryStates:
    """Conversations of one process; what a rebuild uses."""

    def __init__(self) -> None:
        self.conversations: dict[str, Conversation] = {}
        self._due: dict[int, dict[str, float]] = {}

    async def load(self, ids: Iterable[str], *, fresh: bool = False) -> dict[str, Stored]:
        del fresh
        return {i: Stored(0, self.conversations.get(i) or Conversation()) for i in ids}

    async def save(self, saves: Sequence[Save]) -> set[str]:
        for save in saves:
            if save.after.is_empty:
                self.conversations.pop(save.conversation_id, None)
            else:
                self.conversations[save.conversation_id] = save.after
            due = self._due.setdefault(save.partition, {})
            # A conversation with nothing open still has to be forgotten one day.
            last = max((i.until for i in save.after.interactions.values()), default=None)
            at = save.due if save.due is not None or last is None else last + LATE_S
            if at is None:
                due.pop(save.conversation_id, None)
            else:
                due[save.conversation_id] = at
        return set()

    def partitions(self) -> dict[str, int]:
        """The partition of each conversation."""
        return {i: partition for partition, due in self._due.items() for i in due}

    async def due(self, partition: int, now: float) -> list[str]:
        due = self._due.get(partition, {})
        return sorted((i for i, at in due.items() if at <= now), key=lambda i: (due[i], i))[:DUE_AT_ONCE]


# KEYS: the conversation. ARGV: version wanted, milliseconds to live (0: for ever; -1: it is deleted), number
# of fields to delete, those, then field, value … to set.
SAVE = """
local key = KEYS[1]
if (redis.call('HGET', key, 'v') or '0') ~= ARGV[1] then return 0 end
if ARGV[2] == '-1' then redis.call('DEL', key) return 1 end
local gone = tonumber(ARGV[3])
for i = 4, 3 + gone do redis.call('HDEL', key, ARGV[i]) end
for i = 4 + gone, #ARGV, 2 do redis.call('HSET', key, ARGV[i], ARGV[i+1]) end
redis.call('HINCRBY', key, 'v', 1)
if ARGV[2] ~= '0' then redis.call('PEXPIRE', key, ARGV[2]) else redis.call('PERSIST', key) end
return 1
"""


class RedisStates:
    """Conversations in Redis, with those of late in memory.

    Keys (braces are hash tags):

        <prefix>:join:{<conversation_id>}   hash   v version, i:<id> each interaction, r:<id> each reply
        <prefix>:join-due:{<partition>}     zset   conversation_id by the time when something closes

    A conversation in which nothing is open expires by itself after `LATE_S` and the window.
    """

    def __init__(self, client: redis.asyncio.Redis, prefix: str, window_s: float) -> None:
        self._client = client
        self._prefix = prefix
        self._expiry_ms = int(1000 * (LATE_S + window_s + 3600))
        self._cache: OrderedDict[str, tuple[Stored, int]] = OrderedDict()
        self._cached_bytes = 0
        self._save = client.register_script(SAVE)

    def key(self, conversation_id: str) -> str:
        return f"{self._prefix}:join:{{{conversation_id}}}"

    def due_key(self, partition: int) -> str:
        return f"{self._prefix}:join-due:{{{partition}}}"

    def forget_cache(self) -> None:
        """After a rebalance: others may have changed what is cached."""
        self._cache.clear()
        self._cached_bytes = 0

    async def load(self, ids: Iterable[str], *, fresh: bool = False) -> dict[str, Stored]:
        out: dict[str, Stored] = {}
        missing = []
        for conversation_id in ids:
            cached = self._cache.get(conversation_id)
            if cached is not None and not fresh:
                out[conversation_id] = cached[0]
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
        if fields:
            return Stored(int(fields[b"v"]), Conversation.load(fields))
        # Redis lost it or let it expire, and this process has it still: it is written anew, whole.
        cached = self._cache.get(conversation_id)
        return Stored(0, cached[0].conversation if cached else Conversation())

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
        answers = (await pipe.execute())[: len(saves)]
        conflicts = {s.conversation_id for s, ok in zip(saves, answers, strict=True) if not ok}
        for save in saves:
            if save.conversation_id not in conflicts:
                version = 0 if save.after.is_empty else save.before.version + 1
                self._keep(save.conversation_id, Stored(version, save.after))
        return conflicts

    def _arguments(self, save: Save) -> list[Any]:
        if save.after.is_empty:
            return [save.before.version, -1, 0]
        fields, gone = save.after.fields(whole=not save.before.version)
        arguments: list[Any] = [
            save.before.version,
            self._expiry_ms if save.due is None else 0,
            len(gone),
            *gone,
        ]
        for name, value in fields.items():
            arguments += (name, value)
        return arguments

    def _keep(self, conversation_id: str, stored: Stored) -> None:
        _, size = self._cache.pop(conversation_id, (None, 0))
        self._cached_bytes -= size
        size = stored.conversation.size
        self._cache[conversation_id] = stored, size
        self._cached_bytes += size
        while self._cached_bytes > CACHE_BYTES:
            _, (_, size) = self._cache.popitem(last=False)
            self._cached_bytes -= size

    async def due(self, partition: int, now: float) -> list[str]:
        key = self.due_key(partition)
        found: Any = await self._client.zrangebyscore(key, "-inf", now, start=0, num=DUE_AT_ONCE)
        return [conversation_id.decode() for conversation_id in found]
