"""Rebuilds replay from the topics: runs the join on all events that Kafka retains, then swaps the buffers.

    report = await rebuild(settings, since=None)

Reads without a consumer group and commits nothing. Readers see the old buffer until one atomic swap replaces
it. Live joiners' writes are not lost: during a rebuild every write records its id in a set, and the swap
copies those entries to the new buffer. A model without events in the topics keeps its buffer. Interactions
from before their model was forgotten (`cortex models forget`) are left out.

Leaves out the events of forgotten conversations. It does not touch the joiners' state: they restore what
Redis has lost of it (`streams.joiner.offsets`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import orjson
import structlog
from aiokafka import TopicPartition
from redis.exceptions import LockError

from cortex_core.errors import InputError, UnavailableError
from cortex_core.strategy_registry import StrategyRegistry
from streams.connections import async_redis_client, redis_client
from streams.forgotten import Forgotten, read_forgotten
from streams.joiner.decode import Interaction, Reply
from streams.joiner.effects import Engine, Task
from streams.joiner.records import EventTime, Received, drop_forgotten, extract_feedback, make_join, read
from streams.joiner.states import MemoryStates
from streams.kafka.reader import STALL_S, Watchdog, reading
from streams.kafka.topics import Topics, create_topics
from streams.replay_store import (
    RedisReplayBuffer,
    Replaces,
    ReplayKeys,
    ReplayWrite,
    ReplayWriter,
    WriteResult,
    decode,
    model_ids,
)
from streams.weights.forgotten import forgotten_models

if TYPE_CHECKING:
    import redis
    import redis.asyncio

    from streams.settings import Settings

log = structlog.get_logger(__name__)

Progress = Callable[[int, int], None]
"""Called with the number of records read and the total."""

GENERATION = "rebuild"
LOCK_S = 60
"""Seconds until the lock of a rebuild that was killed with -9 expires."""
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


@dataclass(slots=True)
class RebuildReport:
    """The result of a rebuild."""

    interactions: int = 0
    replies: int = 0
    unreadable: int = 0
    """Records that are not valid events; the joiner published them as dead letters."""
    unfit: int = 0
    """Writes of experiences that do not fit their model; the trainer published them as dead letters."""
    models: dict[str, int] = field(default_factory=dict)
    """Number of entries in each model's new buffer."""
    untouched: list[str] = field(default_factory=list)
    """Models that kept their buffer because the topics have no events of them."""
    seconds: float = 0.0
    rescored: Rescored | None = None
    """Set if the rebuild used another extractor."""


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


class _Writer(ReplayWriter):
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
        self._expiring: dict[str, float] = {}
        """Model → when its expiry was set."""

    async def write(self, writes: Sequence[tuple[str, ReplayWrite]]) -> list[WriteResult]:
        mine = [(model_id, _rebuilt(w)) for model_id, w in writes if self._only in (None, model_id)]
        written = await super().write(mine)
        self.unfit += written.count(WriteResult.UNFIT)
        results = iter(written)
        await self.postpone_expiry()
        return [next(results) if self._only in (None, w[0]) else WriteResult.SAME for w in writes]

    async def postpone_expiry(self) -> None:
        """Makes the unfinished buffers expire in `UNFINISHED_S`, if this rebuild does not continue."""
        now = time.monotonic()
        due = [m for m in self._known if now - self._expiring.get(m, -math.inf) > UNFINISHED_S / 10]
        if not due:
            return
        pipe = self._client.pipeline(transaction=False)
        for model_id in due:
            keys = ReplayKeys(self._prefix, model_id, self._generation)
            for key in (keys.entries, keys.order, keys.removed):
                pipe.expire(key, UNFINISHED_S)
        await pipe.execute()
        self._expiring |= dict.fromkeys(due, now)

    @property
    def models(self) -> set[str]:
        return set(self._known)


def _rebuilt(write: ReplayWrite) -> ReplayWrite:
    # A single writer, in order: the last write is the newest.
    replaces = Replaces.ANY if write.replaces is Replaces.OLDER else write.replaces
    return dataclasses.replace(write, version=0, replaces=replaces)


