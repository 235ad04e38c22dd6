"""Shows the log files of a stack, and follows them."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import TextIO

import typer

from cortex_core.errors import ConfigError


def show_logs(folder: Path, name: str | None, *, lines: int, follow: bool, every_s: float = 0.2) -> None:
    """Prints the last lines of each log, prefixed with its name if there are several.

    Args:
        name: name of a log, or a prefix: `inference` shows all inference workers. None: all.
        lines: number of last lines of each log.
        follow: print new lines until Ctrl-C.

    Raises:
        ConfigError: no log matches.
    """
    files = [f for f in sorted(folder.glob("*.log")) if f.stem.startswith(name or "")]
    if not files:
        there = ", ".join(f.stem for f in sorted(folder.glob("*.log"))) or "none"
        raise ConfigError(f"no log {name or ''} in {folder}; available: {there}")
    width = max(len(f.stem) for f in files)

    def echo(file: Path, line: str) -> None:
        typer.echo(f"{file.stem:{width}} | {line}" if len(files) > 1 else line)

    logs: list[tuple[Path, TextIO]] = []
    try:
        for file in files:
            log: TextIO = file.open(errors="replace")
            logs.append((file, log))
            for line in deque(log, maxlen=lines):
                echo(file, line.rstrip("\n"))
        while follow:
            for file, log in logs:
                if file.stat().st_size < log.tell():  # it was rotated
                    log.seek(0)
                while line := _complete_line(log):
                    echo(file, line.rstrip("\n"))
            time.sleep(every_s)
    except KeyboardInterrupt:
        pass
    finally:
        for _, log in logs:
            log.close()


def _complete_line(log: TextIO) -> str:
    """The next line; empty if it is not complete yet."""
    before = log.tell()
    line = log.readline()
    if line.endswith("\n"):
        return line
    log.seek(before)
    return ""
