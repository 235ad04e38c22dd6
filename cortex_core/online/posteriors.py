"""Posterior updates of selector, gate and estimator: the part of an online step without gradients.

Caches the kernel features of recent experiences for replay. Everything that decisions need is in the model's
buffers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from cachetools import LRUCache

from cortex_core.arrays import FloatArray, unit
from cortex_core.confidence_estimator import ConfidenceEstimator
from cortex_core.memory_gate import MemoryGate
from cortex_core.replay_buffer import ReplayEntry
from cortex_core.strategy_selector import StrategySelector

CALIBRATION_WINDOW = 600
"""Number of latest decisions on which the confidence is calibrated."""
RING = 2_000
"""Number of latest replies with memories to which the gate's posterior is fitted again and again."""
REPLAYED = 128
"""Number of replies drawn from the ring for each fit of the gate's posterior, besides the fresh ones."""
MEAN_SCORE_WINDOW = 1_000.0
"""Number of slates over which the mean score is averaged."""
KNOWN = 10_000
"""Number of ids whose last reward is kept, to distinguish an amended reward from a new experience."""


class FeatureReplay:
    """Ring buffer of the latest `capacity` experiences with memories, for `MemoryGate.condition`."""

    def __init__(self, features: int, landmarks: int, capacity: int = RING) -> None:
        self.phi: FloatArray = np.zeros((capacity, features), np.float32)
        self.psi: FloatArray = np.zeros((capacity, landmarks), np.float32)
        self.strategy = np.zeros(capacity, np.int64)
        self.bilinear: FloatArray = np.zeros(capacity, np.float32)
        """log-odds of the gate's bilinear part"""
        self.label: FloatArray = np.zeros(capacity, np.float32)
        self.weight: FloatArray = np.zeros(capacity, np.float32)
        self.dual: FloatArray = np.zeros(capacity, np.float32)
        """α of `MemoryGate.condition`; V keeps the contribution of an overwritten row"""
        self.used = 0
        self._next = 0
        self._row_of: dict[str, int] = {}
        self._id_of = [""] * capacity

    def add(self, entry_id: str) -> int:
        """The row for a new experience; overwrites the oldest one if the ring is full."""
        row = self._next
        self._row_of.pop(self._id_of[row], None)
        self._id_of[row] = entry_id
        if entry_id:
            self._row_of[entry_id] = row
        self.dual[row] = 0.0
        self._next = (row + 1) % len(self.phi)
        self.used = min(self.used + 1, len(self.phi))
        return row

    def row(self, entry_id: str) -> int | None:
        """The row of an experience, or None if it was overwritten."""
        return self._row_of.get(entry_id)


@dataclass(slots=True)
class _Decision:
    """What the calibration learns from."""

    context: list[float]
    label: float
    weight: float


@dataclass(slots=True)
class _Learned:
    """The last reward of an experience, and what was predicted before the first."""

    label: float
    weight: float
    predicted: float
    decision: _Decision


