"""Live view of the demo: a chart and figures in a terminal, log lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

LEARNED, CONTROL = "bold green", "yellow"
PLAIN_EVERY_S = 5.0
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Bits of a braille cell (U+2800 + bits): two columns of four dots, from the top."""


@dataclass(slots=True)
class Frame:
    """The displayed values at one moment; None is shown as "–"."""

    phase: str = "starting"
    elapsed_s: float = 0.0
    seconds: float = 0.0
    interactions: int = 0
    expected: int = 0
    """Number of interactions at the end."""
    replies: int = 0
    joined: int = 0
    errors: int = 0
    reward: Sequence[float] = ()
    """Moving mean, one value per interaction."""
    control: Sequence[float] = ()
    memory_precision: float | None = None
    control_precision: float | None = None
    ema_loss: float | None = None
    ece: float | None = None
    versions: Mapping[str, int] = field(default_factory=dict)
    """Inference worker → weights version that it serves."""
    events_per_s: float | None = None
    latency_ms: tuple[float, float] | None = None
    """Reply → weights: median and 99th percentile."""
    waiting_for: str = ""


def chart(
    series: Sequence[tuple[Sequence[float], str]], width: int, height: int, total: int = 0
) -> list[Text]:
    """Draws series in [0, 1] as lines of braille, with two by four dots per character; the first one is on
    top.

    Args:
        series: (values, rich style).
        width: in characters, without the axis.
        height: in lines.
        total: number of values that fill the width; more values are compressed.
    """
    bits = [[0] * width for _ in range(height)]
    styles = [[""] * width for _ in range(height)]
    for values, style in reversed(series):
        previous: int | None = None
        for x, value in _places(values, 2 * width, total):
            y = round((1.0 - min(max(value, 0.0), 1.0)) * (4 * height - 1))
            reach = y if previous is None else previous
            for dot in range(min(y, reach), max(y, reach) + 1):
                row, column = dot // 4, x // 2
                bits[row][column] |= _DOTS[x % 2][dot % 4]
                styles[row][column] = style
            previous = y
    lines = []
    for row in range(height):
        label = f"{1.0 - row / max(height - 1, 1):4.2f} ┤" if row % 2 == 0 else "     │"
        line = Text(no_wrap=True).append(label, style="dim")
        for column in range(width):
            line.append(chr(0x2800 + bits[row][column]), style=styles[row][column])
        lines.append(line)
    return lines


def _places(values: Sequence[float], columns: int, total: int) -> Iterator[tuple[int, float]]:
    """(column, value) of each column that the values reach."""
    total = max(total, len(values), 1)
    for x in range(columns):
        place = x * total // columns
        if place < len(values):
            yield x, float(values[place])


def _number(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None else format(value, form)


def render(frame: Frame, width: int = 80) -> RenderableType:
    """The frame as a panel."""
    inside = max(min(width, 110) - 6, 30)
    reward = frame.reward[-1] if len(frame.reward) else None
    control = frame.control[-1] if len(frame.control) else None
    legend = Text.assemble(
        ("━ learned ", LEARNED),
        (_number(reward, ".2f"), LEARNED),
        "   ",
        ("━ best fixed policy ", CONTROL),
        (_number(control, ".2f"), CONTROL),
        ("   true reward, moving mean", "dim"),
    )
    figures = Table.grid(padding=(0, 2), expand=True)
    for _ in range(4):
        figures.add_column(no_wrap=True)
    latency = frame.latency_ms
    precision = f"{_number(frame.memory_precision, '.2f')} (cosine {_number(frame.control_precision, '.2f')})"
    versions = "  ".join(f"{name} v{version}" for name, version in frame.versions.items()) or "–"
    cells = (
        ("interactions", f"{frame.interactions:,}"),
        ("events/s", _number(frame.events_per_s, ".0f")),
        ("replies joined", f"{frame.joined:,} of {frame.replies:,}"),
        ("memory precision", precision),
        ("EMA loss", _number(frame.ema_loss)),
        ("calibration error", _number(frame.ece)),
        ("reply → weights", f"p50 {latency[0]:.0f} ms  p99 {latency[1]:.0f} ms" if latency else "–"),
        ("errors", str(frame.errors)),
    )
    for left, right in zip(cells[::2], cells[1::2], strict=True):
        figures.add_row(Text(left[0], style="dim"), left[1], Text(right[0], style="dim"), Text(right[1]))
    share = min(frame.elapsed_s / frame.seconds, 1.0) if frame.seconds else 0.0
    left_s = max(frame.seconds - frame.elapsed_s, 0.0)
    status = f"{frame.phase}, {left_s:.0f} s left" if frame.phase == "running" else frame.phase
    progress = Table.grid(padding=(0, 1))
    waiting = f"  {frame.waiting_for}" if frame.waiting_for else ""
    progress.add_row(
        ProgressBar(total=1.0, completed=share, width=inside // 2), Text(status + waiting, "dim")
    )
    return Panel(
        Group(
            *chart([(frame.reward, LEARNED), (frame.control, CONTROL)], inside - 6, 9, frame.expected),
            legend,
            Text(),
            figures,
            Text.assemble(("weights  ", "dim"), versions),
            Text(),
            progress,
        ),
        title="cortex demo: replies become weights",
        width=inside + 6,
    )


def plain_line(frame: Frame) -> str:
    """The frame as one log line."""
    reward = frame.reward[-1] if len(frame.reward) else None
    control = frame.control[-1] if len(frame.control) else None
    latency = f"{frame.latency_ms[1]:.0f} ms" if frame.latency_ms else "–"
    return (
        f"{frame.elapsed_s:4.0f} s  {frame.phase:<9} interactions {frame.interactions:<6} "
        f"reward {_number(reward, '.2f')} (control {_number(control, '.2f')})  "
        f"EMA loss {_number(frame.ema_loss)}  calibration {_number(frame.ece)}  "
        f"weights {'/'.join(f'v{v}' for v in frame.versions.values()) or '–'}  "
        f"events/s {_number(frame.events_per_s, '.0f')}  reply→weights p99 {latency}  "
        f"errors {frame.errors}{'  ' + frame.waiting_for if frame.waiting_for else ''}"
    )


class View:
    """Shows frames on a console.

        with View(console).showing() as view:
            view.show(frame)

    Without a console it writes to standard output.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._live: Live | None = None
        self._printed: tuple[float, str] = (-PLAIN_EVERY_S, "")

    @contextmanager
    def showing(self) -> Iterator[View]:
        """Takes over the terminal, if there is one, while the body runs."""
        if not self.console.is_terminal:
            yield self
            return
        with Live(console=self.console, refresh_per_second=4, transient=True) as live:
            self._live = live
            try:
                yield self
            finally:
                self._live = None

    def show(self, frame: Frame) -> None:
        """Updates the terminal, or prints a line every few seconds."""
        if self._live is not None:
            self._live.update(render(frame, self.console.width))
            return
        at, phase = self._printed
        if frame.phase != phase or frame.elapsed_s - at >= PLAIN_EVERY_S:
            self._printed = (frame.elapsed_s, frame.phase)
            self.console.print(plain_line(frame), highlight=False, soft_wrap=True)

    def log(self, message: str) -> None:
        """Prints one line, above the frame."""
        self.console.print(message, highlight=False, soft_wrap=True, markup=False)


def summary_table(rows: Iterable[tuple[str, Any, str]]) -> Table:
    """(figure, value, description) as a table."""
    table = Table(title="cortex demo", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("figure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("description", style="dim")
    for name, value, description in rows:
        table.add_row(name, str(value), description)
    return table
