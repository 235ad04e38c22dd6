"""The commands of operators: topics, status, audit, logs, rebuild, dead letters, models, control."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from cortex_core.errors import ConfigError, InputError
from streams.cli import models
from streams.cli.options import UNUSED, AsJson, Data, Kafka, Prefix, Redis, group, load, run

if TYPE_CHECKING:
    from datetime import datetime

app = group()
topics_app = group(help="Create or show the topics.")
letters_app = group(help="Show dead letters, or retry them.")
app.add_typer(topics_app, name="topics")
app.add_typer(letters_app, name="dead-letters")
app.add_typer(models.app, name="models")


@topics_app.command("create")
def topics_create(kafka: Kafka = None, data: Data = None, topic_prefix: Prefix = None) -> None:
    """Create the missing topics."""
    settings = load(kafka=kafka, data=data, topic_prefix=topic_prefix, redis=UNUSED).resolved()
    from streams.kafka.topics import create_topics

    created = run(create_topics(settings), settings)
    typer.echo("\n".join(f"created {name}" for name in created) or "all topics exist")


@topics_app.command("show")
def topics_show(
    kafka: Kafka = None, data: Data = None, topic_prefix: Prefix = None, as_json: AsJson = False
) -> None:
    """Show the partitions and replicas of each topic, and settings that differ from the expected ones."""
    settings = load(kafka=kafka, data=data, topic_prefix=topic_prefix, redis=UNUSED).resolved()
    from streams.kafka.topics import describe_topics

    rows = run(describe_topics(settings), settings)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    from streams.cli.status import table

    table(
        "Topics",
        ["topic", "partitions", "replicas", "settings"],
        [
            [
                str(row["topic"]),
                str(row["partitions"]) if row["exists"] else "-",
                str(row["replicas"]) if row["exists"] else "-",
                ("as expected" if not row["differs"] else f"differ: {row['differs']}")
                if row["exists"]
                else "does not exist: `cortex topics create`",
            ]
            for row in rows
        ],
    )


@app.command()
def rebuild(
    since: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="TIME",
            help="`beginning`, or a time such as 2026-01-31T00:00:00Z (default zone: UTC).",
        ),
    ],
    model: Annotated[str | None, typer.Option("--model", metavar="ID", help="Only this model.")] = None,
    extractor: Annotated[
        str | None, typer.Option(metavar="NAME", help="Extract the feedback again with this extractor.")
    ] = None,
    kafka: Kafka = None,
    redis: Redis = None,
    data: Data = None,
    topic_prefix: Prefix = None,
) -> None:
    """Replay the topics into new replay buffers, then swap them in; joiners keep running."""
    start = None if since == "beginning" else moment(since)
    settings = load(kafka=kafka, redis=redis, data=data, topic_prefix=topic_prefix).resolved()
    from streams.joiner import rebuild as rebuilding

    with rebuilding.console_progress() as progress:
        work = rebuilding.rebuild(
            settings, since=start, model_id=model, extractor=extractor, progress=progress
        )
        report = run(work, settings)
    typer.echo(
        f"read {report.interactions} interactions and {report.replies} replies in {report.seconds:.1f} s; "
        f"{report.unreadable} invalid records, {report.unfit} experiences that do not fit their model"
    )
    for name, entries in report.models.items():
        typer.echo(f"{name}: {entries} entries")
    for name in report.untouched:
        typer.echo(f"{name}: unchanged, the topics have no events of it")
    if report.rescored is not None:
        typer.echo(
            f"rewards: {report.rescored.changed} of {report.rescored.compared} differ, by "
            f"{report.rescored.mean_change:+.3f} on average; {report.rescored.sign_flips} changed sign"
        )


def moment(text: str) -> datetime:
    """A date or time in ISO 8601; UTC if it has no zone."""
    from datetime import UTC, datetime

    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(
            f"--from is {text!r}, expected `beginning` or a time such as 2026-01-31T00:00:00Z"
        ) from None
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)


@app.command()
def forget(
    conversation: Annotated[
        str, typer.Option("--conversation", metavar="ID", help="Id of the conversation to erase.")
    ],
    kafka: Kafka = None,
    redis: Redis = None,
    data: Data = None,
    topic_prefix: Prefix = None,
) -> None:
    """Erase a conversation from replay and the joiners' state, for ever; say where Kafka still has it.

    The exit code is 1 if a joiner has not confirmed in time: then repeat the command.
    """
    if not conversation.strip():
        raise InputError("--conversation is empty, expected the id of a conversation")
    settings = load(kafka=kafka, redis=redis, data=data, topic_prefix=topic_prefix).resolved()
    from streams.joiner.forget import forget as erase

    done = run(erase(settings, conversation), settings)
    entries = ", ".join(f"{n} of {model_id}" for model_id, n in done.entries.items()) or "none"
    typer.echo(
        f"erased from Redis: replay entries: {entries}; joiner state: {'yes' if done.had_state else 'none'}"
    )
    typer.echo(
        f"events before {done.until.isoformat(timespec='seconds')} are not joined again, also by a rebuild"
    )
    typer.echo("Kafka cannot delete single records. What it still has of the conversation goes:")
    for topic, at in done.kept.items():
        typer.echo(
            f"  {topic}: " + (f"by retention, from {at.date()} on" if at else "never: it has no retention")
        )
    typer.echo("What models have learned from it stays in their weights.")
    for name in done.unconfirmed:
        typer.echo(
            f"{name} has not confirmed: it may write the conversation again; repeat this command", err=True
        )
    if done.unconfirmed:
        raise typer.Exit(1)


@letters_app.command("list")
def letters_list(
    limit: Annotated[int, typer.Option("--lines", "-n", min=1, help="Number of the newest ones.")] = 20,
    kafka: Kafka = None,
    data: Data = None,
    topic_prefix: Prefix = None,
    as_json: AsJson = False,
) -> None:
    """Show the events that a worker rejected, and why."""
    settings = load(kafka=kafka, data=data, topic_prefix=topic_prefix, redis=UNUSED).resolved()
    from streams.kafka.dead_letters import list_dead_letters

    letters = run(list_dead_letters(settings, limit), settings)
    if as_json:
        typer.echo(json.dumps([letter.model_dump(mode="json") for letter in letters], indent=1))
        return
    for letter in letters:  # no table: a narrow one would cut the ids
        at = letter.occurred_at.isoformat(timespec="seconds")
        typer.echo(f"{letter.dead_letter_id}  {at}  {letter.worker}\n    {letter.reason}")
    if not letters:
        typer.echo("no dead letters")


@letters_app.command("retry")
def letters_retry(
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID …", help="Ids as shown by `list`.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Retry all.")] = False,
    kafka: Kafka = None,
    data: Data = None,
    topic_prefix: Prefix = None,
) -> None:
    """Send dead letters to their original topics again. Safe to repeat: joined events are ignored."""
    if bool(ids) == everything:
        raise ConfigError("pass either the ids of dead letters to retry or --all")
    settings = load(kafka=kafka, data=data, topic_prefix=topic_prefix, redis=UNUSED).resolved()
    from streams.kafka.dead_letters import retry_dead_letters

    done = run(retry_dead_letters(settings, ids or None), settings)
    typer.echo(f"resent {len(done.sent)}")
    for letter_id in done.lost:
        typer.echo(f"{letter_id}: its bytes have expired", err=True)
    for letter_id in done.unknown:
        typer.echo(f"{letter_id}: unknown dead letter", err=True)
    for letter_id, reason in done.refused.items():
        typer.echo(f"{letter_id}: not sent: {reason}", err=True)
    if done.lost or done.unknown or done.refused:
        raise typer.Exit(1)


@app.command()
def status(
    kafka: Kafka = None,
    redis: Redis = None,
    data: Data = None,
    topic_prefix: Prefix = None,
    as_json: AsJson = False,
) -> None:
    """Show all workers, wherever they run, lag, the oldest waiting interaction, replay and weights versions.

    The exit code is 1 if a server does not answer, a worker is missing or not ready, or a kind of worker does
    not run.
    """
    settings = load(kafka=kafka, redis=redis, data=data, topic_prefix=topic_prefix).resolved()
    from streams.cli.status import collect, show

    report = run(collect(settings), settings)
    typer.echo(json.dumps(report, indent=1)) if as_json else show(report)
    if report["problems"]:
        raise typer.Exit(1)


@app.command()
def audit(
    since: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="TIME",
            help="Audit interactions from here on: `beginning`, or a time such as 2026-01-31T00:00:00Z.",
        ),
    ] = "beginning",
    kafka: Kafka = None,
    redis: Redis = None,
    data: Data = None,
    topic_prefix: Prefix = None,
    as_json: AsJson = False,
) -> None:
    """Join all events of the topics by brute force, and report what is lost, duplicated or wrong.

    The exit code is 1 if anything is. Set CORTEX_JOIN_WINDOW_S and CORTEX_REPLAY_CAPACITY to the values of
    the workers.
    """
    start = 0.0 if since == "beginning" else moment(since).timestamp()
    settings = load(kafka=kafka, redis=redis, data=data, topic_prefix=topic_prefix).resolved()
    from streams.audit.compare import audit as judge
    from streams.audit.reading import collect

    report = judge(run(collect(settings), settings), start)
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=1))
    else:
        from streams.cli.status import shown

        for line in report.lines():
            typer.echo(shown(line).plain)
    if not report.clean:
        raise typer.Exit(1)


@app.command()
def logs(
    name: Annotated[
        str | None,
        typer.Argument(help="kafka, redis, joiner-1, … or a prefix. Default: all."),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print new lines as they arrive.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Last lines to show of each log.")] = 20,
    data: Data = None,
) -> None:
    """Show the logs of the stack's servers and workers."""
    settings = load(data=data)
    from streams.cli.logs import show_logs

    show_logs(settings.data / "logs", name, lines=lines, follow=follow)