async def rebuild(
    settings: Settings,
    *,
    since: datetime | None = None,
    model_id: str | None = None,
    extractor: str | None = None,
    progress: Progress | None = None,
) -> RebuildReport:
    """Rebuilds the replay buffers from the topics and swaps them in.

    Args:
        since: includes interactions that occurred at or after this time; None: all in the topics.
        model_id: rebuilds only this model; None: all models.
        extractor: extracts the feedback with this extractor; the report has the changes of rewards.

    Raises:
        InputError: no such model.
        UnavailableError: another rebuild is running, or Kafka stopped sending records.
        redis.RedisError, KafkaError, OSError: a server does not answer.
    """
    settings = settings.resolved()
    started = time.monotonic()
    report = RebuildReport(rescored=Rescored() if extractor else None)
    await create_topics(settings)
    client, aio = redis_client(settings), async_redis_client(settings)
    try:
        async with locked(settings, aio) as extend_lock:
            forgotten = await read_forgotten(settings)
            existing = model_ids(client, settings.topic_prefix)
            requested = [model_id] if model_id else existing
            _discard(settings, client)
            for name in requested:
                _record_changes(ReplayKeys(settings.topic_prefix, name), client)
            try:
                writer = _Writer(aio, settings, model_id)
                join = make_join(settings, extractor)
                engine = Engine(join, MemoryStates(), writer)

                async def keep() -> None:
                    await extend_lock()
                    await writer.postpone_expiry()

                await _replay(
                    settings,
                    engine,
                    since=since,
                    forgotten=forgotten,
                    report=report,
                    progress=progress,
                    keep=keep,
                )
                report.unfit = writer.unfit
                if model_id and model_id not in {*writer.models, *existing}:
                    known = ", ".join(existing) or "none"
                    raise InputError(f"the topics have no interaction of {model_id!r}; models are: {known}")
                for name in sorted(writer.models):
                    if report.rescored is not None:
                        _compare(settings, client, name, report.rescored)
                    report.models[name] = _swap(settings, client, name, force=extractor is None)
                report.untouched = sorted(set(requested) - set(report.models))
            finally:
                for name in requested:
                    client.delete(ReplayKeys(settings.topic_prefix, name).changed)
                _discard(settings, client)
    finally:
        client.close()
        await aio.aclose()
    if report.rescored is not None and report.rescored.changed:
        report.rescored.mean_change /= report.rescored.changed
    report.seconds = time.monotonic() - started
    return report


@contextlib.asynccontextmanager
async def locked(settings: Settings, client: redis.asyncio.Redis) -> AsyncIterator[Callable[[], Any]]:
    """Locks out rebuilds; yields a function that extends the lock by `LOCK_S`."""
    lock = client.lock(f"{settings.topic_prefix}:rebuilding", timeout=LOCK_S, blocking=False)
    if not await lock.acquire():
        raise UnavailableError(
            f"another rebuild of {settings.topic_prefix!r} is running, or crashed less than {LOCK_S} s ago: "
            "retry later"
        )

    async def extend_lock() -> None:
        try:
            await lock.reacquire()
        except LockError as error:
            raise UnavailableError(
                f"the lock expired, because no record was read for {LOCK_S} s, and another rebuild may have "
                "started: run the rebuild again"
            ) from error

    try:
        yield extend_lock
    finally:
        with contextlib.suppress(LockError):
            await lock.release()


def _record_changes(keys: ReplayKeys, client: redis.Redis) -> None:
    """Makes every live write to this buffer record its id from now on."""
    client.delete(keys.changed)
    client.sadd(keys.changed, "")  # Redis has no empty sets
    client.expire(keys.changed, 86_400)


def _discard(settings: Settings, client: redis.Redis) -> None:
    """Deletes the unfinished buffers of this or of a crashed rebuild."""
    found = list(client.scan_iter(f"{settings.topic_prefix}:replay:*:{GENERATION}:*", count=1000))
    if found:
        client.delete(*found)


