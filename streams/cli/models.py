"""The commands `cortex models`: list, show, forget. Used by `streams.cli.operate`."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cortex_core.errors import InputError
from streams.cli.options import AsJson, Data, Kafka, Prefix, Redis, group, load, run

if TYPE_CHECKING:
    from streams.settings import Settings

app = group(help="Show the models, or forget one.")
WAIT_S = 10.0
"""How long `forget` waits for a trainer."""

ModelId = Annotated[str, typer.Argument(metavar="ID")]


@app.command("list")
def models_list(
    kafka: Kafka = None,
    redis: Redis = None,
    data: Data = None,
    topic_prefix: Prefix = None,
    as_json: AsJson = False,
) -> None:
    """Show each model: its version, strategies, experiences in replay, last change, and pin."""
    settings = load(kafka=kafka, redis=redis, data=data, topic_prefix=topic_prefix).resolved()
    rows = [_summary(row) for row in run(collect(settings), settings)]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    from streams.cli.status import table

    columns = ["id", "version", "strategies", "experiences", "last change", "pinned"]
    names = ["model_id", "version", "strategies", "experiences", "changed_at", "pinned"]
    table("Models", columns, [[_shown(row[name]) for name in names] for row in rows])


@app.command("show")
def models_show(
    model_id: ModelId,
    kafka: Kafka = None,
    redis: Redis = None,
    data: Data = None,
    topic_prefix: Prefix = None,
    as_json: AsJson = False,
) -> None:
    """Show one model and its kept versions: the choices for a rollback or a pin."""
    settings = load(kafka=kafka, redis=redis, data=data, topic_prefix=topic_prefix).resolved()
    row = _find(run(collect(settings), settings), model_id)
    if as_json:
        typer.echo(json.dumps(row, indent=1))
        return
    for name, value in row.items():
        if name != "versions":
            typer.echo(f"{name.replace('_', ' '):<14}{_shown(value)}")
    from streams.cli.status import table

    names = ["version", "parent", "reason", "updates", "interactions", "ema_loss", "created_at"]
    rows = [[_shown(version[name]) for name in names] for version in row["versions"]]
    table("Kept versions", [name.replace("_", " ") for name in names], rows)


@app.command("forget")
def models_forget(
    model_id: ModelId,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    kafka: Kafka = None,
    redis: Redis = None,
    data: Data = None,
    topic_prefix: Prefix = None,
) -> None:
    """Delete a model's weights, replay and commands. An interaction with its id starts it anew, untrained.

    A trainer does it. Events stay in their topics until they expire.
    """
    settings = load(kafka=kafka, redis=redis, data=data, topic_prefix=topic_prefix).resolved()
    row = _find(run(collect(settings), settings), model_id)
    if not yes:
        what = f"version {row['version']} of {model_id} and its {row['experiences']} experiences in replay"
        typer.confirm(f"Delete {what}?", abort=True)
    if run(_forget(settings, model_id), settings):
        typer.echo(f"{model_id} is forgotten")
    else:
        typer.echo(f"requested: a trainer forgets {model_id} as soon as one is ready", err=True)


async def _forget(settings: Settings, model_id: str) -> bool:
    """Whether a trainer has done it within `WAIT_S`."""
    from streams.weights.control import send_control, wait_until_forgotten

    await send_control(settings, "forget", model_id)
    try:
        async with asyncio.timeout(WAIT_S):
            await wait_until_forgotten(settings, model_id)
    except TimeoutError:
        return False
    return True


async def collect(settings: Settings) -> list[dict[str, Any]]:
    """All models that have a version, replay, or a command in force; sorted by id.

    Raises:
        KafkaError, redis.RedisError, OSError: a server does not answer.
    """
    from streams.connections import redis_client
    from streams.kafka.topics import create_topics
    from streams.replay_store import sizes
    from streams.weights.control import NO_CONTROL, read_controls
    from streams.weights.versions import read_versions

    await create_topics(settings)
    versions, controls = await asyncio.gather(read_versions(settings), read_controls(settings))
    with redis_client(settings) as client:
        entries = await asyncio.to_thread(sizes, client, settings.topic_prefix)
    commanded = {name for name, control in controls.items() if control.training_paused or control.forget}
    rows = []
    for model_id in sorted({*versions.models(), *entries, *commanded}):
        newest, control = versions.newest(model_id), controls.get(model_id, NO_CONTROL)
        kept = [m.model_dump(mode="json", exclude={"architecture"}) for m in versions.history(model_id)]
        rows.append(
            {
                "model_id": model_id,
                "version": newest.version if newest else 0,
                "strategies": newest.architecture.get("strategies", []) if newest else [],
                "experiences": entries.get(model_id, 0),
                "changed_at": newest.created_at.isoformat(timespec="seconds") if newest else None,
                "pinned": control.pinned,
                "paused": control.paused,
                "architecture": newest.architecture if newest else None,
                "versions": kept,
            }
        )
    return rows


def _summary(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("architecture", "versions")}


def _find(rows: list[dict[str, Any]], model_id: str) -> dict[str, Any]:
    for row in rows:
        if row["model_id"] == model_id:
            return row
    names = [row["model_id"] for row in rows]
    known = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    raise InputError(f"no model {model_id!r}; models are: {known or 'none'}")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return "-" if value is None else str(value)
