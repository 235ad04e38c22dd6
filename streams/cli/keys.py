"""`cortex keys`: API keys for the inference service."""

from __future__ import annotations

from typing import Annotated

import typer

from streams.cli.options import group

app = group()
keys = group(help="API keys of the inference service.")
app.add_typer(keys, name="keys")


@keys.command("create")
def create(
    name: Annotated[str, typer.Argument(help="Who holds the key, as errors name it: agent, shop-eu …")],
    scope: Annotated[
        list[str] | None,
        typer.Option("--scope", help="decide, reply or operate; may be repeated. Default: decide and reply."),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="A model that the key is limited to; may be repeated. Default: all."),
    ] = None,
) -> None:
    """Make a key: one line for its holder, and one for the service, which does not contain the key.

    For several keys, set CORTEX_API_KEYS to their entries with commas between.
    """
    from streams.api_keys import create_key

    secret, key = create_key(name, scope or ["decide", "reply"], model or [])
    typer.echo(f"CORTEX_API_KEY={secret}")
    typer.echo(f"CORTEX_API_KEYS={key.entry}")
