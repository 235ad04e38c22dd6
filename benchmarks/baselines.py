"""Baselines for strategies: contextual bandits over sentence embeddings, with tuned settings.

All get the same `Feedback` as the learner. They use the sign of the reward as label and the reader's
confidence as sample weight, and skip replies without explicit feedback. Their settings were chosen on seeds
100–102, which no table uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.tasks import Answer, Request, Task
from cortex_core.arrays import DoubleArray, FloatArray
from cortex_core.feedback_collector import Feedback


def label_of(feedback: Feedback) -> tuple[float, float] | None:
    """(1 for a satisfied user, else 0; weight in (0, 1]); None without explicit feedback."""
    if not feedback.explicit or feedback.reward == 0.0 or feedback.confidence <= 0.0:
        return None
    return float(feedback.reward > 0.0), feedback.confidence


class Uniform:
    """Uniform choice of a strategy and of three memories."""

    name = "uniform"

    def __init__(self, task: Task, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._strategies = task.settings.strategies
        self._memories = 0 if task.memories is None else len(task.memories)

    def decide(self, request: Request) -> Answer:
        del request
        shown = self._rng.choice(self._memories, min(3, self._memories), replace=False).tolist()
        return Answer(int(self._rng.integers(self._strategies)), tuple(shown))

    def learn(self, request: Request, answer: Answer, feedback: Feedback) -> None:
        """Learns nothing."""


class _Linear:
    """Disjoint ridge regressions, one per arm, on [x, 1/2]: shared by LinUCB and Thompson sampling."""

    def __init__(self, task: Task, seed: int, ridge: float, prior: float) -> None:
        self._rng = np.random.default_rng(seed)
        dim = len(task.requests[0].message) + 1
        arms = task.settings.strategies
        self._inverse: DoubleArray = np.stack([np.eye(dim) / ridge] * arms)  # (A, d, d)
        self._sum: DoubleArray = np.zeros((arms, dim))
        self._theta: DoubleArray = np.zeros((arms, dim))
        self._prior = prior

    def _moments(self, x: DoubleArray) -> tuple[DoubleArray, DoubleArray]:
        """(A,) mean and standard deviation of each arm's P(satisfied user), up to the noise scale."""
        mean: DoubleArray = self._prior + self._theta @ x
        spread: DoubleArray = np.sqrt((self._inverse @ x) @ x)
        return mean, spread

    def learn(self, request: Request, answer: Answer, feedback: Feedback) -> None:
        """Sherman–Morrison update of the chosen arm."""
        labelled = label_of(feedback)
        if labelled is None:
            return
        y, weight = labelled
        arm, x = answer.strategy, _with_bias(request)
        inverse = self._inverse[arm]
        v = inverse @ x
        inverse -= np.outer(v, v) * (weight / (1.0 + weight * float(x @ v)))
        self._sum[arm] += weight * (y - self._prior) * x
        self._theta[arm] = inverse @ self._sum[arm]


class LinUCB(_Linear):
    """Li et al. 2010, "A Contextual-Bandit Approach to Personalized News Article Recommendation", alg. 1."""

    name = "LinUCB"

    def __init__(
        self, task: Task, seed: int, *, alpha: float = 0.3, ridge: float = 0.3, prior: float = 0.3
    ) -> None:
        super().__init__(task, seed, ridge, prior)
        self._alpha = alpha

    def decide(self, request: Request) -> Answer:
        mean, spread = self._moments(_with_bias(request))
        return Answer(_argmax(mean + self._alpha * spread, self._rng))


class Thompson(_Linear):
    """Linear Thompson sampling (Agrawal & Goyal 2013, alg. 1), one posterior per arm.

    x·θ of a Gaussian θ is Gaussian: drawing one number per arm has the same distribution as drawing θ.
    """

    name = "Thompson sampling"

    def __init__(
        self, task: Task, seed: int, *, scale: float = 0.05, ridge: float = 0.3, prior: float = 0.3
    ) -> None:
        super().__init__(task, seed, ridge, prior)
        self._scale = scale

    def decide(self, request: Request) -> Answer:
        mean, spread = self._moments(_with_bias(request))
        return Answer(_argmax(mean + self._scale * spread * self._rng.normal(size=len(mean)), self._rng))


