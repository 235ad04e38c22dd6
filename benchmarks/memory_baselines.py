"""Baselines for memory retrieval, with the same feedback about the whole answer as the learner."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from benchmarks.baselines import KernelUCB, Uniform, label_of
from benchmarks.tasks import Answer, Request, Task
from cortex_core.arrays import DoubleArray, FloatArray
from cortex_core.feedback_collector import Feedback


class Cosine:
    """The three memories nearest to the request; a random strategy."""

    name = "cosine"

    def __init__(self, task: Task, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._strategies = task.settings.strategies
        self._memories = _bank(task)

    def decide(self, request: Request) -> Answer:
        top = np.argsort(-(self._memories @ request.message), kind="stable")[:3]
        return Answer(int(self._rng.integers(self._strategies)), tuple(top.tolist()))

    def learn(self, request: Request, answer: Answer, feedback: Feedback) -> None:
        """Learns nothing."""


class Bilinear:
    """score = xᵀ W m with W initialised to the identity, trained by logistic loss on the slate's mean score.

    P(satisfied user) = σ(gain · mean score + b); one stochastic gradient step on W and b per reply. Explores
    by Gumbel noise on the scores (a Plackett–Luce draw).
    """

    name = "bilinear"

    def __init__(
        self, task: Task, seed: int, *, lr: float = 0.6, gain: float = 1.5, temperature: float = 0.01
    ) -> None:
        self._rng = np.random.default_rng(seed)
        self._strategies = task.settings.strategies
        self._memories = _bank(task).astype(np.float64)
        self._w: DoubleArray = np.eye(self._memories.shape[1])
        self._b = 0.0
        self._lr, self._gain, self._temperature = lr, gain, temperature

    def decide(self, request: Request) -> Answer:
        scores = self._memories @ (request.message.astype(np.float64) @ self._w)
        drawn = scores + self._temperature * self._rng.gumbel(size=len(scores))
        top = np.argsort(-drawn, kind="stable")[:3]
        p = _sigmoid(self._gain * float(scores[top].mean()) + self._b)
        return Answer(int(self._rng.integers(self._strategies)), tuple(top.tolist()), confidence=p)

    def learn(self, request: Request, answer: Answer, feedback: Feedback) -> None:
        """One gradient step."""
        labelled = label_of(feedback)
        if labelled is None:
            return
        y, weight = labelled
        x = request.message.astype(np.float64)
        mean = self._memories[list(answer.memories)].mean(0)
        error = weight * (_sigmoid(self._gain * float(x @ self._w @ mean) + self._b) - y)
        self._w -= self._lr * error * np.outer(x, mean)
        self._b -= self._lr * error


class KernelAndBilinear:
    """Kernel UCB for strategy and confidence, `Bilinear` for the memories."""

    name = "kernel UCB + bilinear"

    def __init__(self, task: Task, seed: int) -> None:
        self._kernel = KernelUCB(task, seed)
        self._bilinear = Bilinear(task, seed)

    def decide(self, request: Request) -> Answer:
        return replace(self._kernel.decide(request), memories=self._bilinear.decide(request).memories)

    def learn(self, request: Request, answer: Answer, feedback: Feedback) -> None:
        """Trains both."""
        self._kernel.learn(request, answer, feedback)
        self._bilinear.learn(request, answer, feedback)


class ConstantConfidence:
    """Uniform choice; the confidence is the fraction of satisfied users so far."""

    name = "constant confidence"

    def __init__(self, task: Task, seed: int) -> None:
        self._uniform = Uniform(task, seed)
        self._satisfied, self._replies = 1.0, 2.0

    def decide(self, request: Request) -> Answer:
        return replace(self._uniform.decide(request), confidence=self._satisfied / self._replies)

    def learn(self, request: Request, answer: Answer, feedback: Feedback) -> None:
        """Counts satisfied users."""
        labelled = label_of(feedback)
        if labelled is not None:
            self._satisfied += labelled[0] * labelled[1]
            self._replies += labelled[1]


def _bank(task: Task) -> FloatArray:
    if task.memories is None:
        raise ValueError(f"the world {task.world!r} has no memories")
    return task.memories


def _sigmoid(z: float) -> float:
    return float(1.0 / (1.0 + np.exp(-np.clip(z, -30.0, 30.0))))
