"""Off-policy evaluation: the mean reward of other weights, estimated from logged decisions, with intervals.

A log contains the action, the reward and the propensity of each decision. A policy is given by its action
probabilities in the same situations:

    log = LoggedDecisions(actions, rewards, propensities)
    report = compare(log, first=old_probabilities, second=new_probabilities, reward_model=predicted)
    report.difference["dr"].low > 0      # the second policy is better, at the given level

Uses numpy only. Each estimator is a mean of per-decision terms; its interval follows from their variance
(central limit theorem), and that of a difference from the differences of the terms on the same decisions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt

from cortex_core.arrays import DoubleArray
from cortex_core.errors import ConfigError, DimensionError, InputError, NonFiniteError

Method = Literal["ips", "snips", "dr"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """An estimated mean reward, or the difference of two, with its confidence interval."""

    value: float
    low: float
    high: float
    standard_error: float
    effective_n: float
    """Effective sample size (Σw)² / Σw² (Kish 1965); for a difference, the smaller of the two. Do not trust
    the interval if it is far below the number of decisions."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Estimates of two policies on one log, by method."""

    first: Mapping[Method, Estimate]
    second: Mapping[Method, Estimate]
    difference: Mapping[Method, Estimate]
    """second − first"""


class LoggedDecisions:
    """n decisions of a logging policy, which may have changed over time.

    Args:
        actions: (n,) index of the action taken.
        rewards: (n,).
        propensities: (n,) in (0, 1], probability of the action taken at the time of the decision.

    Raises:
        InputError, DimensionError, NonFiniteError: invalid arrays.
    """

    def __init__(self, actions: npt.ArrayLike, rewards: npt.ArrayLike, propensities: npt.ArrayLike) -> None:
        raw = np.asarray(actions)
        self.rewards = _finite(rewards, "rewards", (len(raw),))
        self.propensities = _finite(propensities, "propensities", (len(raw),))
        if raw.ndim != 1 or not np.issubdtype(raw.dtype, np.integer):
            raise InputError(f"actions has type {raw.dtype} and shape {raw.shape}, expected (n,) integers")
        self.actions = raw.astype(np.intp)
        if len(raw) < 2:
            raise InputError(f"the log has {len(raw)} decisions; an interval requires at least two")
        if self.actions.min() < 0:
            raise InputError(f"an action is {self.actions.min()}, expected an index of 0 or more")
        if self.propensities.min() <= 0.0 or self.propensities.max() > 1.0:
            raise InputError(
                f"propensities range from {self.propensities.min():g} to {self.propensities.max():g}, "
                "expected numbers in (0, 1]"
            )

    def __len__(self) -> int:
        return len(self.actions)


def evaluate(
    log: LoggedDecisions,
    probabilities: npt.ArrayLike,
    *,
    reward_model: npt.ArrayLike | None = None,
    clip: float | None = None,
    level: float = 0.95,
) -> dict[Method, Estimate]:
    """Estimates the mean reward of a policy.

    With the importance weight w = π(a|x) / p of the action taken:

    - `ips`: mean of w·r (Horvitz & Thompson 1952). Unbiased; its variance grows with that of w.
    - `snips`: Σ w·r / Σ w (Swaminathan & Joachims 2015, eq. 6). Slightly biased, of lower variance, and
      within the range of the rewards. Interval by the delta method (Owen 2013, eq. 9.8).
    - `dr`: mean of Σ_a π(a|x) q(x,a) + w·(r − q(x,a taken)) (Dudík, Langford & Li 2011, eq. 1). Unbiased if
      the propensities or the model q are correct. Only with a `reward_model`.

    Args:
        log: the logged decisions.
        probabilities: (n, A) action probabilities of the policy; rows sum to 1.
        reward_model: (n, A) predicted rewards q that were not fitted on the same decisions, e.g. from
            `cross_fitted_rewards`.
        clip: maximum importance weight (Ionides 2008); trades bias for lower variance. None: no maximum.
        level: confidence level of the two-sided intervals, in (0, 1).

    Raises:
        ConfigError: an invalid `clip` or `level`.
        InputError, DimensionError, NonFiniteError: invalid arrays.
    """
    terms = _terms(log, probabilities, reward_model, clip)
    return {method: _estimate(*terms[method], level) for method in terms}


def compare(
    log: LoggedDecisions,
    first: npt.ArrayLike,
    second: npt.ArrayLike,
    *,
    reward_model: npt.ArrayLike | None = None,
    clip: float | None = None,
    level: float = 0.95,
) -> Comparison:
    """Estimates two policies and the difference second − first; arguments as in `evaluate`."""
    a = _terms(log, first, reward_model, clip)
    b = _terms(log, second, reward_model, clip)
    difference: dict[Method, Estimate] = {}
    for method in a:
        (value_a, terms_a, n_a), (value_b, terms_b, n_b) = a[method], b[method]
        difference[method] = _estimate(value_b - value_a, terms_b - terms_a, min(n_a, n_b), level)
    return Comparison(
        first={m: _estimate(*a[m], level) for m in a},
        second={m: _estimate(*b[m], level) for m in b},
        difference=difference,
    )


