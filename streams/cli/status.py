"""Status of a stack: workers and readiness, lag of the consumer groups, replay sizes, weights versions.

The parts are queried independently: one that does not answer is reported and does not hide the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

import httpx
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from rich.console import Console
from rich.table import Table

from streams.connections import explain, kafka_client_options, redis_client
from streams.failures import error_text
from streams.kafka.clients import started
from streams.kafka.groups import committed_offsets
from streams.kafka.reader import reading
from streams.kafka.topics import Topics
from streams.replay_store import RedisReplayBuffer, model_ids
from streams.settings import Settings

TIMEOUT_S = 5.0


async def collect(settings: Settings) -> dict[str, Any]:
    """The data for `show`: kafka, redis, workers, groups, replay, weights, errors.

    Args:
        settings: resolved.
    """
    errors: dict[str, str] = {}

    async def part(name: str, work: Awaitable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
        try:
            return await asyncio.wait_for(work, 2 * TIMEOUT_S)
        except Exception as error:  # reported; the other parts are still shown
            errors[name] = str(await explain(error, settings) or error_text(error))
            return []

    workers, groups, replay, weights = await asyncio.gather(
        part("workers", _workers(settings)),
        part("groups", _groups(settings)),
        part("replay", _replay(settings)),
        part("weights", _weights(settings)),
    )
    return {
        "kafka": settings.kafka_address,
        "redis": settings.redis_shown,
        "workers": workers,
        "groups": groups,
        "replay": replay,
        "weights": weights,
        "errors": errors,
    }


async def _workers(settings: Settings) -> list[dict[str, Any]]:
    """The workers of the stack; none if no stack runs on the data folder."""

    async def one(http: httpx.AsyncClient, name: str, worker: dict[str, Any]) -> dict[str, Any]:
        row: dict[str, Any] = {"name": name, "pid": worker["pid"], "port": worker["port"]}
        try:
            answer = await http.get(f"http://{host}:{worker['port']}/readyz")
            body = answer.json()
            return row | {"ready": answer.status_code == 200, "missing": body.get("missing", {})}
        except (httpx.HTTPError, ValueError) as error:
            return row | {"ready": False, "missing": {"http": f"{type(error).__name__}: {error}"}}

    host = settings.local_host
    known: dict[str, Any] = settings.running_stack().get("workers", {})
    async with httpx.AsyncClient(timeout=TIMEOUT_S) as http:
        return list(await asyncio.gather(*(one(http, name, worker) for name, worker in known.items())))


async def _groups(settings: Settings) -> list[dict[str, Any]]:
    """For each consumer group and topic: members of the group, and its lag."""
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
                done = {p: committed.get(p, -1) for p in mine}
                lag = sum(ends[p] - (done[p] if done[p] >= 0 else starts[p]) for p in mine)
                events = sum(ends[p] for p in mine)
                rows.append({"group": group, "members": members, "topic": name, "events": events, "lag": lag})
    return rows


async def _group(admin: AIOKafkaAdminClient, group: str) -> tuple[int, dict[TopicPartition, int]]:
    """Number of members of a consumer group, and its next offset in each partition."""
    committed = await committed_offsets(admin, group)
    answers = await admin.describe_consumer_groups([group])
    # A group is described as (error, id, state, protocol type, protocol, members, …).
    members = sum(len(described[5]) for answer in answers for described in answer.groups)
    return members, committed


async def _replay(settings: Settings) -> list[dict[str, Any]]:
    """Number of entries in replay, by model."""

    def sizes() -> list[dict[str, Any]]:
        with redis_client(settings) as client:
            return [
                {"model_id": name, "entries": len(RedisReplayBuffer.of(settings, name, client))}
                for name in model_ids(client, settings.topic_prefix)
            ]

    return await asyncio.to_thread(sizes)


async def _weights(settings: Settings) -> list[dict[str, Any]]:
    """The version that each inference worker of the stack serves, by model."""
    rows = []
    async with httpx.AsyncClient(timeout=TIMEOUT_S) as http:
        for url in settings.running_stack().get("inference", []):
            answer = await http.get(f"{url}/v1/models")
            rows += [{"worker": url, **model} for model in answer.raise_for_status().json()["models"]]
    return rows


def show(report: dict[str, Any], console: Console | None = None) -> None:
    """Prints a report as tables."""
    console = console or Console()
    console.print(f"Kafka {report['kafka']}   Redis {report['redis']}", highlight=False)
    table(
        "Workers",
        ["name", "pid", "port", "ready"],
        [
            [
                w["name"],
                str(w["pid"]),
                str(w["port"]),
                "yes" if w["ready"] else "no: " + "; ".join(f"{k}: {v}" for k, v in w["missing"].items()),
            ]
            for w in report["workers"]
        ],
        console,
    )
    table(
        "Consumer groups",
        ["group", "members", "topic", "events", "lag"],
        [
            [g["group"], str(g["members"]), g["topic"], str(g["events"]), str(g["lag"])]
            for g in report["groups"]
        ],
        console,
    )
    table(
        "Replay",
        ["model", "entries"],
        [[r["model_id"], str(r["entries"])] for r in report["replay"]],
        console,
    )
    table(
        "Weights served",
        ["model", "version", "inference worker"],
        [[w["model_id"], str(w["version"]), w["worker"]] for w in report["weights"]],
        console,
    )
    for name, why in report["errors"].items():
        console.print(f"{name}: {why}", style="red", highlight=False)


def table(title: str, columns: list[str], rows: list[list[str]], console: Console | None = None) -> None:
    """Prints a table, or one line if it is empty."""
    console = console or Console()
    if not rows:
        console.print(f"{title}: none", highlight=False)
        return
    grid = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        grid.add_column(column)
    for row in rows:
        grid.add_row(*row)
    console.print(grid)
