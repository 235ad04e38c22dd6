"""Heartbeats: every worker reports its state in Redis, so that `cortex status` sees it wherever it runs.

Keys:

    <prefix>:worker:<name>   string   JSON of its `Heartbeat`; expires `FORGOTTEN_S` after the last one
    <prefix>:workers         zset     name by the time of its last heartbeat, Unix seconds

The name of a worker is that of its kind, machine and port: one that is restarted there replaces its former
entry. A worker that stops deletes its entry; one that was killed is missing until it is forgotten.

Nothing depends on a heartbeat: while Redis is unavailable there are none, and the worker works on.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import structlog
from msgspec import Struct
from redis.exceptions import RedisError

from streams.connections import async_redis_client
from streams.failures import error_text

if TYPE_CHECKING:
    import redis.asyncio

    from streams.settings import Settings

log = structlog.get_logger(__name__)

BEAT_S = 2.0
"""Seconds between two heartbeats of a worker."""
POLL_S = 0.05
"""Seconds until a change of readiness is noticed."""
STOP_S = 0.5
"""Seconds that a worker which stops waits for Redis, twice at most."""
MISSING_S = 15.0
"""Seconds after the last heartbeat from which a worker counts as missing."""
FORGOTTEN_S = 600
"""Seconds after the last heartbeat from which a missing worker is no longer listed."""
MODELS_REPORTED = 100
"""The most models in one heartbeat, about 60 bytes each."""


class ModelState(Struct, frozen=True, omit_defaults=True):
    """One model in one worker."""

    version: int = 0
    """The version that an inference worker serves, or the newest that a trainer has published or read."""
    pinned: int | None = None
    """The version to which an operator has pinned it."""
    paused: bool = False
    """Whether an operator has paused its training."""


class Activity(Struct, frozen=True, omit_defaults=True):
    """What a worker of one kind works on."""

    partitions: list[str] = []
    """"topic-partition" of each partition that it owns."""
    models: dict[str, ModelState] = {}
    """At most `MODELS_REPORTED` of its models."""
    models_total: int = 0
    control_position: int = 0
    """Of a joiner: it honours all records of the control topic before this offset."""


class Heartbeat(Struct, frozen=True):
    """The state of one worker process."""

    name: str
    kind: str
    """joiner, trainer or inference."""
    host: str
    pid: int
    url: str
    """Of its HTTP service: `/healthz`, `/readyz`, `/metrics`. Reachable where its address is."""
    started: float
    """Unix seconds, by its clock."""
    release: str
    """Version of the package."""
    ready: bool
    missing: dict[str, str]
    """Dependency → reason, for each that is not ready; as `/readyz` answers."""
    activity: Activity = Activity()


@dataclass(frozen=True, slots=True)
class Seen:
    """A heartbeat and its age."""

    heartbeat: Heartbeat
    age_s: float
    """Seconds since it was written, by the clock of Redis."""

    @property
    def is_missing(self) -> bool:
        """Whether the worker has ended without stopping, or cannot reach Redis."""
        return self.age_s > MISSING_S


@contextlib.asynccontextmanager
async def beating(settings: Settings, name: str, current: Callable[[], Heartbeat]) -> AsyncIterator[None]:
    """Writes a heartbeat every `BEAT_S`, and when readiness changes, while the body runs; then deletes it."""
    client, stopped = async_redis_client(settings), asyncio.Event()
    task = asyncio.create_task(_beat(client, settings.topic_prefix, current, stopped))
    try:
        yield
    finally:
        # Both, because redis-py can swallow a cancellation (see its test). And all is limited,
        # because a worker also stops while Redis does not answer.
        stopped.set()
        task.cancel()
        await asyncio.wait({task}, timeout=STOP_S)
        with contextlib.suppress(RedisError, OSError):
            async with asyncio.timeout(STOP_S):
                await client.delete(_key(settings.topic_prefix, name))
        with contextlib.suppress(RedisError, OSError):
            await client.aclose()


async def _beat(
    client: redis.asyncio.Redis, prefix: str, current: Callable[[], Heartbeat], stopped: asyncio.Event
) -> None:
    failing = False
    while not stopped.is_set():
        heartbeat, now = current(), time.time()
        try:
            pipe = client.pipeline(transaction=False)
            pipe.set(_key(prefix, heartbeat.name), msgspec.json.encode(heartbeat), ex=FORGOTTEN_S)
            pipe.zadd(_names(prefix), {heartbeat.name: now})
            pipe.zremrangebyscore(_names(prefix), "-inf", now - 2 * FORGOTTEN_S)
            await pipe.execute()
            failing = False
        except Exception as error:  # whatever it is, it must not end the worker
            if not failing:
                log.warning("`cortex status` cannot see this worker", why=error_text(error))
            failing = True
        until = time.monotonic() + BEAT_S
        while time.monotonic() < until and current().ready == heartbeat.ready and not stopped.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await stopped.wait()


async def read_heartbeats(client: redis.asyncio.Redis, prefix: str) -> list[Seen]:
    """All workers that have not been forgotten, sorted by name."""
    names: Any = await client.zrange(_names(prefix), 0, -1)
    found: list[Seen] = []
    for name in sorted(n.decode() for n in names):
        pipe = client.pipeline(transaction=True)
        pipe.get(_key(prefix, name))
        pipe.pttl(_key(prefix, name))
        value, left_ms = await pipe.execute()
        with contextlib.suppress(msgspec.DecodeError):  # of a newer release
            if value is not None:
                heartbeat = msgspec.json.decode(value, type=Heartbeat)
                found.append(Seen(heartbeat, FORGOTTEN_S - left_ms / 1000))
    return found


def _key(prefix: str, name: str) -> str:
    return f"{prefix}:worker:{name}"


def _names(prefix: str) -> str:
    return f"{prefix}:workers"
