"""The command line: `cortex up`, `cortex demo`, one command for each worker, and what operators need.

Each command imports what it runs when it runs: `--help` loads neither torch nor a client. Unusable settings
end a command with one line and exit code 2, a server that does not answer with exit code 1.
"""

from __future__ import annotations

import importlib
import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from cortex_core.errors import ConfigError, CortexError

if TYPE_CHECKING:
    from streams.settings import Settings


class Group(TyperGroup):
    """Turns the errors that this project raises on purpose into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CortexError as error:
            typer.echo(f"cortex: {error}", err=True)
            raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None


def group(**kwargs: Any) -> typer.Typer:
    return typer.Typer(
        cls=Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, **kwargs
    )


app = group(help="A learned layer around frozen LLM agents: user replies become better weights, live.")
topics_app = group(help="Create the topics, or show how they are.")
letters_app = group(help="Show what could not be read, or send it in again.")
app.add_typer(topics_app, name="topics")
app.add_typer(letters_app, name="dead-letters")

# What most commands take. Everything else is set by `CORTEX_*` variables, see streams/settings.py.
Kafka = Annotated[
    str | None,
    typer.Option("--kafka", metavar="HOST:PORT", help="Bootstrap servers. Default: the running stack's."),
]
Redis = Annotated[
    str | None,
    typer.Option("--redis", metavar="URL", help="redis://host:port/db. Default: the running stack's."),
]
OwnKafka = Annotated[
    str | None,
    typer.Option("--kafka", metavar="HOST:PORT", help="Your own Kafka instead of the embedded one."),
]
OwnRedis = Annotated[
    str | None,
    typer.Option("--redis", metavar="URL", help="Your own Redis instead of the embedded one."),
]
Data = Annotated[
    Path | None,
    typer.Option("--data", metavar="DIR", help="Data folder of the stack. Default: ~/.local/share/cortex."),
]
Port = Annotated[
    int | None,
    typer.Option("--port", min=0, max=65535, help="HTTP port; 0 for a free one."),
]
Host = Annotated[str | None, typer.Option("--host", help="Address to listen on.")]
Prefix = Annotated[
    str | None,
    typer.Option("--topic-prefix", metavar="PREFIX", help="Topics are named PREFIX.interactions and so on."),
]
LogLevel = Annotated[
    str | None,
    typer.Option("--log-level", metavar="LEVEL", help="debug, info, warning or error."),
]
LogFormat = Annotated[
    str | None,
    typer.Option("--log-format", metavar="FORMAT", help="console or json."),
]
Model = Annotated[str | None, typer.Option("--model", metavar="ID", help="One model only.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]


def load(**flags: Any) -> Settings:
    from streams.settings import Settings

    if "redis" in flags:
        flags["redis_url"] = flags.pop("redis")
    return Settings.load(**flags)


# --- everything at once -------------------------------------------------------------------------------------


@app.command()
def up(
    joiners: Annotated[int, typer.Option(min=0, help="Joiner processes.")] = 1,
    trainers: Annotated[int, typer.Option(min=0, help="Trainer processes.")] = 1,
    inference: Annotated[int, typer.Option(min=0, help="Inference processes.")] = 2,
    kafka: OwnKafka = None,
    redis: OwnRedis = None,
    data: Data = None,
    host: Host = None,
    port: Annotated[
        int | None,
        typer.Option("--port", min=0, max=65535, help="Port of the first inference worker; 0 for free ones."),
    ] = None,
    topic_prefix: Prefix = None,
    log_level: LogLevel = None,
    log_format: LogFormat = None,
) -> None:
    """Start everything on this machine: Kafka, Redis, joiner, trainer, inference. Ctrl-C stops all."""
    settings = load(
        kafka=kafka,
        redis=redis,
        data=data,
        host=host,
        port=port,
        topic_prefix=topic_prefix,
        log_level=log_level,
        log_format=log_format,
    )
    from streams.stack import Stack, run_until_signal

    stack = Stack(settings, joiners=joiners, trainers=trainers, inference=inference, on_event=say)

    def on_up() -> None:
        say("")
        say(
            "Agents talk to     "
            + "\n                   ".join(stack.inference_urls or ["(no inference worker)"])
        )
        say(f"Kafka              {stack.kafka}")
        say(f"Redis              {stack.settings.redis_shown}")
        say(f"Data and logs      {settings.data}")
        say(
            "`cortex status` shows more, `cortex logs` what the workers say. Ctrl-C stops all; the data stay."
        )
        say("")

    run_until_signal(stack, on_up)


@app.command()
def demo(
    seconds: Annotated[float, typer.Option(help="How long the users talk.")] = 90.0,
    rate: Annotated[float, typer.Option(help="Interactions a second.")] = 15.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same users and requests.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Figures as JSON.")] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="The learning curve as PNG.")
    ] = None,
    kafka: OwnKafka = None,
    redis: OwnRedis = None,
    data: Data = None,
    topic_prefix: Prefix = None,
    log_level: LogLevel = None,
) -> None:
    """Start everything, let simulated users talk, and show how it learns from their replies."""
    settings = load(kafka=kafka, redis=redis, data=data, topic_prefix=topic_prefix, log_level=log_level)
    from streams.demo.run import run_demo

    run_demo(settings, seconds=seconds, rate=rate, seed=seed, json_path=json_file, plot_path=plot_file)


def say(text: str) -> None:
    typer.echo(text, err=True)


# --- one worker ---------------------------------------------------------------------------------------------


def worker_command(name: str, default_port: int, what: str) -> None:
    """Adds the command of one worker; each has a port of its own, so that one machine can run them all."""

    def command(
        kafka: Kafka = None,
        redis: Redis = None,
        data: Data = None,
        host: Host = None,
        port: Port = None,
        topic_prefix: Prefix = None,
        log_level: LogLevel = None,
        log_format: LogFormat = None,
    ) -> None:
        settings = load(
            kafka=kafka,
            redis=redis,
            data=data,
            host=host,
            port=port,
            topic_prefix=topic_prefix,
            log_level=log_level,
            log_format=log_format,
        ).resolved()
        if "port" not in settings.model_fields_set:
            settings = settings.model_copy(update={"port": default_port})
        importlib.import_module(f"streams.{name}").main(settings)

    app.command(name, help=f"{what} HTTP port {default_port} unless set.")(command)


worker_command("joiner", 8081, "Join interactions with replies; fill replay and the experiences topic.")
worker_command("trainer", 8082, "Learn from experiences; publish weights.")
worker_command("inference", 8080, "Serve decisions and take replies over HTTP; follow the weights.")


# --- operating ----------------------------------------------------------------------------------------------


@topics_app.command("create")
def topics_create(kafka: Kafka = None, data: Data = None, topic_prefix: Prefix = None) -> None:
    """Create the topics that are missing; says which."""
    settings = load(kafka=kafka, data=data, topic_prefix=topic_prefix, redis=UNUSED).resolved()
    from streams.topics import create_topics

    created = run(create_topics(settings), settings)
    typer.echo("\n".join(f"created {name}" for name in created) or "all topics exist")


@topics_app.command("show")
def topics_show(
    kafka: Kafka = None, data: Data = None, topic_prefix: Prefix = None, as_json: AsJson = False
) -> None:
    """Show each topic's partitions, and where its settings differ from what they must be."""
    settings = load(kafka=kafka, data=data, topic_prefix=topic_prefix, redis=UNUSED).resolved()
    from streams.topics import describe_topics

    rows = run(describe_topics(settings), settings)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    from streams.status import table

    table(
        "Topics",
        ["topic", "partitions", "settings"],
        [
            [
                str(row["topic"]),
                str(row["partitions"]) if row["exists"] else "-",
                ("as they must be" if not row["differs"] else f"differ: {row['differs']}")
                if row["exists"]
                else "does not exist: `cortex topics create`",
            ]
            for row in rows
        ],
    )


