"""Status of all workers, wherever they run: from their heartbeats, the consumer groups, and Redis.

The parts are queried independently: one that does not answer is reported and does not hide the others.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import redis
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from rich.console import Console
from rich.table import Table
from rich.text import Text

from streams.connections import async_redis_client, explain, kafka_client_options, redis_client
from streams.failures import error_text
from streams.heartbeats import Seen, read_heartbeats
from streams.joiner.states import RedisStates
from streams.kafka.clients import started
from streams.kafka.groups import committed_offsets
from streams.kafka.reader import reading
from streams.kafka.topics import MAX_PARTITIONS, Topics
from streams.ports import WORKER_PORTS
from streams.replay_store import sizes
from streams.settings import Settings
from streams.trail import Trail

TIMEOUT_S = 5.0
FIRST_DUE = 20
"""Conversations of each partition in which the oldest waiting interaction is searched."""

Rows = list[dict[str, Any]]


async def collect(settings: Settings) -> dict[str, Any]:
    """The data for `show`: kafka, redis, workers, groups, waiting, replay, weights, errors, problems.

    `problems` is empty if both servers answer, and workers of each kind run and are ready.

    Args:
        settings: resolved.
    """
    errors: dict[str, str] = {}

    async def part(name: str, work: Awaitable[Rows]) -> Rows:
        try:
            return await asyncio.wait_for(work, 2 * TIMEOUT_S)
        except Exception as error:  # reported; the other parts are still shown
            errors[name] = str(await explain(error, settings) or error_text(error))
            return []

    async def in_redis(read: Callable[[Settings], Awaitable[Rows]]) -> Rows:
        await asyncio.shield(answers)
        return await read(settings)

    # One for all that is in Redis: a server that hangs is waited for once.
    answers = asyncio.ensure_future(_ping(settings))
    workers, groups, waiting, replay = await asyncio.gather(
        part("workers", in_redis(_workers)),
        part("groups", _groups(settings)),
        part("waiting", in_redis(_waiting)),
        part("replay", in_redis(_replay)),
    )
    problems = [f"{name}: {why}" for name, why in errors.items()]
    if "workers" not in errors:
        problems += _problems(workers)
    return {
        "kafka": settings.kafka_address,
        "redis": settings.redis_shown,
        "workers": workers,
        "groups": groups,
        "waiting": waiting,
        "replay": replay,
        "weights": [
            {"worker": w["name"], "kind": w["kind"], "model_id": model_id, **state}
            for w in workers
            for model_id, state in w["models"].items()
        ],
        "errors": errors,
        "problems": problems,
    }


async def _ping(settings: Settings) -> None:
    """Raises the error of a Redis that does not answer in time, or refuses."""
    async with async_redis_client(settings) as client:
        try:
            await asyncio.wait_for(client.ping(), TIMEOUT_S)
        except TimeoutError:
            raise redis.TimeoutError(f"no answer within {TIMEOUT_S:g} s") from None


def _problems(workers: Rows) -> list[str]:
    running = {w["kind"] for w in workers if w["state"] != "missing"}
    problems = [f"no {kind} worker runs" for kind in WORKER_PORTS if kind not in running]
    for worker in workers:
        if worker["state"] == "missing":
            problems.append(
                f"{worker['name']} is missing: its last heartbeat is {_span(worker['age_s'])} old"
            )
        elif worker["state"] == "not ready":
            why = "; ".join(f"{k}: {v}" for k, v in worker["missing"].items()) or "it is stopping"
            problems.append(f"{worker['name']} is not ready: {why}")
    return problems


async def _workers(settings: Settings) -> Rows:
    """All workers that report to this Redis."""
    async with async_redis_client(settings) as client:
        return [_row(seen) for seen in await read_heartbeats(client, settings.topic_prefix)]


def _row(seen: Seen) -> dict[str, Any]:
    it = seen.heartbeat
    state = "missing" if seen.is_missing else "ready" if it.ready else "not ready"
    row: dict[str, Any] = msgspec.to_builtins(it)
    row |= {"partitions": it.activity.partitions, "models_total": it.activity.models_total}
    row["models"] = {name: msgspec.structs.asdict(model) for name, model in it.activity.models.items()}
    del row["activity"], row["ready"]
    return row | {"state": state, "age_s": round(seen.age_s, 1)}


async def _groups(settings: Settings) -> Rows:
    """For each consumer group and topic: members of the group, its lag, and the age of its next event."""
    topics = Topics.of(settings)
    reads = {
        settings.joiner_group: (topics.interactions, topics.replies),
        settings.trainer_group: (topics.experiences,),
    }
    rows = []
    async with started(AIOKafkaAdminClient(**kafka_client_options(settings))) as admin:
        existing = sorted(
            {name for names in reads.values() for name in names} & set(await admin.list_topics())
        )
        async with reading(settings, existing, committed_only=False) as consumer:
            partitions = sorted(consumer.assignment())
            ends = await consumer.end_offsets(partitions)
            starts = await consumer.beginning_offsets(partitions)
            for group, names in reads.items():
                members, committed = await _group(admin, group)
                for name in sorted(set(names).intersection(existing)):
                    mine = [p for p in partitions if p.topic == name]
                    next_ = {p: max(committed.get(p, 0), starts[p]) for p in mine}
                    rows.append(
                        {
                            "group": group,
                            "members": members,
                            "topic": name,
                            "events": sum(ends[p] for p in mine),
                            "lag": sum(ends[p] - next_[p] for p in mine),
                            "behind_s": await _behind(
                                consumer, {p: at for p, at in next_.items() if at < ends[p]}
                            ),
                        }
                    )
    return rows


async def _behind(consumer: AIOKafkaConsumer, next_: dict[TopicPartition, int]) -> float | None:
    """Age in seconds of the oldest of the records at these offsets; None if there are none."""
    for partition in consumer.assignment():
        if partition in next_:
            consumer.resume(partition)
            consumer.seek(partition, next_[partition])
        else:
            consumer.pause(partition)
    oldest: dict[TopicPartition, int] = {}
    deadline = time.monotonic() + TIMEOUT_S / 2
    while len(oldest) < len(next_) and time.monotonic() < deadline:
        for partition, records in (await consumer.getmany(timeout_ms=200)).items():
            oldest.setdefault(partition, records[0].timestamp)
            consumer.pause(partition)
    return round(max(0.0, time.time() - min(oldest.values()) / 1000), 1) if oldest else None


async def _group(admin: AIOKafkaAdminClient, group: str) -> tuple[int, dict[TopicPartition, int]]:
    """Number of members of a consumer group, and its next offset in each partition."""
    committed = await committed_offsets(admin, group)
    answers = await admin.describe_consumer_groups([group])
    # A group is described as (error, id, state, protocol type, protocol, members, …).
    members = sum(len(described[5]) for answer in answers for described in answer.groups)
    return members, committed


async def _waiting(settings: Settings) -> Rows:
    """The interaction that has waited longest for a reply; none if none waits."""
    oldest: tuple[float, str, str] | None = None
    conversations = 0
    async with async_redis_client(settings) as client:
        prefix = settings.topic_prefix
        states = RedisStates(client, prefix, settings.join_window_s, Trail(client, prefix))
        pipe = client.pipeline(transaction=False)
        for partition in range(MAX_PARTITIONS):
            pipe.zcard(states.due_key(partition))
            # By the time of their next change, which also is the end of the wait of a reply.
            pipe.zrange(states.due_key(partition), 0, FIRST_DUE - 1)
        answers = await pipe.execute()
        for open_, first in zip(answers[::2], answers[1::2], strict=True):
            conversations += open_
            for stored in (await states.load(c.decode() for c in first)).values():
                waiting = [it for it in stored.conversation.in_order() if it.body is not None]
                waiting = [it for it in waiting if not stored.conversation.replies_of(it)]
                for it in waiting[:1]:
                    oldest = min(oldest or (it.at, it.id, it.occurred_at), (it.at, it.id, it.occurred_at))
    if oldest is None:
        return []
    at, interaction_id, occurred_at = oldest
    return [
        {
            "conversations": conversations,
            "oldest_interaction": interaction_id,
            "occurred_at": occurred_at,
            "age_s": round(max(0.0, time.time() - at), 1),
        }
    ]


async def _replay(settings: Settings) -> Rows:
    """Number of entries in replay, by model."""

    with redis_client(settings) as client:
        entries = await asyncio.to_thread(sizes, client, settings.topic_prefix)
    return [{"model_id": name, "entries": count} for name, count in entries.items()]


def show(report: dict[str, Any], console: Console | None = None) -> None:
    """Prints a report as tables."""
    console = console or Console()
    console.print(f"Kafka {report['kafka']}   Redis {report['redis']}", highlight=False)
    table(
        "Workers",
        ["name", "state", "pid", "up", "release", "partitions", "models"],
        [
            [
                w["name"],
                w["state"],
                str(w["pid"]),
                _span(time.time() - w["started"]),
                w["release"],
                str(len(w["partitions"])),
                str(w["models_total"]),
            ]
            for w in report["workers"]
        ],
        console,
    )
    table(
        "Consumer groups",
        ["group", "members", "topic", "events", "lag", "behind"],
        [
            [g["group"], str(g["members"]), g["topic"], str(g["events"]), str(g["lag"]), _span(g["behind_s"])]
            for g in report["groups"]
        ],
        console,
    )
    for w in report["waiting"]:
        oldest = f"{w['oldest_interaction']}, {_span(w['age_s'])}; {w['conversations']} open conversations"
        console.print(shown(f"Oldest interaction that waits for a reply: {oldest}"))
    table(
        "Replay",
        ["model", "entries"],
        [[r["model_id"], str(r["entries"])] for r in report["replay"]],
        console,
    )
    table(
        "Weights",
        ["model", "version", "control", "worker"],
        [[w["model_id"], str(w["version"]), _control(w), w["worker"]] for w in report["weights"]],
        console,
    )
    for problem in report["problems"]:
        console.print(shown(problem, style="red"))


def _control(state: dict[str, Any]) -> str:
    """An operator's commands for a model, as one worker knows them."""
    pinned = f"pinned to {state['pinned']}" if state["pinned"] is not None else ""
    return ", ".join(filter(None, (pinned, "paused" if state["paused"] else ""))) or "-"


def _span(seconds: float | None) -> str:
    """A duration, such as 7 s, 12 min or 3.5 h."""
    if seconds is None:
        return "-"
    units = ((86_400, "d"), (3_600, "h"), (60, "min"))
    size, unit = next(((size, unit) for size, unit in units if seconds >= 2 * size), (1, "s"))
    return f"{seconds / size:.0f} {unit}"


def table(title: str, columns: list[str], rows: list[list[str]], console: Console | None = None) -> None:
    """Prints a table, or one line if it is empty."""
    console = console or Console()
    if not rows:
        console.print(f"{title}: none", highlight=False)
        return
    grid = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        grid.add_column(column, overflow="fold")  # on a narrow terminal, nothing is cut
    for row in rows:
        grid.add_row(*map(shown, row))
    console.print(grid)


def shown(text: str, style: str = "") -> Text:
    """A text for the terminal: markup and control characters, as ids in events may have, do nothing."""
    return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text), style)
