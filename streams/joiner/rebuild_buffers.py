"""The buffers that a rebuild fills, until they replace the live ones."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from cortex_core.strategy_registry import StrategyRegistry
from streams.replay_store import RedisReplayBuffer, Replaces, ReplayKeys, ReplayWrite, WriteResult, decode
from streams.replay_writer import ReplayWriter

if TYPE_CHECKING:
    import redis
    import redis.asyncio

    from streams.settings import Settings

GENERATION = "rebuild"
UNFINISHED_S = 600
"""Seconds until the unfinished buffers of a rebuild that was killed with -9 expire."""


@dataclass(slots=True)
class Rescored:
    """The differences between the rewards of the old and the new buffer."""

    compared: int = 0
    changed: int = 0
    mean_change: float = 0.0
    """Mean of new minus old, over the rewards that changed."""
    sign_flips: int = 0


# KEYS: live entries, order, changed; new entries, order. ARGV: capacity, "1" if an entry written during the
# rebuild replaces a new one with equally many replies.
SWAP = """
local function replies(value) return tonumber(string.match(value, '"revision":(%d+)') or 0) end
for _, id in ipairs(redis.call('SMEMBERS', KEYS[3])) do
  local value = redis.call('HGET', KEYS[1], id)
  local new = redis.call('HGET', KEYS[4], id)
  if value then
    if not new or replies(value) > replies(new) or ARGV[2] == '1' then
      redis.call('HSET', KEYS[4], id, value)
      redis.call('ZADD', KEYS[5], redis.call('ZSCORE', KEYS[2], id), id)
    end
  elseif id ~= '' then
    redis.call('HDEL', KEYS[4], id)
    redis.call('ZREM', KEYS[5], id)
  end
end
local over = redis.call('ZCARD', KEYS[5]) - tonumber(ARGV[1])
if over > 0 then
  local evicted = redis.call('ZPOPMIN', KEYS[5], over)
  for i = 1, #evicted, 2 do redis.call('HDEL', KEYS[4], evicted[i]) end
end
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
if redis.call('EXISTS', KEYS[4]) == 1 then
  redis.call('RENAME', KEYS[4], KEYS[1])
  redis.call('RENAME', KEYS[5], KEYS[2])
  redis.call('PERSIST', KEYS[1]) -- from its expiry as an unfinished buffer
  redis.call('PERSIST', KEYS[2])
end
return redis.call('ZCARD', KEYS[2])
"""


class BufferWriter(ReplayWriter):
    """Writes to the new buffers, of one model if given.

    Rebuilt entries have version 0, so that any later write of a joiner replaces them.
    """

    def __init__(self, client: redis.asyncio.Redis, settings: Settings, model_id: str | None) -> None:
        super().__init__(
            client,
            prefix=settings.topic_prefix,
            capacity=settings.replay_capacity,
            strategies=StrategyRegistry.from_set(settings.strategies).ids,
            generation=GENERATION,
        )
        self._only = model_id
        self.unfit = 0
        self.models: set[str] = set()
        """Models with a new buffer."""
        self._expiring: dict[str, float] = {}
        """Model → when its expiry was set."""

    async def write(self, writes: Sequence[tuple[str, ReplayWrite]]) -> list[WriteResult]:
        mine = [(model_id, _rebuilt(w)) for model_id, w in writes if self._only in (None, model_id)]
        written = await super().write(mine)
        self.models.update(model_id for model_id, _ in mine)
        self.unfit += written.count(WriteResult.UNFIT)
        results = iter(written)
        await self.postpone_expiry()
        return [next(results) if self._only in (None, w[0]) else WriteResult.SAME for w in writes]

    async def postpone_expiry(self) -> None:
        """Makes the unfinished buffers expire in `UNFINISHED_S`, if this rebuild does not continue."""
        now = time.monotonic()
        due = [m for m in self.models if now - self._expiring.get(m, -math.inf) > UNFINISHED_S / 10]
        if not due:
            return
        pipe = self._client.pipeline(transaction=False)
        for model_id in due:
            keys = ReplayKeys(self._prefix, model_id, self._generation)
            for key in (keys.entries, keys.order, keys.removed):
                pipe.expire(key, UNFINISHED_S)
        await pipe.execute()
        self._expiring |= dict.fromkeys(due, now)


def _rebuilt(write: ReplayWrite) -> ReplayWrite:
    # A single writer, in order: the last write is the newest.
    replaces = Replaces.ANY if write.replaces is Replaces.OLDER else write.replaces
    return dataclasses.replace(write, version=0, replaces=replaces)


def record_changes(keys: ReplayKeys, client: redis.Redis) -> None:
    """Makes every live write to this buffer record its id from now on."""
    client.delete(keys.changed)
    client.sadd(keys.changed, "")  # Redis has no empty sets
    client.expire(keys.changed, 86_400)


def discard(settings: Settings, client: redis.Redis) -> None:
    """Deletes the unfinished buffers of this or of a crashed rebuild."""
    found = list(client.scan_iter(f"{settings.topic_prefix}:replay:*:{GENERATION}:*", count=1000))
    if found:
        client.delete(*found)


def swap(settings: Settings, client: redis.Redis, model_id: str, *, force: bool) -> int:
    live = ReplayKeys(settings.topic_prefix, model_id)
    new = ReplayKeys(settings.topic_prefix, model_id, GENERATION)
    if not client.exists(live.changed):
        # The model is new since the rebuild started: all of its live entries count as changed.
        ids: Any = client.zrange(live.order, 0, -1)
        client.sadd(live.changed, "", *ids)
    keys = (live.entries, live.order, live.changed, new.entries, new.order)
    size: Any = client.register_script(SWAP)(keys, [settings.replay_capacity, int(force)])
    client.sadd(live.models, model_id)
    return int(size)


def compare(settings: Settings, client: redis.Redis, model_id: str, out: Rescored) -> None:
    """Adds the differences between the live and the new buffer's rewards to `out`; `mean_change` as a sum."""

    def buffer(generation: str) -> RedisReplayBuffer:
        return RedisReplayBuffer(client, model_id, prefix=settings.topic_prefix, generation=generation)

    old, new = buffer(""), buffer(GENERATION)
    ids = new.ids()
    for (_, before), (_, after) in zip(old.raw_values(ids), new.raw_values(ids), strict=True):
        if before is None or after is None:
            continue
        old_reward, new_reward = (
            float(orjson.loads(decode(value)[1])["reward"]) for value in (before, after)
        )
        out.compared += 1
        if not math.isclose(old_reward, new_reward, abs_tol=1e-9):
            out.changed += 1
            out.mean_change += new_reward - old_reward
            out.sign_flips += old_reward * new_reward < 0
