"""The command line: `cortex up`, `cortex demo`, one command for each worker, and what operators need.

Each command imports what it runs when it runs: `--help` loads neither torch nor a client. Unusable settings
end a command with one line and exit code 2, a server that does not answer with exit code 1.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Annotated

import typer

from streams.cli import operate
from streams.cli.options import (
    Data,
    Host,
    Kafka,
    LogFormat,
    LogLevel,
    OwnKafka,
    OwnRedis,
    Port,
    Prefix,
    Redis,
    group,
    load,
)
from streams.ports import WORKER_PORTS

app = group(help="A learned layer around frozen LLM agents: user replies become better weights, live.")


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
    from streams.local.stack import Stack, run_until_signal

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
    rate: Annotated[float, typer.Option(help="Interactions a second.")] = 18.0,
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


def worker_command(name: str, what: str) -> None:
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
        )
        if name != "inference":  # which needs no Redis, and finds Kafka by itself
            settings = settings.resolved()
        settings = settings.of_worker(name)
        # Read by BLAS when numpy is first imported, which is now. With a thread for each core, workers that
        # share a machine wait for each other's: a decision then costs three times as much.
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(variable, str(settings.torch_threads))
        importlib.import_module(f"streams.{name}.app").main(settings)

    app.command(name, help=f"{what} HTTP port {WORKER_PORTS[name]} unless set.")(command)


worker_command("joiner", "Join interactions with replies; fill replay and the experiences topic.")
worker_command("trainer", "Learn from experiences; publish weights.")
worker_command("inference", "Serve decisions and take replies over HTTP; follow the weights.")


@app.command()
def version() -> None:
    """Show the version."""
    from importlib.metadata import version as version_of

    typer.echo(f"cortex-streams {version_of('cortex-streams')}")


app.add_typer(operate.app)