class OperatorCommand(StrEnum):
    """Operator commands for a model."""

    rollback = "rollback"
    pin = "pin"
    unpin = "unpin"
    pause = "pause"
    resume = "resume"


@app.command()
def control(
    action: Annotated[
        OperatorCommand,
        typer.Argument(
            help="rollback: publish an older version as a new one. pin: serve one version and stop training "
            "until unpin. pause: stop training until resume."
        ),
    ],
    model_id: Annotated[str, typer.Argument(metavar="MODEL")] = "default",
    to_version: Annotated[
        int | None,
        typer.Option(
            "--version", min=1, help="For rollback (default: the previous one) and pin (the newest)."
        ),
    ] = None,
    reason: Annotated[str, typer.Option(help="Stored with the event.")] = "",
    kafka: Kafka = None,
    data: Data = None,
    topic_prefix: Prefix = None,
) -> None:
    """Roll back a model, pin it to a version, or pause its training."""
    settings = load(kafka=kafka, data=data, topic_prefix=topic_prefix, redis=UNUSED).resolved()
    from streams.weights.control import send_control

    event = run(send_control(settings, action.value, model_id, to_version, reason), settings)
    which = f" to version {event.version}" if event.version else ""
    typer.echo(f"requested {event.action} of {event.model_id}{which}")
