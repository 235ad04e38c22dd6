"""Replay in Redis: one buffer for each model, shared by joiners that write and trainers that sample.

Keys (the braces are the hash tag that keeps a model on one node of a cluster):

    <prefix>:replay:{<model_id>}:entries   hash    id → version, newline, JSON
    <prefix>:replay:{<model_id>}:order     zset    id by the interaction's time
    <prefix>:replay:{<model_id>}:removed   hash    id → version of entries that were taken out
    <prefix>:replay:{<model_id>}:changed   set     ids written while a rebuild is under way
    <prefix>:replay-models                 set     every model_id that has a buffer

The JSON is an `ExperienceEvent` exactly as published, or a `ReplayEntry` where a tool added one. What is
kept is a function of the set of writes: the highest version of each id, and of those the last `capacity`
by (`occurred_at`, id), whatever the order of writing. Versions are the joiner's (`streams.joiner.states`); an
entry that a tool adds has its revision.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from cortex_core.errors import ConfigError
from cortex_core.recency import RecencySampler
from cortex_core.replay_buffer import ReplayEntry
from streams.connections import redis_client
from streams.events import ExperienceEvent, new_id, parse

if TYPE_CHECKING:
    import redis
    import redis.asyncio

    from streams.settings import Settings

CHUNK = 200
"""Entries per command: some 2.5 MB, so that no single command holds Redis up for long."""


class WriteResult(IntEnum):
    """What became of one write."""

    STALE = -1
    """What is stored is not what this write replaces."""
    SAME = 0
    """This version is stored already: the work was repeated."""
    CHANGED = 1
    TOO_OLD = 2
    """The buffer is full of later entries."""


class Replaces(StrEnum):
    """What a write takes the place of; nothing is stored in the place of anything else."""

    OLDER = "older"
    """A lower version, or nothing."""
    NOTHING = "nothing"
    ANY = "any"


@dataclass(frozen=True, slots=True)
class ReplayWrite:
    """One entry on its way into a buffer."""

    id: str
    occurred_at: float
    """Unix seconds."""
    version: int
    """Less than 2**53."""
    value: bytes
    """JSON of an `ExperienceEvent` or a `ReplayEntry`; empty: the entry is taken out, and its version stays
    (unless this replaces any), so that no older write brings it back."""
    replaces: Replaces | int = Replaces.OLDER
    """A number: exactly this version."""

    @classmethod
    def of(cls, entry: ReplayEntry) -> ReplayWrite:
        value = orjson.dumps(entry.to_json())
        return cls(entry.id, entry.occurred_at, entry.revision, value)


# KEYS: entries, order, changed, removed. ARGV: capacity, then id, score, version, replaces, value, once for
# each write.
WRITE = """
local capacity, wrote = tonumber(ARGV[1]), {}
local noting = redis.call('EXISTS', KEYS[3]) == 1
local any_removed = redis.call('EXISTS', KEYS[4]) == 1
for i = 2, #ARGV, 5 do
  local id, score, version, replaces, value = ARGV[i], ARGV[i+1], tonumber(ARGV[i+2]), ARGV[i+3], ARGV[i+4]
  local stored = redis.call('HGET', KEYS[1], id)
  local removed = not stored and any_removed and redis.call('HGET', KEYS[4], id)
  local known = tonumber(stored and string.match(stored, '^%d+') or removed or nil)
  local replaced = replaces == 'any'
    or (replaces == 'nothing' and not stored)
    or (replaces == 'older' and (not known or known < version))
    or (stored and known == tonumber(replaces))
  local result = 1
  if not replaced then
    result = known == version and 0 or -1
  elseif value == '' then
    result = redis.call('HDEL', KEYS[1], id)
    redis.call('ZREM', KEYS[2], id)
    if replaces ~= 'any' then
      redis.call('HSET', KEYS[4], id, ARGV[i+2])
      any_removed, result = true, 1
    end
  else
    value = ARGV[i+2] .. '\\n' .. value
    if stored == value then
      result = 0
    else
      redis.call('HSET', KEYS[1], id, value)
      redis.call('ZADD', KEYS[2], score, id)
      if removed then redis.call('HDEL', KEYS[4], id) end
      while redis.call('ZCARD', KEYS[2]) > capacity do
        local first = redis.call('ZPOPMIN', KEYS[2])[1]
        redis.call('HDEL', KEYS[1], first)
        if first == id then result = 2 end
      end
    end
  end
  if noting then redis.call('SADD', KEYS[3], id) end
  wrote[#wrote+1] = result
end
return wrote
"""

# KEYS: entries, order. ARGV: positions in the order.
AT = """
local out = {}
for i = 1, #ARGV do
  local id = redis.call('ZRANGE', KEYS[2], ARGV[i], ARGV[i])[1]
  local value = id and redis.call('HGET', KEYS[1], id)
  if value then out[#out+1] = value end
end
return out
"""


@dataclass(frozen=True, slots=True)
class ReplayKeys:
    """The keys of one model's buffer; `generation` names one that is being built beside it."""

    prefix: str
    model_id: str
    generation: str = ""

    def _key(self, name: str) -> str:
        beside = f":{self.generation}" if self.generation else ""
        return f"{self.prefix}:replay:{{{self.model_id}}}{beside}:{name}"

    @property
    def entries(self) -> str:
        return self._key("entries")

    @property
    def order(self) -> str:
        return self._key("order")

    @property
    def changed(self) -> str:
        return self._key("changed")

    @property
    def removed(self) -> str:
        return self._key("removed")

    @property
    def written(self) -> list[str]:
        """KEYS of `WRITE`."""
        return [self.entries, self.order, self.changed, self.removed]

    @property
    def models(self) -> str:
        """The set of all models that have a buffer."""
        return f"{self.prefix}:replay-models"


def _write_arguments(capacity: int, writes: Iterable[ReplayWrite]) -> list[Any]:
    """ARGV of `WRITE` for up to `CHUNK` writes; it answers with a `WriteResult` for each."""
    args: list[Any] = [capacity]
    for w in writes:
        args += (w.id, repr(w.occurred_at), w.version, w.replaces, w.value)
    return args


def decode(value: bytes) -> tuple[int, bytes]:
    """Version and JSON of a stored value."""
    version, _, body = value.partition(b"\n")
    return int(version), body


def to_entry(value: bytes) -> ReplayEntry:
    """The entry in a stored value."""
    _, body = decode(value)
    if b'"interaction":{' in body:
        return parse(ExperienceEvent, body).to_entry()
    return ReplayEntry.from_json(orjson.loads(body))


class RedisReplayBuffer:
    """The `ReplayStore` of one model in Redis, for the trainer's thread and for tools.

        store = RedisReplayBuffer.of(settings, "default")
        batch = store.sample(16)

    Threads and processes may share one buffer; every write is one atomic script. Cost: `add` one round
    trip, `extend` one for each 200 entries, `sample` two, whatever the size of the buffer.

    Errors of the connection are redis-py's (`redis.RedisError`).
    """

    def __init__(
        self,
        client: redis.Redis,
        model_id: str,
        *,
        prefix: str = "cortex",
        capacity: int = 10_000,
        generation: str = "",
        rng: np.random.Generator | int | None = None,
        sampler: RecencySampler | None = None,
    ) -> None:
        """
        Args:
            client: answers in bytes (`decode_responses` off).
            capacity: most entries kept; all writers of one buffer must agree on it.
            generation: a buffer that is built beside the one that readers see.
        """
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
            raise ConfigError(f"capacity is {capacity!r}, wanted a positive integer")
        self.capacity = capacity
        self.model_id = model_id
        self.keys = ReplayKeys(prefix, model_id, generation)
        self.sampler = sampler or RecencySampler()
        self._client = client
        self._write = client.register_script(WRITE)
        self._at = client.register_script(AT)
        self._rng = np.random.default_rng(rng)

    @classmethod
    def of(cls, settings: Settings, model_id: str, client: redis.Redis | None = None) -> RedisReplayBuffer:
        """The buffer that workers with these settings share; opens a client unless one is given."""
        return cls(
            client or redis_client(settings),
            model_id,
            prefix=settings.topic_prefix,
            capacity=settings.replay_capacity,
        )

    def add(self, entry: ReplayEntry) -> bool:
        """Insert, or amend in place where the id is known and the revision is higher; whether it changed."""
        return self.extend((entry,)) == 1

    def extend(self, entries: Iterable[ReplayEntry]) -> int:
        """Add many; returns how many changed anything. An entry without an id is given one."""
        writes = [ReplayWrite.of(e if e.id else replace(e, id=new_id())) for e in entries]
        return sum(result == WriteResult.CHANGED for result in self.write(writes))

    def write(self, writes: Sequence[ReplayWrite]) -> list[WriteResult]:
        """Makes the writes, in order; what became of each."""
        if not writes:
            return []
        out: list[WriteResult] = []
        if not self.keys.generation:
            self._client.sadd(self.keys.models, self.model_id)
        for start in range(0, len(writes), CHUNK):
            arguments = _write_arguments(self.capacity, writes[start : start + CHUNK])
            out += [WriteResult(result) for result in self._write(self.keys.written, arguments)]
        return out

    def remove(self, entry_id: str) -> bool:
        """Takes an entry out; whether it was there."""
        return self.write([ReplayWrite(entry_id, 0.0, 0, b"", Replaces.ANY)]) == [WriteResult.CHANGED]

    def sample(self, n: int, prioritize_recent: bool = True) -> list[ReplayEntry]:
        """Up to `n` distinct entries; recent ones oftener (see `RecencySampler`), or uniformly."""
        sampler = self.sampler if prioritize_recent else RecencySampler(floor=1.0)
        positions = sampler.draw(len(self), n, self._rng).tolist()
        if not positions:
            return []
        values = self._at([self.keys.entries, self.keys.order], positions)
        return [to_entry(value) for value in values]

    def get(self, entry_id: str) -> ReplayEntry | None:
        """The entry with this id, or None."""
        return self.get_many([entry_id])[0]

    def get_many(self, entry_ids: Sequence[str]) -> list[ReplayEntry | None]:
        """The entries with these ids, None where there is none."""
        values = [v for _, v in self.raw_values(entry_ids)]
        return [None if value is None else to_entry(value) for value in values]

    def ids(self) -> list[str]:
        """Every id, in order."""
        found: Any = self._client.zrange(self.keys.order, 0, -1)
        return [entry_id.decode() for entry_id in found]

    def entries(self) -> Iterator[ReplayEntry]:
        """Every entry, earliest first, of those there at the call; one that leaves meanwhile is left out."""
        for _, value in self.raw_values(self.ids()):
            if value is not None:
                yield to_entry(value)

    def raw_values(self, entry_ids: Sequence[str]) -> Iterator[tuple[str, bytes | None]]:
        """Each id with its stored value (see `decode`), read in chunks as the iterator goes on."""
        for start in range(0, len(entry_ids), CHUNK):
            ids = entry_ids[start : start + CHUNK]
            values: Any = self._client.hmget(self.keys.entries, list(ids))
            yield from zip(ids, values, strict=True)

    def clear(self) -> None:
        """Deletes every entry."""
        self._client.delete(self.keys.entries, self.keys.order, self.keys.removed)

    def __len__(self) -> int:
        size: Any = self._client.zcard(self.keys.order)
        return int(size)

    def __iter__(self) -> Iterator[ReplayEntry]:
        return self.entries()


def model_ids(client: redis.Redis, prefix: str) -> list[str]:
    """Every model that has a buffer."""
    found: Any = client.smembers(ReplayKeys(prefix, "").models)
    return sorted(model_id.decode() for model_id in found)


@dataclass(frozen=True, slots=True)
class Found:
    """An experience in replay."""

    model_id: str
    version: int
    value: bytes
    """JSON of the `ExperienceEvent`."""


class ReplayWriter:
    """Writes of many models' entries at once, in one pipeline; for the joiner's event loop."""

    def __init__(
        self, client: redis.asyncio.Redis, *, prefix: str, capacity: int, generation: str = ""
    ) -> None:
        self._client = client
        self._write = client.register_script(WRITE)
        self._prefix = prefix
        self._capacity = capacity
        self._generation = generation
        self._known: set[str] = set()

    async def write(self, writes: Sequence[tuple[str, ReplayWrite]]) -> list[WriteResult]:
        """Makes (model_id, write) pairs in one round trip; what became of each, in order."""
        if not writes:
            return []
        positions: dict[str, list[int]] = {}
        for i, (model_id, _) in enumerate(writes):
            positions.setdefault(model_id, []).append(i)
        pipe = self._client.pipeline(transaction=False)
        chunks: list[list[int]] = []
        for model_id, where in positions.items():
            keys = ReplayKeys(self._prefix, model_id, self._generation)
            if model_id not in self._known and not self._generation:
                pipe.sadd(keys.models, model_id)
                chunks.append([])
            for start in range(0, len(where), CHUNK):
                chunk = where[start : start + CHUNK]
                arguments = _write_arguments(self._capacity, [writes[i][1] for i in chunk])
                await self._write(keys.written, arguments, client=pipe)
                chunks.append(chunk)
        out = [WriteResult.SAME] * len(writes)
        for chunk, answers in zip(chunks, await pipe.execute(), strict=True):
            for i, answer in zip(chunk, answers if chunk else (), strict=True):
                out[i] = WriteResult(answer)
        self._known.update(positions)
        return out

    async def find(self, wanted: Sequence[tuple[str | None, str]]) -> list[Found | None]:
        """What is stored of each (model_id or None for any, interaction_id).

        One round trip where the models are given, else two.
        """
        if not wanted:
            return []
        models: list[str] = []
        if any(model_id is None for model_id, _ in wanted):
            found: Any = await self._client.smembers(ReplayKeys(self._prefix, "").models)
            models = sorted({model_id.decode() for model_id in found} | self._known)
        pipe = self._client.pipeline(transaction=False)
        asked: list[tuple[int, str]] = []
        for i, (model_id, entry_id) in enumerate(wanted):
            for candidate in models if model_id is None else [model_id]:
                pipe.hget(ReplayKeys(self._prefix, candidate, self._generation).entries, entry_id)
                asked.append((i, candidate))
        out: list[Found | None] = [None] * len(wanted)
        for (i, model_id), value in zip(asked, await pipe.execute(), strict=True):
            # A tool's entry has no interaction, and so nothing to amend.
            if value is not None and out[i] is None and b'"interaction":' in value:
                out[i] = Found(model_id, *decode(value))
        return out