def cross_fitted_rewards(
    log: LoggedDecisions,
    situations: npt.ArrayLike,
    num_actions: int,
    *,
    ridge: float = 1.0,
    folds: int = 2,
) -> DoubleArray:
    """(n, A) rewards predicted by one ridge regression per action, with cross-fitting.

    Each fold is predicted by a model fitted on the other folds (Chernozhukov et al. 2018), so that the doubly
    robust estimate does not use predictions of a model that has seen the same decision.

    Args:
        log: the logged decisions.
        situations: (n, S).
        num_actions: A.
        ridge: positive penalty; shrinks the predictions to the mean reward.
        folds: number of folds; each is contiguous in time.
    """
    x = np.asarray(situations, dtype=np.float64)
    if x.ndim != 2 or len(x) != len(log):
        raise DimensionError("situations", x.shape, f"({len(log)}, S)")
    if not np.isfinite(x).all():
        raise NonFiniteError("situations")
    if ridge <= 0 or not 2 <= folds <= len(log):
        raise ConfigError(f"expected ridge > 0 and folds in [2, {len(log)}]; got {ridge} and {folds}")
    if num_actions <= log.actions.max():
        raise InputError(f"num_actions is {num_actions}, but action {log.actions.max()} was taken")
    fold = np.arange(len(log)) * folds // len(log)
    predicted: DoubleArray = np.zeros((len(log), num_actions))
    for k in range(folds):
        held, rest = fold == k, fold != k
        mean = float(log.rewards[rest].mean())
        for action in range(num_actions):
            own = rest & (log.actions == action)
            features, residuals = x[own], log.rewards[own] - mean
            gram = features.T @ features + ridge * np.eye(x.shape[1])
            predicted[held, action] = mean + x[held] @ np.linalg.solve(gram, features.T @ residuals)
    return predicted


_Terms = dict[Method, tuple[float, DoubleArray, float]]


def _terms(
    log: LoggedDecisions,
    probabilities: npt.ArrayLike,
    reward_model: npt.ArrayLike | None,
    clip: float | None,
) -> _Terms:
    """method → (estimate, (n,) terms whose standard deviation / √n is the standard error, effective n)."""
    n = len(log)
    pi = np.asarray(probabilities, dtype=np.float64)
    if pi.ndim != 2 or len(pi) != n or pi.shape[1] <= log.actions.max():
        raise DimensionError("probabilities", pi.shape, f"({n}, A) with A > {log.actions.max()}")
    if not np.isfinite(pi).all():
        raise NonFiniteError("probabilities")
    if pi.min() < 0.0 or np.abs(pi.sum(1) - 1.0).max() > 1e-3:
        raise InputError("every row of probabilities must have non-negative numbers that sum to 1")
    if clip is not None and clip <= 0:
        raise ConfigError(f"clip is {clip}, expected a positive number or None")
    rows = np.arange(n)
    w = pi[rows, log.actions] / log.propensities
    if clip is not None:
        w = np.minimum(w, clip)
    total = float(w.sum())
    if total <= 0.0:
        raise InputError("the policy never takes a logged action: this log cannot evaluate it")
    effective = total**2 / float((w**2).sum())
    weighted = w * log.rewards
    value = float(weighted.sum()) / total
    out: _Terms = {
        "ips": (float(weighted.mean()), weighted, effective),
        "snips": (value, w * (log.rewards - value) / float(w.mean()), effective),
    }
    if reward_model is not None:
        q = _finite(reward_model, "reward_model", pi.shape)
        terms = (pi * q).sum(1) + w * (log.rewards - q[rows, log.actions])
        out["dr"] = (float(terms.mean()), terms, effective)
    return out


def _estimate(value: float, terms: DoubleArray, effective: float, level: float) -> Estimate:
    if not 0.0 < level < 1.0:
        raise ConfigError(f"level is {level}, expected a number in (0, 1), e.g. 0.95")
    error = float(terms.std(ddof=1) / np.sqrt(len(terms)))
    half_width = NormalDist().inv_cdf(0.5 + level / 2.0) * error
    return Estimate(value, value - half_width, value + half_width, error, effective)


def _finite(value: npt.ArrayLike, what: str, shape: tuple[int, ...]) -> DoubleArray:
    array = np.asarray(value, dtype=np.float64)
    if array.shape != shape:
        raise DimensionError(what, array.shape, shape)
    if not np.isfinite(array).all():
        raise NonFiniteError(what)
    return array
