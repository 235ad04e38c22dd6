"""`python -m streams.cli`."""

from streams.cli import app

app()
