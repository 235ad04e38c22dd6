"""The command line: `cortex up`, `cortex demo`, one command per worker, and commands for operators.

Each command imports its implementation when it runs, so that `--help` loads neither torch nor a client.
Invalid settings end a command with one line and exit code 2, a server that does not answer with exit code 1.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Annotated

import typer

from streams.cli import keys, operate
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
    """Start everything on this machine: Kafka, Redis, joiner, trainer, inference. Ctrl-C stops everything."""
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

    stack = Stack(settings, joiners=joiners, trainers=trainers, inference=inference, on_event=report)

    def on_up() -> None:
        report("")
        report(
            "Agents connect to  "
            + "\n                   ".join(stack.inference_urls or ["(no inference worker)"])
        )
        report(f"Kafka              {stack.kafka}")
        report(f"Redis              {stack.settings.redis_shown}")
        report(f"Data and logs      {settings.data}")
        report("See also `cortex status` and `cortex logs`. Ctrl-C stops everything and keeps the data.")
        report("")

    run_until_signal(stack, on_up)


@app.command()
def demo(
    seconds: Annotated[float, typer.Option(help="Duration of the traffic.")] = 90.0,
    rate: Annotated[float, typer.Option(help="Interactions per second.")] = 18.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same users and requests.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the summary as JSON.")
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Write the learning curve as PNG.")
    ] = None,
    kafka: OwnKafka = None,
    redis: OwnRedis = None,
    data: Data = None,
    topic_prefix: Prefix = None,
    log_level: LogLevel = None,
) -> None:
    """Start everything with simulated users, and show how it learns from their replies."""
    settings = load(kafka=kafka, redis=redis, data=data, topic_prefix=topic_prefix, log_level=log_level)
    from streams.demo.run import run_demo

    # Only the demo itself uses its stack: no key, whatever scopes one of the environment has.
    settings = settings.model_copy(update={"host": "127.0.0.1", "api_keys": None, "api_key": None})
    run_demo(settings, seconds=seconds, rate=rate, seed=seed, json_path=json_file, plot_path=plot_file)


def report(text: str) -> None:
    typer.echo(text, err=True)


# --- one worker ---------------------------------------------------------------------------------------------


def worker_command(name: str, what: str) -> None:
    """Adds the command of one worker. Default ports differ, so that one machine can run all workers."""

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
        if name != "inference":  # which needs no Redis and resolves Kafka itself
            settings = settings.resolved()
        settings = settings.of_worker(name)
        # BLAS reads these at the first import of numpy, which follows. With one thread per core, workers on
        # the same machine compete for the cores, and a decision takes three times as long.
        for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(variable, str(settings.torch_threads))
        importlib.import_module(f"streams.{name}.app").main(settings)

    app.command(name, help=f"{what} HTTP port {WORKER_PORTS[name]} unless set.")(command)


worker_command("joiner", "Join interactions with replies; write replay and the experiences topic.")
worker_command("trainer", "Train on experiences; publish weights.")
worker_command("inference", "Serve decisions and accept replies over HTTP; follow the weights.")


@app.command()
def version() -> None:
    """Show the version."""
    from importlib.metadata import version as version_of

    typer.echo(f"cortex-streams {version_of('cortex-streams')}")


app.add_typer(keys.app)
app.add_typer(operate.app)
