"""The command: `python -m tests.chaos --rounds 100 --seed 0`; `make chaos` runs it.

The exit code is 0 if no round had a deviation, 1 if one had, 2 if a setting is invalid.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path

import structlog
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cortex_core.errors import CortexError
from streams.settings import Settings
from tests.chaos import report
from tests.chaos.rounds import Chaos, Round, settings_of

log = logging.getLogger("chaos")


async def play(settings: Settings, rounds: int, seed: int, console: Console) -> report.Run:
    """Plays rounds until one has a deviation."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    began, played = time.monotonic(), list[Round]()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("starting", total=rounds)

        def say(text: str) -> None:
            bar.update(task, description=text)
            log.info(text)

        async with Chaos.running(settings, seed, say) as chaos:
            for _ in range(rounds):
                it = await chaos.play()
                played.append(it)
                bar.print(line(it))
                bar.advance(task)
                if it.deviations:
                    bar.print(f"round {it.number} of seed {seed}: {chaos.keep(it)}")
                    break
            return report.Run(played, seed, chaos.load.failed, time.monotonic() - began)


def line(it: Round) -> str:
    """A round in one line, and one for each deviation."""
    faults = " and ".join(map(str, it.faults))
    figures = (
        f"joined {it.recovery.joined_s:4.1f} s, learned {it.recovery.learned_s:4.1f} s, "
        f"call {it.recovery.call_s:4.1f} s"
        if it.recovery
        else "no recovery"
    )
    result = "[red]NOT clean[/red]" if it.deviations else "clean"
    notes = [f"      {escape(text[:2_000])}" for text in (*it.unasked, *it.deviations)]
    return "\n".join(
        [
            f"{it.number:>4}  {faults:<40} {figures}, {it.events:>7,} events, {it.seconds:4.1f} s: {result}",
            *notes,
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Kills, stops and restarts processes, and checks what is stored."
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, help="write the figures to this Markdown file")
    parser.add_argument("--data", type=Path, help="a new folder for all data; default: a temporary one")
    arguments = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 120
    data = arguments.data or Path(tempfile.mkdtemp(prefix="cortex-chaos-"))
    console.print(f"{arguments.rounds} rounds, seed {arguments.seed}; data and logs: {data}")
    (data / "logs").mkdir(parents=True, exist_ok=True)
    # What our own clients log while their servers are down.
    own_log = (data / "logs" / "chaos.log").open("a", encoding="utf-8")
    logging.basicConfig(stream=own_log, level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(own_log))
    try:
        run = asyncio.run(play(settings_of(data), arguments.rounds, arguments.seed, console))
    except CortexError as error:
        console.print(f"chaos: {escape(str(error))}", style="red")
        return 2
    except KeyboardInterrupt:
        return 130
    for table in report.tables(run):
        console.print(table)
    if arguments.report:
        arguments.report.write_text(report.markdown(run), encoding="utf-8")
    if not run.is_good:
        console.print(f"data and logs: {data}", style="red")
        return 1
    if arguments.data is None:
        shutil.rmtree(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