async def _replay(
    settings: Settings,
    engine: Engine,
    *,
    since: datetime | None,
    forgotten: Forgotten,
    report: RebuildReport,
    progress: Progress | None,
    keep: Callable[[], Awaitable[None]],
) -> None:
    topics = Topics.of(settings)
    names = (topics.interactions, topics.replies)
    include = _filter(since, await forgotten_models(settings))
    # Including uncommitted records, as the joiner reads.
    async with reading(settings, names, committed_only=False) as consumer:
        partitions = sorted(consumer.assignment())
        # Queried after the recording of live writes began: it covers all events after these ends.
        ends = await consumer.end_offsets(partitions)
        starts = await consumer.beginning_offsets(partitions)
        if since is not None:
            # A record's timestamp is that of sending, later than its event's: start one window earlier.
            from_ms = max(0, int(1000 * (since.timestamp() - settings.join_window_s)))
            found = await consumer.offsets_for_times(dict.fromkeys(partitions, from_ms))
            starts = {tp: ends[tp] if found[tp] is None else found[tp].offset for tp in partitions}
        for tp in partitions:
            consumer.seek(tp, starts[tp])
        position = dict(starts)
        total = sum(ends[tp] - starts[tp] for tp in partitions)
        event_time = EventTime(names)
        now = time.time()
        watchdog: Watchdog[TopicPartition] = Watchdog()
        while any(position[tp] < ends[tp] for tp in partitions):
            records = await consumer.getmany(timeout_ms=500, max_records=settings.join_batch)
            if watchdog.stalled(position, ends):
                raise UnavailableError(
                    f"Kafka at {settings.kafka_address} sent nothing for {STALL_S:g} s, after "
                    f"{total - _remaining(position, ends)} of {total} records"
                )
            batch: list[Any] = []
            for tp in sorted(records, key=lambda tp: tp.topic != topics.interactions):
                for record in records[tp]:
                    if record.offset < ends[tp]:
                        event_time.advance(tp, record.timestamp)
                        batch.append(record)
                position[tp] = max(position[tp], await consumer.position(tp))
            tasks = _tasks(settings, engine, batch, include=include, forgotten=forgotten, report=report)
            await engine.apply(tasks)
            for partition in {tp.partition for tp in partitions}:
                moment = event_time.of(partition, lambda tp: (position[tp] >= ends[tp], now))
                await engine.timer(partition, moment)
            await keep()
            if progress:
                progress(total - _remaining(position, ends), total)
        for partition in {tp.partition for tp in partitions}:
            await engine.timer(partition, now)


def _remaining(position: dict[TopicPartition, int], ends: dict[TopicPartition, int]) -> int:
    return sum(max(0, end - position[tp]) for tp, end in ends.items())


def _filter(since: datetime | None, forgotten: Mapping[str, float]) -> Callable[[Received], bool]:
    """Tells which events to rebuild from: all replies, and interactions since then and since a forgetting."""

    def include(received: Received) -> bool:
        event = received.event
        if isinstance(event, Reply):
            return True
        arrived = received.record.timestamp / 1000
        return (since is None or event.at >= since.timestamp()) and arrived >= forgotten.get(
            event.model_id, 0.0
        )

    return include


def _tasks(
    settings: Settings,
    engine: Engine,
    records: list[Any],
    *,
    include: Callable[[Received], bool],
    forgotten: Forgotten,
    report: RebuildReport,
) -> list[Task]:
    def refuse(record: Any, reason: str) -> None:
        # The joiner published its dead letter, with the same reason.
        log.warning("invalid record", topic=record.topic, offset=record.offset, error=reason)
        report.unreadable += 1

    topics = Topics.of(settings)
    received = [
        it
        for it in drop_forgotten(
            read(
                records, topics, refuse, store_text=engine.rules.store_text, check_model=settings.check_model
            ),
            forgotten,
        )
        if include(it)
    ]
    tasks = extract_feedback(received, engine.rules, refuse)
    interactions = sum(isinstance(it.event, Interaction) for it in received)
    report.interactions += interactions
    report.replies += len(tasks) - interactions
    return tasks


def _swap(settings: Settings, client: redis.Redis, model_id: str, *, force: bool) -> int:
    live = ReplayKeys(settings.topic_prefix, model_id)
    new = ReplayKeys(settings.topic_prefix, model_id, GENERATION)
    if not client.exists(live.changed):
        # The model is new since the rebuild started: all of its live entries count as changed.
        ids: Any = client.zrange(live.order, 0, -1)
        client.sadd(live.changed, "", *ids)
    keys = (live.entries, live.order, live.changed, new.entries, new.order)
    swap = client.register_script(SWAP)
    size: Any = swap(keys, [settings.replay_capacity, int(force)])
    client.sadd(live.models, model_id)
    return int(size)


def _compare(settings: Settings, client: redis.Redis, model_id: str, out: Rescored) -> None:
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


@contextlib.contextmanager
def console_progress() -> Iterator[Progress]:
    """A progress bar on the terminal: `with console_progress() as progress: … rebuild(progress=progress)`."""
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn  # noqa: PLC0415
    from rich.progress import Progress as Bar  # noqa: PLC0415

    columns = ("rebuilding", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns) as bar:
        task = bar.add_task("rebuilding", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield progress
