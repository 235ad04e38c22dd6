"""Metrics of a run, and their summary over seeds as table, JSON and plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from cortex_core.arrays import DoubleArray
from cortex_core.evaluation import (
    auroc,
    brier_score,
    expected_calibration_error,
    moving_mean,
    steps_to_recover,
    window_mean,
)

MARKS = (100, 300, 1000, 3000)
WINDOW = 200
"""Steps averaged for the accuracy at a mark; fewer at the first mark."""
FINAL = 500
"""Steps averaged for the final accuracy, and for the accuracy before a switch."""
LAST = 1000
"""Last steps on which the confidence is evaluated; also the steps after a switch that count as loss."""


@dataclass(frozen=True, slots=True)
class Run:
    """The results of one learner on one seed of a task; each array is (steps,)."""

    learner: str
    seed: int
    right: DoubleArray
    """1 for the preferred strategy"""
    precision: DoubleArray
    satisfied: DoubleArray
    chance: DoubleArray
    """true P(satisfied user) given the answer"""
    confidence: DoubleArray
    """NaN if none was predicted"""
    changed: npt.NDArray[np.bool_]
    """whether the preference of the request's kind changes at half time"""
    seconds: float
    """CPU time"""


def at_marks(values: DoubleArray, name: str) -> dict[str, float]:
    """The windowed mean at each mark, and over the final steps."""
    figures = {f"{name}_{mark}": window_mean(values, mark, WINDOW) for mark in MARKS if mark <= len(values)}
    return {**figures, f"{name}_final": window_mean(values, len(values), FINAL)}


def strategy_figures(run: Run) -> dict[str, float | None]:
    """Accuracy of the strategy, and calibration of the confidence."""
    return {**at_marks(run.right, "accuracy"), **_calibration(run)}


def memory_figures(run: Run) -> dict[str, float | None]:
    """precision@3."""
    return {**at_marks(run.precision, "precision")}


def confidence_figures(run: Run) -> dict[str, float | None]:
    """Calibration over the last steps, beside that of the true probability."""
    satisfied, chance = run.satisfied[-LAST:], run.chance[-LAST:]
    return {
        **_calibration(run),
        "brier_of_true_chance": brier_score(chance, satisfied),
        "auroc_of_true_chance": auroc(chance, satisfied),
        "satisfied_final": window_mean(run.satisfied, len(run.satisfied), FINAL),
        "accuracy_final": window_mean(run.right, len(run.right), FINAL),
        "precision_final": window_mean(run.precision, len(run.precision), FINAL),
    }


