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
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

import structlog
from aiokafka import TopicPartition
from redis.exceptions import LockError

from cortex_core.errors import InputError, UnavailableError
from streams.connections import async_redis_client, redis_client
from streams.forgotten import Forgotten, read_forgotten
from streams.joiner.decode import Interaction, Reply
from streams.joiner.effects import Engine, Task
from streams.joiner.rebuild_buffers import BufferWriter, Rescored, compare, discard, record_changes, swap
from streams.joiner.records import EventTime, Received, drop_forgotten, extract_feedback, make_join, read
from streams.joiner.states import MemoryStates
from streams.kafka.reader import STALL_S, Watchdog, reading
from streams.kafka.topics import Topics, create_topics
from streams.replay_store import ReplayKeys, model_ids

if TYPE_CHECKING:
    import redis
    import redis.asyncio

    from streams.settings import Settings

log = structlog.get_logger(__name__)

Progress = Callable[[int, int], None]
"""Called with the number of records read and the total."""

LOCK_S = 60
"""Seconds until the lock of a rebuild that was killed with -9 expires."""


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
            discard(settings, client)
            for name in requested:
                record_changes(ReplayKeys(settings.topic_prefix, name), client)
            try:
                writer = BufferWriter(aio, settings, model_id)
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
                        compare(settings, client, name, report.rescored)
                    report.models[name] = swap(settings, client, name, force=extractor is None)
                report.untouched = sorted(set(requested) - set(report.models))
            finally:
                for name in requested:
                    client.delete(ReplayKeys(settings.topic_prefix, name).changed)
                discard(settings, client)
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
    include = _since(since)
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


def _since(since: datetime | None) -> Callable[[Received], bool]:
    """Tells which events to rebuild from: all replies, and interactions since then."""
    start = -math.inf if since is None else since.timestamp()
    return lambda it: isinstance(it.event, Reply) or it.event.at >= start


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