class KernelUCB:
    """GP-UCB with an RBF kernel and one Gaussian process per arm: the strongest baseline.

    Valko et al. 2013, "Finite-Time Analysis of Kernelised Contextual Bandits"; Srinivas et al. 2010. Exact:
    the inverse of K + noise/weight grows by one row per reply (block inversion, O(n²)).
    """

    name = "kernel UCB"

    def __init__(
        self,
        task: Task,
        seed: int,
        *,
        length: float = 0.5,
        noise: float = 0.2,
        beta: float = 0.6,
        prior: float = 0.3,
        capacity: int = 1500,
    ) -> None:
        self._rng = np.random.default_rng(seed)
        dim = len(task.requests[0].message)
        self._gamma = 0.5 / length**2
        self._noise, self._beta, self._prior = noise, beta, prior
        self._arms = [_Process(dim, capacity) for _ in range(task.settings.strategies)]

    def moments(self, x: DoubleArray) -> tuple[DoubleArray, DoubleArray]:
        """(A,) posterior mean and variance of each arm's P(satisfied user)."""
        both = np.array([arm.moments(self._kernel(arm, x)) for arm in self._arms])
        return self._prior + both[:, 0], both[:, 1]

    def decide(self, request: Request) -> Answer:
        mean, variance = self.moments(request.message.astype(np.float64))
        arm = _argmax(mean + self._beta * np.sqrt(variance), self._rng)
        return Answer(arm, confidence=float(np.clip(mean[arm], 0.0, 1.0)))

    def learn(self, request: Request, answer: Answer, feedback: Feedback) -> None:
        """Adds a point to the chosen arm."""
        labelled = label_of(feedback)
        if labelled is None:
            return
        y, weight = labelled
        arm, x = self._arms[answer.strategy], request.message.astype(np.float64)
        arm.add(x, y - self._prior, self._kernel(arm, x), self._noise / weight)

    def _kernel(self, arm: _Process, x: DoubleArray) -> DoubleArray:
        points = arm.points
        distance = 1.0 + float(x @ x) - 2.0 * (points @ x)  # unit rows
        kernel: DoubleArray = np.exp(-self._gamma * np.maximum(distance, 0.0))
        return kernel


class _Process:
    """A Gaussian process with incremental inverse Gram matrix; drops the oldest points above `capacity`."""

    def __init__(self, dim: int, capacity: int) -> None:
        self._n = 0
        self._x: DoubleArray = np.zeros((capacity, dim))
        self._y: DoubleArray = np.zeros(capacity)
        self._inverse: DoubleArray = np.zeros((capacity, capacity))
        self._alpha: DoubleArray = np.zeros(0)

    @property
    def points(self) -> DoubleArray:
        return self._x[: self._n]

    def moments(self, kernel: DoubleArray) -> tuple[float, float]:
        if not self._n:
            return 0.0, 1.0
        inverse = self._inverse[: self._n, : self._n]
        return float(kernel @ self._alpha), max(1.0 - float(kernel @ inverse @ kernel), 1e-9)

    def add(self, x: DoubleArray, y: float, kernel: DoubleArray, noise: float) -> None:
        if self._n == len(self._y):
            kernel = self._forget_oldest(kernel)
        n = self._n
        inverse = self._inverse
        v = inverse[:n, :n] @ kernel
        schur = 1.0 + noise - float(kernel @ v)
        inverse[:n, :n] += np.outer(v, v) / schur
        inverse[:n, n] = inverse[n, :n] = -v / schur
        inverse[n, n] = 1.0 / schur
        self._x[n], self._y[n] = x, y
        self._n = n + 1
        self._alpha = inverse[: n + 1, : n + 1] @ self._y[: n + 1]

    def _forget_oldest(self, kernel: DoubleArray) -> DoubleArray:
        n = self._n
        old = self._inverse[:n, :n]
        self._inverse[: n - 1, : n - 1] = old[1:, 1:] - np.outer(old[1:, 0], old[0, 1:]) / old[0, 0]
        self._x[: n - 1], self._y[: n - 1] = self._x[1:n].copy(), self._y[1:n].copy()
        self._n = n - 1
        return kernel[1:]