def switch_figures(run: Run) -> dict[str, float | None]:
    """The cost of a change of preferences at half time.

    `recovery_steps` is the number of steps to the first window of 200 steps with 90% of the accuracy before;
    a run that never recovers counts with all its remaining steps. The losses are those of the kinds that did
    not change: accuracy over the 500 steps before the switch, minus that over the 1,000 after it, and over
    the final 500.
    """
    half = len(run.right) // 2
    steps = np.arange(len(run.right))
    before = (steps >= max(0, half - FINAL)) & (steps < half)
    after = (steps >= half) & (steps < half + LAST)
    final = steps >= len(steps) - FINAL
    same = ~run.changed
    recovered = steps_to_recover(run.right, half, share=0.9, window=min(WINDOW, half // 2), before=FINAL)
    kept = _mean(run.right[before & same])
    return {
        "before": _mean(run.right[before]),
        "recovery_steps": float(recovered if recovered is not None else len(steps) - half),
        "recovered": float(recovered is not None),
        "changed_final": _mean(run.right[final & run.changed]),
        "unchanged_before": kept,
        "unchanged_loss_1000": kept - _mean(run.right[after & same]),
        "unchanged_loss_final": kept - _mean(run.right[final & same]),
        "accuracy_final": _mean(run.right[final]),
    }


def ablation_figures(run: Run) -> dict[str, float | None]:
    """The main metrics of strategy, memories and confidence."""
    figures = confidence_figures(run)
    names = ("accuracy_final", "precision_final", "satisfied_final", "ece", "brier", "auroc")
    return {name: figures[name] for name in names} | {
        "accuracy_300": window_mean(run.right, min(300, len(run.right)), WINDOW)
    }


def summarize(
    runs: Sequence[Run],
    figures: Callable[[Run], Mapping[str, float | None]],
    headline: str,
    curve: str,
    ours: str = "cortex",
) -> dict[str, Any]:
    """Per learner: mean, std, median and values of each metric; `ratio` of the headline's mean to ours."""
    learners: dict[str, Any] = {}
    for name in dict.fromkeys(run.learner for run in runs):
        own = sorted((run for run in runs if run.learner == name), key=lambda r: r.seed)
        rows = [figures(run) for run in own]
        learners[name] = {
            "metrics": {key: _spread([row[key] for row in rows]) for key in rows[0]},
            "seconds": round(float(np.mean([run.seconds for run in own])), 2),
            "curve": _curve([getattr(run, curve) for run in own]),
        }
    reference = learners.get(ours, {}).get("metrics", {}).get(headline)
    for entry in learners.values():
        mean = entry["metrics"][headline]["mean"]
        usable = reference is not None and reference["mean"] and mean is not None
        entry["ratio"] = round(mean / reference["mean"], 4) if usable else None
    return {"headline": headline, "curve_of": curve, "learners": learners}


def table(title: str, block: Mapping[str, Any]) -> Table:
    """Mean ± std (median) of each metric, one row per learner."""
    learners = block["learners"]
    names = list(next(iter(learners.values()))["metrics"])
    out = Table(title=title, title_justify="left", show_lines=False)
    out.add_column("learner")
    for name in names:
        out.add_column(name.replace("_", " "), justify="right")
    out.add_column("ratio", justify="right")
    out.add_column("s", justify="right")
    for learner, entry in learners.items():
        cells = []
        for name in names:
            m = entry["metrics"][name]
            digits = 0 if name.endswith("steps") else 3
            cells.append(
                "–"
                if m["mean"] is None
                else f"{m['mean']:.{digits}f} ± {m['std']:.{digits}f} ({m['median']:.{digits}f})"
            )
        ratio = "–" if entry["ratio"] is None else f"{entry['ratio']:.2f}"
        style = "bold" if learner == "cortex" else None
        out.add_row(learner, *cells, ratio, f"{entry['seconds']:.0f}", style=style)
    return out


def plot(blocks: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Writes the learning curves of every block as PNG: mean over seeds ± one standard deviation.

    Raises:
        ImportError: matplotlib is missing; it comes with cortex-streams[embedded].
    """
    import matplotlib as mpl  # noqa: PLC0415 - slow to load, and optional

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(len(blocks), 1, figsize=(9, 4.2 * len(blocks)), squeeze=False)
    for axis, (title, block) in zip(axes[:, 0], blocks.items(), strict=True):
        for name, entry in block["learners"].items():
            x, mean, std = (np.array(entry["curve"][k]) for k in ("steps", "mean", "std"))
            ours = name == "cortex"
            (line,) = axis.plot(x, mean, label=name, linewidth=2.4 if ours else 1.2, zorder=3 if ours else 2)
            axis.fill_between(x, mean - std, mean + std, color=line.get_color(), alpha=0.12, linewidth=0)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.set_ylabel({"right": "accuracy", "precision": "precision@3"}.get(block["curve_of"], "satisfied"))
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", ncols=2, loc="lower right")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def _calibration(run: Run) -> dict[str, float | None]:
    satisfied, confidence = run.satisfied[-LAST:], run.confidence[-LAST:]
    if np.isnan(confidence).any():
        return {"ece": None, "brier": None, "auroc": None}
    return {
        "ece": expected_calibration_error(confidence, satisfied),
        "brier": brier_score(confidence, satisfied),
        "auroc": auroc(confidence, satisfied),
    }


def _mean(values: DoubleArray) -> float:
    return float(values.mean()) if len(values) else 0.0


def _spread(values: Sequence[float | None]) -> dict[str, Any]:
    numbers = [v for v in values if v is not None]
    if not numbers:
        return {"mean": None, "std": None, "median": None, "values": []}
    return {
        "mean": round(float(np.mean(numbers)), 4),
        "std": round(float(np.std(numbers, ddof=1)) if len(numbers) > 1 else 0.0, 4),
        "median": round(float(np.median(numbers)), 4),
        "values": [round(v, 4) for v in numbers],
    }


def _curve(values: Sequence[DoubleArray]) -> dict[str, list[float]]:
    curves = np.stack([moving_mean(v, WINDOW) for v in values])
    every = max(1, curves.shape[1] // 150)
    steps = np.arange(every - 1, curves.shape[1], every)
    return {
        "steps": (steps + 1).tolist(),
        "mean": curves.mean(0)[steps].round(4).tolist(),
        "std": curves.std(0)[steps].round(4).tolist(),
    }
