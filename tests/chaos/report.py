"""The figures of a run, as a table on the terminal and as docs/chaos.md."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import psutil
from rich.table import Table

from tests.chaos.faults import ACTIONS, KINDS, Fault
from tests.chaos.rounds import Round
from tests.chaos.watch import Recovery


@dataclass(frozen=True, slots=True)
class Target:
    """How soon everything works again after a kill -9."""

    what: str
    most_s: float
    measured: Callable[[Recovery], float]


def _joined(recovery: Recovery) -> float:
    return recovery.joined_s


TARGETS = {
    "joiner": Target("replies are joined in every partition", 10.0, _joined),
    "trainer": Target(
        "every model has a version from experiences after the kill", 10.0, lambda r: r.learned_s
    ),
    "inference": Target("the longest call of a client", 5.0, lambda r: r.call_s),
    "kafka": Target("replies are joined in every partition", 10.0, _joined),
    "redis": Target("replies are joined in every partition", 10.0, _joined),
}


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run."""

    rounds: Sequence[Round]
    seed: int
    failed_calls: int
    """Calls of clients that were given up after their timeout."""
    seconds: float

    @property
    def is_good(self) -> bool:
        return not any(it.deviations for it in self.rounds)

    def of(self, fault: Fault) -> list[Recovery]:
        """The recoveries from a fault that was the only one of its round."""
        return [it.recovery for it in self.rounds if it.recovery and it.faults == (fault,)]

    def targets(self) -> list[list[str]]:
        """For each kind of process that was killed with -9: what is measured, and how often, how long."""
        rows = []
        for kind in KINDS:
            target, found = TARGETS[kind], self.of(Fault("kill -9", kind))
            times = [target.measured(recovery) for recovery in found]
            rows.append(
                [kind, target.what, str(len(times)), *_median_and_worst(times), f"≤ {target.most_s:.0f} s"]
            )
        return rows

    def faults(self) -> list[list[str]]:
        """For each fault that was the only one of its round: all measures, as median / worst."""
        rows = []
        for fault in (Fault(action, kind) for action in ACTIONS for kind in KINDS):
            found = self.of(fault)
            measures = [[r.joined_s for r in found], [r.learned_s for r in found], [r.call_s for r in found]]
            rows.append([str(fault), str(len(found)), *(" / ".join(_median_and_worst(m)) for m in measures)])
        return rows

    def totals(self) -> list[list[str]]:
        last = self.rounds[-1]
        doubles = sum(len(it.faults) > 1 for it in self.rounds)
        unasked = [text for it in self.rounds for text in it.unasked]
        rounds = sorted(it.seconds for it in self.rounds)
        return [
            ["rounds", f"{len(self.rounds)}, {doubles} of them with two faults at once"],
            ["deviations", str(sum(len(it.deviations) for it in self.rounds))],
            ["distinct events", f"{last.events:,}"],
            ["experiences published again", f"{last.republished:,}"],
            ["calls given up after 15 s", str(self.failed_calls)],
            ["processes that ended by themselves", str(len(unasked))],
            ["seconds per round", f"{statistics.median(rounds):.1f} (median), {rounds[-1]:.1f} (longest)"],
            [
                "load average of the machine",
                f"{statistics.median(it.machine_load for it in self.rounds):.1f}",
            ],
            ["duration", f"{self.seconds / 60:.1f} min"],
        ]


TARGET_COLUMNS = ("killed with -9", "time until", "rounds", "median", "worst", "target")
FAULT_COLUMNS = ("fault", "rounds", "replies joined", "version published", "longest call")


def tables(run: Run) -> list[Table]:
    """The tables for the terminal."""
    made = []
    for title, columns, rows in (
        ("Recovery after kill -9", TARGET_COLUMNS, run.targets()),
        ("All faults: seconds, median / worst", FAULT_COLUMNS, run.faults()),
        ("Run", ("", ""), run.totals()),
    ):
        table = Table(*columns, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        made.append(table)
    return made


def markdown(run: Run) -> str:
    """docs/chaos.md."""
    memory = round(psutil.virtual_memory().total / 2**30)
    machine = f"{os.cpu_count()} cores, {memory} GiB, {platform.system()}, Python {platform.python_version()}"
    return TEMPLATE.format(
        date=datetime.now(UTC).date().isoformat(),
        machine=machine,
        rounds=len(run.rounds),
        seed=run.seed,
        result="no deviation" if run.is_good else "**deviations**",
        targets=_markdown(TARGET_COLUMNS, run.targets()),
        faults=_markdown(FAULT_COLUMNS, run.faults()),
        totals=_markdown(("run", ""), run.totals()),
    )


def _median_and_worst(values: Sequence[float]) -> tuple[str, str]:
    return (f"{statistics.median(values):.1f}", f"{max(values):.1f}") if values else ("-", "-")


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TEMPLATE = """\
# Chaos: what is promised holds while processes die

    make chaos ROUNDS={rounds} SEED={seed} REPORT=docs/chaos.md

writes this page. A short run is a test in CI: `tests/chaos/test_chaos.py`.

**What runs.** `cortex up` with two joiners, two trainers, two inference workers, Kafka and Redis; all
settings that affect recovery are the defaults. Six agents request decisions over HTTP and send replies:
with and without the interaction's id, texts and ratings, several to one interaction, some of them twice
with the same id. Beside them, events reach Kafka directly, in random order and partly twice; joiners process
five at a time, so that a fault often falls between two of their writes.

**What is done to it.** Each round injects one fault into a burst of 80 events, and every fourth a second one
at the same time: kill -9, SIGSTOP for 1.25 sessions (7.5 s), or SIGTERM, of any of these processes. `cortex
up` restarts what has ended. The seed determines faults and load, not the timing of the processes.

**What is checked after each round**, over all events since the first one; any deviation ends the run with
exit code 1 and keeps the data folder:

- every acknowledged interaction and reply is in its topic, and every reply in exactly one experience;
- the audit (`cortex audit`: a brute-force join that trusts no counter) finds nothing lost, doubled or
  wrong, in replay and in the experiences topic;
- the versions of each model strictly increase, each is the child of the one before, and none learns an
  experience again;
- every inference worker serves the newest version of every model;
- `cortex rebuild` into an empty Redis gives live replay, entry by entry, byte for byte.

## Result: {result}

{date}; {machine}.

{totals}

Recovery after kill -9, in seconds from the signal on, of rounds with this fault alone:

{targets}

The same measures for all faults, as median / worst; those of SIGSTOP include the 7.5 s:

{faults}

*Replies joined*: replies that were sent after the fault are in replay, in every partition; until then, one
of them waits. *Version published*: each of the two models has a version that learned from an experience
published after the fault. *Longest call*: of any client in the round, with retries; a client gives up after
15 s.

## To look into a deviation

The command prints the data folder, and `chaos.json` in it has the seed, the round, its faults and the
deviations; `logs/` has the log of every process. The events are still there:

    cortex up --data FOLDER --topic-prefix chaos --joiners 0 --trainers 0 --inference 0
    CORTEX_JOIN_WINDOW_S=60 CORTEX_REPLAY_CAPACITY=1000000 CORTEX_PARTITIONS=4 \\
      cortex audit --data FOLDER --topic-prefix chaos
"""