class Posteriors:
    """Conditions selector, gate and estimator on replies, with replay for the gate."""

    def __init__(
        self,
        selector: StrategySelector,
        gate: MemoryGate,
        estimator: ConfidenceEstimator,
        *,
        replay: bool = True,
    ) -> None:
        self.estimator = estimator
        self.selector = selector
        self.gate = gate
        self.replay = replay
        self._ring = FeatureReplay(selector.landmarks.size, gate.landmarks.size)
        self._known: LRUCache[str, _Learned] = LRUCache(KNOWN)
        self._decisions: deque[_Decision] = deque(maxlen=CALIBRATION_WINDOW)
        # A fixed seed: the same experiences give the same weights.
        self._rng = np.random.default_rng(0)

    def clear(self) -> None:
        """Clears the ring: its α are valid only for the weights that they were fitted with."""
        self._ring = FeatureReplay(self.selector.landmarks.size, self.gate.landmarks.size)

    def knows(self, entry_id: str) -> bool:
        """Whether a reply to this interaction was learned from, so that a new one amends its reward."""
        return bool(entry_id) and entry_id in self._known

    def features(self, entries: Sequence[ReplayEntry], admit: int) -> tuple[FloatArray, FloatArray]:
        """(B, M) φ and (B, L) ψ summed over each slate; the first `admit` entries may become landmarks."""
        messages = np.zeros((len(entries), self.selector.text_dim), np.float32)
        for row, entry in enumerate(entries):
            message = self.selector.kernel_input(entry.message_emb, entry.situation_emb)
            if message is not None:
                messages[row] = message
        messages = unit(messages)
        self.selector.landmarks.admit_new(messages[:admit])
        phi = self.selector.landmarks.features(messages)
        psi = np.zeros((len(entries), self.gate.landmarks.size), np.float32)
        rows: list[int] = []
        starts: list[int] = []
        shown: list[FloatArray] = []
        new = 0
        for row, entry in enumerate(entries):
            if entry.memory_embs is not None and entry.memory_indices:
                chosen = unit(entry.memory_embs[entry.memory_indices])
                if row < admit:
                    new = len(shown) + 1
                starts.append(sum(map(len, shown)))
                shown.append(chosen)
                rows.append(row)
        if new:
            self.gate.landmarks.admit_new(np.concatenate(shown[:new]))
        if shown:
            sums = np.add.reduceat(self.gate.landmarks.kernel(np.concatenate(shown)), starts, axis=0)
            psi[rows] = self.gate.landmarks.project(sums)
        return phi, psi

    def condition(
        self,
        entries: Sequence[ReplayEntry],
        phi: FloatArray,
        psi: FloatArray,
        *,
        strategy: Sequence[int],
        prior: FloatArray,
        scores: FloatArray,
        bilinear: FloatArray,
        label: FloatArray,
        weight: FloatArray,
    ) -> None:
        """Conditions on fresh replies, in order.

        An amended reward replaces the one before; one with weight 0 takes it back. Gate and calibration then
        keep nothing of it. In the selector's posterior it stays as a reply that came as predicted: the mean
        is as if it had not been there, the covariance as small as with it. Of all but the last `KNOWN` ids an
        amended reward is learned as a new one.

        Args:
            phi: (B, M) message features.
            psi: (B, L) memory features, summed over each slate.
            strategy: (B,) index of the strategy used.
            prior: (B,) prior means of the strategies used.
            scores: (B,) mean ŝᵀWm̂ of the memories shown.
            bilinear: (B,) log-odds that the memories add.
            label: (B,) 1 for a satisfied user, else 0.
            weight: (B,) sample weights.
        """
        fresh: list[int] = []
        for row, entry in enumerate(entries):
            w, y = float(weight[row]), float(label[row])
            before = self._known.get(entry.id) if entry.id else None
            if before is not None:
                heavier = max(w, before.weight, 1e-6)
                contribution = w * (y - before.predicted)
                change = (contribution - before.weight * (before.label - before.predicted)) / heavier
                self.selector.amend(phi[row], strategy[row], change, heavier)
                before.decision.label, before.decision.weight = y, w
                before.label, before.weight = y, w
                known = self._ring.row(entry.id)
                if known is not None:
                    self._ring.label[known], self._ring.weight[known] = y, w
                    fresh.append(known)
                continue
            # The residual does not subtract the memories' effect: that made the selector fit the errors of
            # the gate.
            predicted = float(prior[row] + self.selector.mean[strategy[row]].numpy() @ phi[row])
            decision = _Decision(entry.context, y, w)
            if entry.id:
                self._known[entry.id] = _Learned(y, w, predicted, decision)
            if w > 0.0:
                self.selector.condition(phi[row], strategy[row], y - predicted, w)
                if entry.context:
                    self._decisions.append(decision)
            if psi[row].any():
                self._update_mean_score(float(scores[row]))
                if w > 0.0:
                    fresh.append(
                        self._remember(
                            entry.id, phi[row], psi[row], strategy[row], float(bilinear[row]), y, w
                        )
                    )
        self._fit_gate(fresh)
        decisions = [it for it in self._decisions if it.weight > 0.0]
        if decisions:
            columns = zip(*((it.context, it.label, it.weight) for it in decisions), strict=True)
            self.estimator.fit(*(np.array(values, np.float32) for values in columns))

    def recall(
        self,
        entries: Sequence[ReplayEntry],
        phi: FloatArray,
        psi: FloatArray,
        *,
        strategy: Sequence[int],
        prior: FloatArray,
        bilinear: FloatArray,
        label: FloatArray,
        weight: FloatArray,
    ) -> None:
        """Fills ring and calibration window with replies that the weights were conditioned on already.

        After a restart, in the order of learning; no weight changes. Labels, weights and contexts are what
        they were. φ and ψ are those of all present landmarks, which extend the earlier ones; what was
        predicted before a reply, the gate's log-odds and its α are computed with the present weights.

        Args: as of `condition`.
        """
        means = self.selector.mean.numpy()
        rows, places = [], []
        for row, entry in enumerate(entries):
            w, y = float(weight[row]), float(label[row])
            decision = _Decision(entry.context, y, w)
            if entry.id:
                predicted = float(prior[row] + means[strategy[row]] @ phi[row])
                self._known[entry.id] = _Learned(y, w, predicted, decision)
            if w > 0.0 and entry.context:
                self._decisions.append(decision)
            if w > 0.0 and psi[row].any():
                rows.append(row)
                places.append(
                    self._remember(entry.id, phi[row], psi[row], strategy[row], float(bilinear[row]), y, w)
                )
        self._ring.dual[places] = self.gate.dual_of(
            phi=phi[rows],
            psi=psi[rows],
            strategy=np.array(strategy, np.int64)[rows],
            bilinear=bilinear[rows],
            label=label[rows],
            weight=weight[rows],
        )

    def _remember(  # noqa: PLR0917 - one row
        self,
        entry_id: str,
        phi: FloatArray,
        psi: FloatArray,
        strategy: int,
        bilinear: float,
        label: float,
        weight: float,
    ) -> int:
        """Adds a reply to the ring; returns its place."""
        ring, place = self._ring, self._ring.add(entry_id)
        ring.phi[place], ring.psi[place] = phi, psi
        ring.strategy[place], ring.bilinear[place] = strategy, bilinear
        ring.label[place], ring.weight[place] = label, weight
        return place

    def _update_mean_score(self, score: float) -> None:
        mean, slates = self.gate.mean_score.tolist()
        slates = min(slates + 1.0, MEAN_SCORE_WINDOW)
        with torch.no_grad():
            self.gate.mean_score.copy_(torch.tensor([mean + (score - mean) / slates, slates]))

    def _fit_gate(self, fresh: list[int]) -> None:
        ring = self._ring
        count = min(ring.used, REPLAYED) if self.replay else 0
        replayed = self._rng.choice(ring.used, count, replace=False).tolist() if count else []
        rows = np.array(list(dict.fromkeys([*fresh, *replayed])), np.int64)
        if not len(rows):
            return
        ring.dual[rows] = self.gate.condition(
            phi=ring.phi[rows],
            psi=ring.psi[rows],
            strategy=ring.strategy[rows],
            bilinear=ring.bilinear[rows],
            label=ring.label[rows],
            weight=ring.weight[rows],
            dual=ring.dual[rows],
        )


def chosen_mean(selector: StrategySelector, phi: FloatArray, strategy: Sequence[int]) -> torch.Tensor:
    """(B,) μ_aᵀφ of the chosen strategies."""
    mean = selector.mean.numpy()[list(strategy)]
    return torch.from_numpy((mean * phi).sum(1))