class VowpalWabbit:
    """Vowpal Wabbit `--cb_explore_adf --squarecb` (Foster & Rakhlin 2020) on embedding × action features."""

    name = "Vowpal Wabbit SquareCB"

    def __init__(
        self,
        task: Task,
        seed: int,
        *,
        options: str = "--gamma_scale 10000 --learning_rate 1.5",
        scale: float = 1.0,
    ) -> None:
        from vowpalwabbit import Workspace  # noqa: PLC0415 - an extra

        self._rng = np.random.default_rng(seed)
        self._arms = task.settings.strategies
        self._scale = scale
        self._vw: Any = Workspace(
            f"--cb_explore_adf --squarecb --cb_type mtr -q sa --quiet --random_seed {seed} {options}"
        )

    def decide(self, request: Request) -> Answer:
        shared = self._shared(request)
        probabilities = np.array(self._vw.predict([shared, *(f"|a {i}" for i in range(self._arms))]))
        arm = int(self._rng.choice(self._arms, p=probabilities / probabilities.sum()))
        return Answer(arm, extra=float(probabilities[arm]))

    def learn(self, request: Request, answer: Answer, feedback: Feedback) -> None:
        """Learns one example: the cost and the propensity of the chosen action."""
        labelled = label_of(feedback)
        if labelled is None:
            return
        y, weight = labelled
        cost = -weight * (2.0 * y - 1.0)
        rows = [f"|a {i}" for i in range(self._arms)]
        rows[answer.strategy] = f"0:{cost:.4f}:{answer.extra:.6f} {rows[answer.strategy]}"
        self._vw.learn([self._shared(request), *rows])

    def _shared(self, request: Request) -> str:
        scaled = self._scale * request.message
        return "shared |s " + " ".join(f"{i}:{v:.5f}" for i, v in enumerate(scaled.tolist()))


class FullLabels:
    """Logistic regression on the preferred strategy of every request: the upper bound."""

    name = "full labels"

    def __init__(self, task: Task, seed: int, *, inverse_ridge: float = 20.0, every: int = 100) -> None:
        self._rng = np.random.default_rng(seed)
        self._task = task
        self._c, self._every = inverse_ridge, every
        self._x: list[FloatArray] = []
        self._y: list[int] = []
        self._model: Any = None

    def decide(self, request: Request) -> Answer:
        self._refit()
        if self._model is None:
            arm = int(self._rng.integers(self._task.settings.strategies))
        else:
            arm = int(self._model.predict(request.message[None])[0])
        self._x.append(request.message)
        self._y.append(self._task.best(request.step))
        return Answer(arm)

    def learn(self, request: Request, answer: Answer, feedback: Feedback) -> None:
        """Learns nothing: `decide` has recorded the label."""

    def _refit(self) -> None:
        n = len(self._y)
        due = n in (10, 20, 40, 70) or (n and n % self._every == 0)
        if not due or len(set(self._y)) < 2:
            return
        from sklearn.linear_model import LogisticRegression  # noqa: PLC0415 - an extra

        self._model = LogisticRegression(C=self._c, max_iter=200).fit(np.stack(self._x), self._y)


def _with_bias(request: Request) -> DoubleArray:
    return np.append(request.message.astype(np.float64), 0.5)


def _argmax(values: Sequence[float] | DoubleArray, rng: np.random.Generator) -> int:
    """Index of the highest value, ties broken at random."""
    array = np.asarray(values)
    return int(rng.choice(np.flatnonzero(array >= array.max() - 1e-12)))