@app.command()
def status(
    kafka: Kafka = None,
    redis: Redis = None,
    data: Data = None,
    topic_prefix: Prefix = None,
    as_json: AsJson = False,
) -> None:
    """Show workers and their readiness, lag of the consumer groups, replay sizes and weights versions."""
    settings = load(kafka=kafka, redis=redis, data=data, topic_prefix=topic_prefix).resolved()
    from streams.status import collect, show

    report = run(collect(settings), settings)
    typer.echo(json.dumps(report, indent=1)) if as_json else show(report)


@app.command()
def logs(
    name: Annotated[
        str | None,
        typer.Argument(help="kafka, redis, joiner-1, … or a beginning of it. Default: all."),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Lines of each log to begin with.")] = 20,
    data: Data = None,
) -> None:
    """Show the logs of the stack's servers and workers."""
    settings = load(data=data)
    from streams.logs import show_logs

    show_logs(settings.data / "logs", name, lines=lines, follow=follow)


class Action(StrEnum):
    """What can be asked of a model."""

    rollback = "rollback"
    pin = "pin"
    unpin = "unpin"
    pause = "pause"
    resume = "resume"


@app.command()
def control(
    action: Annotated[
        Action,
        typer.Argument(
            help="rollback: publish an older version as a new one. pin: serve one version and stop learning, "
            "until unpin. pause: stop learning, until resume."
        ),
    ],
    model_id: Annotated[str, typer.Argument(metavar="MODEL")] = "default",
    to_version: Annotated[
        int | None,
        typer.Option("--version", min=1, help="For rollback (default: the one before) and pin (the newest)."),
    ] = None,
    reason: Annotated[str, typer.Option(help="Kept with the event.")] = "",
    kafka: Kafka = None,
    data: Data = None,
    topic_prefix: Prefix = None,
) -> None:
    """Roll a model back, hold it at a version, or stop its learning for a while."""
    settings = load(kafka=kafka, data=data, topic_prefix=topic_prefix, redis=UNUSED).resolved()
    from streams.control import send_control

    event = run(send_control(settings, action.value, model_id, to_version, reason), settings)
    which = f" to version {event.version}" if event.version else ""
    typer.echo(f"asked for {event.action} of {event.model_id}{which}")


@app.command()
def version() -> None:
    """Show the version."""
    from importlib.metadata import version as version_of

    typer.echo(f"cortex-streams {version_of('cortex-streams')}")


# --- helpers ------------------------------------------------------------------------------------------------

UNUSED = "redis://127.0.0.1/0"
"""For commands that only speak to Kafka, so that they ask for no Redis."""


def run(work: Any, settings: Settings) -> Any:
    """Runs a coroutine; a server that does not answer becomes one clear line."""
    import asyncio

    from aiokafka.errors import KafkaError
    from redis import RedisError

    from cortex_core.errors import UnavailableError

    try:
        return asyncio.run(work)
    except KafkaError as error:
        raise UnavailableError(
            f"Kafka at {settings.kafka_address} does not answer ({type(error).__name__}: {error})"
        ) from error
    except RedisError as error:
        raise UnavailableError(
            f"Redis at {settings.redis_shown} does not answer ({type(error).__name__}: {error})"
        ) from error


if __name__ == "__main__":
    app()
