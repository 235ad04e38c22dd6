"""Replay in Redis: one buffer per model. Joiners write (`streams.replay_writer`), trainers sample.

Keys (the braces are the hash tag that places a model on one node of a cluster):

    <prefix>:replay:{<model_id>}:entries   hash    id → version, newline, JSON
    <prefix>:replay:{<model_id>}:order     zset    id by the interaction's time
    <prefix>:replay:{<model_id>}:removed   hash    id → version of removed entries
    <prefix>:replay:{<model_id>}:changed   set     ids written during a rebuild
    <prefix>:replay:{<model_id>}:architecture      string  JSON; what entries must fit
    <prefix>:replay-models                 set     the model_ids with a buffer
    <prefix>:replay-model:{<id>}           string  the model_id with this interaction, for `INDEX_S`

The JSON is an `ExperienceEvent` exactly as published, or a `ReplayEntry` that a tool added. The content is a
function of the set of writes, not of their order: the highest version of each id, and of those the last
`capacity` by (`occurred_at`, id). The joiner sets the versions (`streams.joiner.states`); the version of a
tool's entry is its revision.

An experience that does not fit its model (`cortex_core.requirements`) is not stored. The trainer, which has
the model, writes the architecture; before there is one, everything is stored, and the trainer sets aside
what does not fit (`streams.trainer.replay`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from cortex_core.errors import ConfigError, InputError
from cortex_core.recency import RecencySampler
from cortex_core.replay_buffer import ReplayEntry
from streams.connections import redis_client
from streams.events import ExperienceEvent, new_id, parse
from streams.replay_fit import architecture_key

if TYPE_CHECKING:
    import redis

    from streams.settings import Settings

INDEX_S = 30 * 86_400
"""Seconds after its last write for which an interaction is found by its id alone, as long as the topics have
its events."""
CHUNK = 200
"""Entries per command: about 2.5 MB, so that no single command blocks Redis for long."""


class WriteResult(IntEnum):
    """The result of a write."""

    STALE = -1
    """Rejected: the stored version is not one that the write replaces."""
    SAME = 0
    """Unchanged: this version is stored already."""
    CHANGED = 1
    TOO_OLD = 2
    """Evicted at once: the buffer is full of later entries."""
    UNFIT = 3
    """Not stored: it does not fit its model."""


class Replaces(StrEnum):
    """The stored versions that a write replaces; with any other, the write is rejected."""

    OLDER = "older"
    """A lower version, or no entry."""
    NOTHING = "nothing"
    """No entry: the write only inserts."""
    ANY = "any"


@dataclass(frozen=True, slots=True)
class ReplayWrite:
    """A write of one entry."""

    id: str
    occurred_at: float
    """Unix seconds."""
    version: int
    """Less than 2**53."""
    value: bytes
    """JSON of an `ExperienceEvent` or a `ReplayEntry`. Empty: removes the entry and keeps its version (unless
    this replaces any), so that no older write restores it."""
    replaces: Replaces | int = Replaces.OLDER
    """A number: only this version."""

    @classmethod
    def of(cls, entry: ReplayEntry) -> ReplayWrite:
        value = orjson.dumps(entry.to_json())
        return cls(entry.id, entry.occurred_at, entry.revision, value)


# KEYS: entries, order, changed, removed. ARGV: capacity, then id, score, version, replaces, value of each
# write. Returns the `WriteResult` of each, and the ids that it evicted.
WRITE = """
local capacity, results, evicted = tonumber(ARGV[1]), {}, {}
local is_rebuilding = redis.call('EXISTS', KEYS[3]) == 1
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
        evicted[#evicted+1] = first
        if first == id then result = 2 end
      end
    end
  end
  if is_rebuilding then redis.call('SADD', KEYS[3], id) end
  results[#results+1] = result
end
return {results, evicted}
"""

# KEYS: entries, order. ARGV: positions in the order. Returns the id and the value of each.
AT = """
local out = {}
for i = 1, #ARGV do
  local id = redis.call('ZRANGE', KEYS[2], ARGV[i], ARGV[i])[1]
  local value = id and redis.call('HGET', KEYS[1], id)
  if value then out[#out+1] = {id, value} end
end
return out
"""


@dataclass(frozen=True, slots=True)
class ReplayKeys:
    """The keys of one model's buffer; `generation` is the name of a buffer under construction."""

    prefix: str
    model_id: str
    generation: str = ""

    def _key(self, name: str) -> str:
        generation = f":{self.generation}" if self.generation else ""
        return f"{self.prefix}:replay:{{{self.model_id}}}{generation}:{name}"

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
        """The set of all models with a buffer."""
        return f"{self.prefix}:replay-models"


def index_key(prefix: str, interaction_id: str) -> str:
    """The key that holds the model_id of an interaction in replay."""
    return f"{prefix}:replay-model:{{{interaction_id}}}"


def write_arguments(capacity: int, writes: Iterable[ReplayWrite]) -> list[Any]:
    """ARGV of `WRITE` for up to `CHUNK` writes."""
    args: list[Any] = [capacity]
    for w in writes:
        args += (w.id, repr(w.occurred_at), w.version, w.replaces, w.value)
    return args


def decode(value: bytes) -> tuple[int, bytes]:
    """The version and the JSON of a stored value."""
    version, _, body = value.partition(b"\n")
    return int(version), body


def to_entry(value: bytes) -> ReplayEntry:
    """The entry of a stored value.

    Raises:
        InputError: it is invalid.
    """
    _, body = decode(value)
    if b'"interaction":{' in body:
        return parse(ExperienceEvent, body).to_entry()
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InputError(f"invalid replay entry: {error}") from error
    return ReplayEntry.from_json(data)


class RedisReplayBuffer:
    """The `ReplayStore` of one model in Redis, for the trainer's thread and for tools.

        store = RedisReplayBuffer.of(settings, "default")
        batch = store.sample(16)

    Threads and processes may share one buffer; every write is an atomic script. Cost, independent of the
    buffer's size: `add` one round trip, `extend` one per 200 entries, `sample` two.

    Methods raise redis-py's errors (`redis.RedisError`) if Redis does not answer.
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
            client: returns bytes (`decode_responses` off).
            capacity: the most entries; must be the same for all writers of the buffer.
            generation: the name of a buffer under construction, which readers do not see; "": the live one.

        Raises:
            ConfigError: `capacity` is not a positive integer.
        """
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
            raise ConfigError(f"capacity is {capacity!r}, expected a positive integer")
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
        """Inserts an entry, or replaces the stored one of a lower revision; returns whether it did."""
        return self.extend((entry,)) == 1

    def extend(self, entries: Iterable[ReplayEntry]) -> int:
        """Adds entries; returns how many were inserted or replaced. Entries without an id get one."""
        writes = [ReplayWrite.of(e if e.id else replace(e, id=new_id())) for e in entries]
        return sum(result == WriteResult.CHANGED for result in self.write(writes))

    def write(self, writes: Sequence[ReplayWrite]) -> list[WriteResult]:
        """Writes in order; returns the result of each."""
        if not writes:
            return []
        out: list[WriteResult] = []
        if not self.keys.generation:
            self._client.sadd(self.keys.models, self.model_id)
        for start in range(0, len(writes), CHUNK):
            arguments = write_arguments(self.capacity, writes[start : start + CHUNK])
            results, _ = self._write(self.keys.written, arguments)
            out += map(WriteResult, results)
        return out

    def remove(self, entry_id: str) -> bool:
        """Removes an entry; returns whether it existed."""
        return self.write([ReplayWrite(entry_id, 0.0, 0, b"", Replaces.ANY)]) == [WriteResult.CHANGED]

    def sample(self, n: int, prioritize_recent: bool = True) -> list[ReplayEntry]:
        """Up to `n` distinct entries, drawn uniformly or with more recent ones (see `RecencySampler`)."""
        return [to_entry(value) for _, value in self.draw(n, prioritize_recent)]

    def draw(self, n: int, prioritize_recent: bool = True) -> list[tuple[str, bytes]]:
        """As `sample`: ids with stored values (see `decode`)."""
        sampler = self.sampler if prioritize_recent else RecencySampler(floor=1.0)
        positions = sampler.draw(len(self), n, self._rng).tolist()
        if not positions:
            return []
        drawn = self._at([self.keys.entries, self.keys.order], positions)
        return [(entry_id.decode(), value) for entry_id, value in drawn]

    def get(self, entry_id: str) -> ReplayEntry | None:
        """The entry with this id, or None."""
        return self.get_many([entry_id])[0]

    def get_many(self, entry_ids: Sequence[str]) -> list[ReplayEntry | None]:
        """The entry of each id, or None."""
        values = [v for _, v in self.raw_values(entry_ids)]
        return [None if value is None else to_entry(value) for value in values]

    def ids(self) -> list[str]:
        """All ids, in order."""
        found: Any = self._client.zrange(self.keys.order, 0, -1)
        return [entry_id.decode() for entry_id in found]

    def entries(self) -> Iterator[ReplayEntry]:
        """All entries at the time of the call, earliest first, except those removed during the iteration."""
        for _, value in self.raw_values(self.ids()):
            if value is not None:
                yield to_entry(value)

    def raw_values(self, entry_ids: Sequence[str]) -> Iterator[tuple[str, bytes | None]]:
        """Each id with its stored value (see `decode`) or None, read in chunks during the iteration."""
        for start in range(0, len(entry_ids), CHUNK):
            ids = entry_ids[start : start + CHUNK]
            values: Any = self._client.hmget(self.keys.entries, list(ids))
            yield from zip(ids, values, strict=True)

    def clear(self) -> None:
        """Deletes all entries."""
        self._client.delete(self.keys.entries, self.keys.order, self.keys.removed)

    def forget(self) -> None:
        """Deletes all entries, and all that refers to them or to the model."""
        ids = self.ids()
        for start in range(0, len(ids), CHUNK):
            pipe = self._client.pipeline(transaction=False)
            for entry_id in ids[start : start + CHUNK]:
                pipe.delete(index_key(self.keys.prefix, entry_id))
            pipe.execute()
        self.clear()
        self._client.delete(architecture_key(self.keys.prefix, self.model_id))
        self._client.srem(self.keys.models, self.model_id)

    def __len__(self) -> int:
        size: Any = self._client.zcard(self.keys.order)
        return int(size)

    def __iter__(self) -> Iterator[ReplayEntry]:
        return self.entries()


def model_ids(client: redis.Redis, prefix: str) -> list[str]:
    """All models with a buffer, sorted."""
    found: Any = client.smembers(ReplayKeys(prefix, "").models)
    return sorted(model_id.decode() for model_id in found)


def sizes(client: redis.Redis, prefix: str) -> dict[str, int]:
    """The number of entries of each model with a buffer."""
    names = model_ids(client, prefix)
    pipe = client.pipeline(transaction=False)
    for name in names:
        pipe.zcard(ReplayKeys(prefix, name).order)
    return dict(zip(names, pipe.execute(), strict=True)) if names else {}
