"""Detects that Redis has lost writes of this process.

Redis loses its last writes when its machine loses power, or when it fails over to a replica that lagged; it
loses more if it is emptied or restored from an old copy. It never loses a write and keeps a later one.
Therefore each pipeline ends with the number of the write, and each write first checks that the number of the
last acknowledged one is still there.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import redis.asyncio

EXPIRY_MS = 7 * 86_400_000

GUARD = "if tonumber(redis.call('GET', KEYS[{key}]) or -1) < tonumber(ARGV[{arg}]) then return -1 end\n"
"""Lua: returns -1 if the trail in KEYS[key] has not reached ARGV[arg]."""
# KEYS: the trail. ARGV: last acknowledged number, new number, milliseconds until expiry.
NOTE = (
    GUARD.format(key=1, arg=1)
    + """
if tonumber(redis.call('GET', KEYS[1]) or -1) < tonumber(ARGV[2]) then
  redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
end
return 1
"""
)


class WritesLost(Exception):
    """Redis has lost writes of this process. What was read or cached may be older than what was written."""

    def __init__(self) -> None:
        super().__init__("Redis has lost writes of this process")


class Trail:
    """The number of this process's last write, in Redis.

        pipe.hset(…)
        number = await trail.note(pipe)           # the last command
        *answers, noted = await pipe.execute()
        trail.check(noted, number)

    Keys:

        <prefix>:trail:<id>   string   number of the last write; expires a week after it

    Several pipelines may be under way at once.
    """

    def __init__(self, client: redis.asyncio.Redis, prefix: str) -> None:
        self.key = f"{prefix}:trail:{uuid.uuid4().hex[:12]}"
        self.acknowledged = -1
        """The highest number that Redis has acknowledged, -1 before any: what scripts compare (`GUARD`)."""
        self._last = 0
        self._client = client
        self._note = client.register_script(NOTE)

    async def begin(self) -> None:
        """Begins anew: earlier writes count as known, lost or not."""
        self._last += 1
        await self._client.set(self.key, self._last, px=EXPIRY_MS)
        self.acknowledged = self._last

    async def note(self, pipe: Any) -> int:
        """Adds the command that notes the pipeline's writes; returns their number."""
        self._last += 1
        await self._note([self.key], [self.acknowledged, self._last, EXPIRY_MS], client=pipe)
        return self._last

    def check(self, answer: int, number: int) -> None:
        """Checks the answer to `note`, or of any script with `GUARD`.

        Raises:
            WritesLost: as the name says.
        """
        if answer < 0:
            raise WritesLost
        self.acknowledged = max(self.acknowledged, number)
