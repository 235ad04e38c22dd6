"""Evaluation of a learner: delayed progressive validation, and metrics of its decisions.

Uses numpy only, and works with any learner. Off-policy estimates, which evaluate weights from logged data,
are in `cortex_core.off_policy`.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from cortex_core.arrays import DoubleArray
from cortex_core.errors import ConfigError, DimensionError, InputError, NonFiniteError

Q = TypeVar("Q")
A = TypeVar("A")
F = TypeVar("F")
Q_contra = TypeVar("Q_contra", contravariant=True)
F_contra = TypeVar("F_contra", contravariant=True)


class Learner(Protocol[Q_contra, A, F_contra]):
    """Decides on a request and receives feedback later."""

    def decide(self, request: Q_contra, /) -> A:
        """The decision for a request."""

    def learn(self, request: Q_contra, answer: A, feedback: F_contra, /) -> None:
        """Learns from the feedback on an earlier decision."""


@dataclass(frozen=True, slots=True)
class Validated(Generic[Q, A, F]):
    """One step of a progressive validation."""

    step: int
    """0, 1, 2, …"""
    request: Q
    answer: A
    feedback: F | None
    """None: no reply, and nothing was learned"""


def progressive_validation(
    requests: Iterable[Q],
    learner: Learner[Q, A, F],
    reply: Callable[[Q, A], F | None],
    *,
    delay: int | Callable[[int], int] = 0,
) -> Iterator[Validated[Q, A, F]]:
    """Runs a learner over requests in order; the feedback on each decision arrives after a delay.

    This is delayed progressive validation (prequential evaluation), as in river's
    `iter_progressive_val_score`: every decision counts, and is made by a learner that has seen feedback on
    earlier decisions only.

        for step in progressive_validation(requests, learner, reply, delay=3):
            correct.append(step.answer.strategy == step.request.best)

    Args:
        requests: in time order; read one at a time.
        learner: the learner to evaluate.
        reply: the user's feedback. Called once for each decision, at the time of the decision.
        delay: number of further decisions before a reply arrives, or a function of the step. With 0 the
            learner gets the reply before the next decision. Replies still outstanding after the last decision
            are learned at the end, in the order of their arrival.

    Yields:
        Each decision before its reply is learned.

    Raises:
        ConfigError: a negative delay.
    """
    waiting: list[tuple[int, int, Q, A, F]] = []

    def arrive(now: float) -> None:
        while waiting and waiting[0][0] <= now:
            _, _, request, answer, feedback = heapq.heappop(waiting)
            learner.learn(request, answer, feedback)

    for step, request in enumerate(requests):
        arrive(step - 1)
        answer = learner.decide(request)
        feedback = reply(request, answer)
        wait = delay(step) if callable(delay) else delay
        if wait < 0:
            raise ConfigError(f"the delay at step {step} is {wait}, expected 0 or more")
        if feedback is not None:
            heapq.heappush(waiting, (step + wait, step, request, answer, feedback))
        yield Validated(step, request, answer, feedback)
    arrive(float("inf"))


def precision_at_k(retrieved: Sequence[int], relevant: Collection[int], k: int = 3) -> float:
    """Fraction of the first `k` retrieved items that are relevant, in [0, 1]; an empty slot counts as a miss.

    Raises:
        ConfigError: k < 1.
        InputError: an item was retrieved twice.
    """
    if k < 1:
        raise ConfigError(f"k is {k}, expected 1 or more")
    first = list(itertools.islice(retrieved, k))
    if len(set(first)) != len(first):
        raise InputError(f"an item is retrieved twice in {first}; a slate must contain each at most once")
    return sum(i in relevant for i in first) / k


def expected_calibration_error(confidence: npt.ArrayLike, outcome: npt.ArrayLike, bins: int = 15) -> float:
    """ECE in [0, 1] over `bins` bins of equal width: Σ_b |b|/n · |mean confidence − mean outcome|.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", eq. 3. A constant prediction of the base rate
    has a low ECE: read it together with `auroc`.

    Args:
        confidence: (n,) in [0, 1].
        outcome: (n,) in [0, 1], usually 0 or 1.

    Raises:
        DimensionError, NonFiniteError, InputError: invalid or empty arrays.
    """
    if bins < 1:
        raise ConfigError(f"bins is {bins}, expected 1 or more")
    p, y = _pair(confidence, outcome)
    place = np.minimum((p * bins).astype(int), bins - 1)
    gap = np.bincount(place, weights=p - y, minlength=bins)  # |b| · (mean confidence − mean outcome)
    return float(np.abs(gap).sum() / len(p))


def brier_score(confidence: npt.ArrayLike, outcome: npt.ArrayLike) -> float:
    """Mean (confidence − outcome)², in [0, 1] (Brier 1950). Arguments: see `expected_calibration_error`."""
    p, y = _pair(confidence, outcome)
    return float(np.mean((p - y) ** 2))


def auroc(confidence: npt.ArrayLike, outcome: npt.ArrayLike) -> float | None:
    """Area under the ROC curve: P(confidence of a good outcome > that of a bad one); ties count half.

    Computed as the Mann–Whitney U statistic (Hanley & McNeil 1982). None if all outcomes are equal.

    Raises:
        InputError: an outcome is neither 0 nor 1; else as in `expected_calibration_error`.
    """
    p, y = _pair(confidence, outcome)
    if not np.isin(y, (0.0, 1.0)).all():
        raise InputError("auroc expects outcomes of 0 or 1 only")
    good = int(y.sum())
    bad = len(y) - good
    if good == 0 or bad == 0:
        return None
    _, inverse, counts = np.unique(p, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2.0  # ranks start at 1; ties share their mean rank
    rank_sum = float(mean_rank[inverse][y == 1.0].sum())
    return (rank_sum - good * (good + 1) / 2.0) / (good * bad)


def window_mean(values: Sequence[float] | DoubleArray, end: int, window: int) -> float:
    """Mean of the last `window` values before step `end`; of fewer if there are fewer.

    Raises:
        InputError: `end` is out of range.
    """
    if not 1 <= end <= len(values):
        raise InputError(f"end is {end}, expected a step in [1, {len(values)}]")
    return float(np.mean(values[max(0, end - window) : end]))


def moving_mean(values: Sequence[float] | DoubleArray, window: int) -> DoubleArray:
    """(n,) mean of the last `window` values at each step; of fewer at the beginning."""
    if window < 1:
        raise ConfigError(f"window is {window}, expected 1 or more")
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - window, 0)
    means: DoubleArray = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def steps_to_recover(
    values: Sequence[float] | DoubleArray,
    change: int,
    *,
    share: float = 0.9,
    window: int = 200,
    before: int = 500,
) -> int | None:
    """Steps after `change` until the mean over a window reaches `share` of the mean before the change.

    The window lies entirely after the change and slides by one step, so that the result is at least `window`.
    None if the mean never recovers.

    Args:
        values: (n,) metric at each step, e.g. 1 for a correct decision.
        change: the first step after the environment changed.
        share: fraction of the mean over the `before` steps ahead of the change.
        window: steps in the window.
        before: steps averaged before the change.

    Raises:
        InputError: no step before the change, or no complete window after it.
    """
    if not 0 < change <= len(values) - window:
        raise InputError(
            f"change is {change}, expected a step in [1, {len(values) - window}] "
            f"for {len(values)} steps and a window of {window}"
        )
    threshold = share * window_mean(values, change, before)
    after = np.asarray(values[change:], dtype=np.float64)
    means = moving_mean(after, window)[window - 1 :]
    reached = np.flatnonzero(means >= threshold - 1e-12)
    return int(reached[0]) + window if len(reached) else None


def _pair(confidence: npt.ArrayLike, outcome: npt.ArrayLike) -> tuple[DoubleArray, DoubleArray]:
    p = np.asarray(confidence, dtype=np.float64)
    y = np.asarray(outcome, dtype=np.float64)
    if p.ndim != 1 or p.shape != y.shape:
        raise DimensionError("outcome", y.shape, f"{p.shape}, one for each confidence")
    if not len(p):
        raise InputError("there is nothing to evaluate: confidence is empty")
    for what, array in (("confidence", p), ("outcome", y)):
        if not np.isfinite(array).all():
            raise NonFiniteError(what)
        if array.min() < 0.0 or array.max() > 1.0:
            raise InputError(
                f"{what} ranges from {array.min():g} to {array.max():g}, expected numbers in [0, 1]"
            )
    return p, y
