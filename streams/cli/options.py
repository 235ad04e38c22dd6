"""Common code of the commands: options, settings from flags, and errors as one line and an exit code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from cortex_core.errors import ConfigError, CortexError

if TYPE_CHECKING:
    from streams.settings import Settings


class Group(TyperGroup):
    """Converts a CortexError into one line and an exit code."""

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


# Options of most commands. Other settings are `CORTEX_*` variables, see streams/settings.py.
Kafka = Annotated[
    str | None,
    typer.Option(
        "--kafka", metavar="HOST:PORT", help="Bootstrap servers. Default: those of the running stack."
    ),
]
Redis = Annotated[
    str | None,
    typer.Option("--redis", metavar="URL", help="redis://host:port/db. Default: that of the running stack."),
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
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]


def load(**flags: Any) -> Settings:
    from streams.settings import Settings

    if "redis" in flags:
        flags["redis_url"] = flags.pop("redis")
        if has_password(flags["redis_url"] or ""):
            raise ConfigError(
                "--redis has a password, which every user of this machine can read: set CORTEX_REDIS_URL"
            )
    return Settings.load(**flags)


def has_password(url: str) -> bool:
    """Whether a Redis URL has a password; False for an invalid URL, which `Settings` refuses."""
    from urllib.parse import parse_qs, urlsplit

    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return bool(parts.password or "password" in parse_qs(parts.query))


UNUSED = "redis://127.0.0.1/0"
"""Placeholder for commands that use only Kafka, so that Redis need not be configured."""


def run(work: Any, settings: Settings) -> Any:
    """Runs a coroutine; converts errors of Kafka and Redis into a `CortexError`, which is one line.

    SIGTERM cancels it, so that it releases what it holds; the exit code is then that of the signal.
    """
    import asyncio
    import contextlib
    import signal

    from streams.connections import explain
    from streams.failures import refused_command

    async def explained() -> Any:
        task = asyncio.current_task()
        assert task is not None
        with contextlib.suppress(RuntimeError):  # only the main thread gets signals
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        try:
            return await work
        except Exception as error:
            meaning = await explain(error, settings) or refused_command(error, settings)
            if meaning is None or meaning is error:
                raise
            raise meaning from error

    try:
        return asyncio.run(explained())
    except asyncio.CancelledError:
        raise typer.Exit(128 + signal.SIGTERM) from None
