"""Output of the demo: a summary with a verdict, a JSON file, and a plot of the learning curve."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cortex_core.evaluation import moving_mean
from streams.demo.measures import (
    FIRST_SHARE,
    LAST_SHARE,
    Sample,
    best_fixed,
    control_rewards,
    round_floats,
)
from streams.demo.view import summary_table

REWARD_GAIN = 0.2
"""For a positive verdict `reward_last` must exceed `reward_first` by this."""
LATENCY_MS = 2000.0
"""For a positive verdict the 99th percentile of reply → weights must be below this."""

JSON_FIELDS = (
    "interactions",
    "replies",
    "joined",
    "duplicates",
    "lost",
    "dead_letters",
    "updates",
    "versions",
    "reward_first",
    "reward_last",
    "reward_control",
    "memory_precision_first",
    "memory_precision_last",
    "ece_last",
    "reply_to_weights_ms",
    "seconds",
)
"""Always present, in this order; more fields may follow."""

Summary = dict[str, Any]


def failures(summary: Mapping[str, Any]) -> list[str]:
    """The criteria that the run failed; empty for a positive verdict."""
    out = []
    for name in ("lost", "duplicates", "dead_letters", "errors"):
        if summary.get(name):
            out.append(f"{name} is {summary[name]}, expected 0")
    first, last, control = (summary[f"reward_{x}"] for x in ("first", "last", "control"))
    if None in (first, last, control):
        out.append("nothing was measured")
    else:
        if last < first + REWARD_GAIN:
            out.append(f"the reward rose from {first:.2f} to {last:.2f}, expected + {REWARD_GAIN}")
        if last <= control:
            out.append(f"the reward {last:.2f} is not above the control's {control:.2f}")
    p99 = summary["reply_to_weights_ms"]["p99"]
    if p99 is None:
        out.append("no reply reached the weights")
    elif p99 >= LATENCY_MS:
        out.append(f"reply → weights took {p99:.0f} ms (p99), expected less than {LATENCY_MS:.0f}")
    return out


def verdict(summary: Mapping[str, Any]) -> str:
    """One line: success with the main figures, or the failed criteria."""
    if failed := failures(summary):
        return "Failed: " + "; ".join(failed) + "."
    return (
        f"It learns: reward {summary['reward_first']:.2f} → {summary['reward_last']:.2f} (best fixed policy "
        f"{summary['reward_control']:.2f}); a reply reaches the weights in "
        f"{summary['reply_to_weights_ms']['p50']:.0f} ms; nothing was lost."
    )


def print_summary(summary: Mapping[str, Any], console: Console) -> None:
    """Prints the table and the verdict."""
    latency = summary["reply_to_weights_ms"]

    def shown(value: float | None, form: str = ".3f") -> str:
        return "–" if value is None else format(value, form)

    first, last = f"first {FIRST_SHARE:.0%}", f"last {LAST_SHARE:.0%}"
    rows = [
        (
            "interactions",
            summary["interactions"],
            "decisions acknowledged by Kafka, without those of the control",
        ),
        ("replies", summary["replies"], "replies acknowledged by Kafka"),
        ("joined", summary["joined"], "interactions with a reply that became experiences"),
        ("lost", summary["lost"], "acknowledged ids missing in a topic or in replay"),
        ("duplicates", summary["duplicates"], "experiences counted twice or contradictory"),
        ("dead letters", summary["dead_letters"], "events that a worker rejected"),
        ("errors", summary.get("errors", 0), "requests rejected or not answered by the service"),
        ("updates", summary["updates"], "training steps"),
        ("versions", summary["versions"], "weights versions published"),
        (
            "reward",
            f"{shown(summary['reward_first'])} → {shown(summary['reward_last'])}",
            f"{first} → {last}",
        ),
        ("control", shown(summary["reward_control"]), f"cosine memories, best fixed strategy, {last}"),
        (
            "memory precision",
            f"{shown(summary['memory_precision_first'])} → {shown(summary['memory_precision_last'])}",
            f"fraction of retrieved memories that help, {first} → {last}",
        ),
        ("calibration error", shown(summary["ece_last"]), f"expected, 15 bins, {last}"),
        (
            "reply → weights",
            f"{shown(latency['p50'], '.0f')} / {shown(latency['p99'], '.0f')} ms",
            "p50 / p99, at the slowest inference worker",
        ),
        ("seconds", shown(summary["seconds"], ".1f"), "from the first request to the last reply"),
    ]
    console.print(summary_table(rows))
    console.print(verdict(summary), style="green" if not failures(summary) else "red", highlight=False)


def write_json(summary: Mapping[str, Any], path: Path) -> None:
    """Writes the summary, atomically."""
    ordered = {name: summary[name] for name in JSON_FIELDS}
    ordered |= {name: value for name, value in summary.items() if name not in ordered}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(json.dumps(round_floats(ordered), indent=2) + "\n")
    partial.replace(path)


def plot(samples: Sequence[Sample], path: Path) -> None:
    """Plots reward and memory precision beside the control, and the weights versions.

    Args:
        samples: in the order of the requests.
        path: the PNG file; its folder is created.

    Raises:
        ImportError: matplotlib is missing; it comes with cortex-streams[embedded].
    """
    import matplotlib as mpl  # noqa: PLC0415 - optional, and slow to load

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    window = max(10, len(samples) // 15)
    x = [s.index for s in samples]
    figure, (top, middle, bottom) = plt.subplots(3, 1, sharex=True, figsize=(9, 9), height_ratios=(3, 2, 1))
    top.plot(x, moving_mean([s.reward for s in samples], window), color="tab:green", label="learned")
    fixed = best_fixed(samples)
    top.plot(
        x,
        moving_mean(control_rewards(samples, fixed), window),
        color="tab:orange",
        label=f"control: cosine memories, always {fixed}",
    )
    top.set_ylabel("true reward [0, 1]")
    top.set_ylim(0, 1)
    top.set_title(f"Learning from replies (moving means over {window} interactions)")
    middle.plot(
        x, moving_mean([s.precision for s in samples], window), color="tab:green", label="learned gate"
    )
    middle.plot(
        x,
        moving_mean([s.control_precision for s in samples], window),
        color="tab:orange",
        label="control: cosine",
    )
    middle.set_ylabel("memory precision [0, 1]")
    middle.set_ylim(0, 1)
    bottom.step(
        x, [s.weights_version for s in samples], where="post", color="tab:blue", label="deciding version"
    )
    bottom.set_ylabel("weights version")
    bottom.set_xlabel("interaction")
    for axis in (top, middle, bottom):
        axis.grid(alpha=0.3)
        axis.legend(loc="best")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)
