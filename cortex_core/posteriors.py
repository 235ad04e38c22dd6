"""From experiences to the posteriors of selector and gate: the part of an online step that is no gradient.

It keeps the kernel features of recent experiences, so that replay of them costs one matrix product. What it
keeps is a cache: everything that decisions need is in the model's buffers.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

import numpy as np
import torch

from cortex_core.confidence_estimator import ConfidenceEstimator
from cortex_core.landmarks import Floats
from cortex_core.memory_gate import MemoryGate
from cortex_core.replay_buffer import ReplayEntry
from cortex_core.strategy_selector import StrategySelector

CALIBRATED = 600
"""Latest decisions that the confidence is calibrated on."""
REPLAY_BATCH = 16
"""Rows in one step on the gate's V; more at once would overshoot where they are alike."""
KNOWN = 10_000
"""Ids whose last reward is remembered, to tell an amended reward from a second sample."""


class FeatureReplay:
    """Ring of the features, strategies and replies of the latest `capacity` experiences with memories."""

    def __init__(self, features: int, landmarks: int, capacity: int = 1_000) -> None:
        self.phi: Floats = np.zeros((capacity, features), np.float32)
        self.psi: Floats = np.zeros((capacity, landmarks), np.float32)
        self.offset: Floats = np.zeros(capacity, np.float32)
        """log-odds of what is not the kernel part"""
        self.content: Floats = np.zeros(capacity, np.float32)
        self.weight: Floats = np.zeros(capacity, np.float32)
        self.used = 0
        self._next = 0

    def add(self, phi: Floats, psi: Floats, offset: float, content: float, weight: float) -> None:
        """Over the oldest one where the ring is full."""
        row = self._next
        self.phi[row], self.psi[row] = phi, psi
        self.offset[row], self.content[row], self.weight[row] = offset, content, weight
        self._next = (row + 1) % len(self.phi)
        self.used = min(self.used + 1, len(self.phi))


class Posteriors:
    """Conditions selector and gate on replies, and replays them for the gate."""

    def __init__(
        self,
        selector: StrategySelector,
        gate: MemoryGate,
        estimator: ConfidenceEstimator,
        *,
        replay: int = 64,
    ) -> None:
        self.estimator = estimator
        self.selector = selector
        self.gate = gate
        self.replay = replay
        self._ring = FeatureReplay(selector.landmarks.size, gate.landmarks.size)
        self._known: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._contexts: deque[tuple[list[float], float, float]] = deque(maxlen=CALIBRATED)
        # A seed of its own: the same experiences give the same weights.
        self._rng = np.random.default_rng(0)

    def knows(self, entry_id: str) -> bool:
        """Whether a reply to this interaction was learned from, so that a new one amends it."""
        return bool(entry_id) and entry_id in self._known

    def features(self, entries: Sequence[ReplayEntry], admit: int) -> tuple[Floats, Floats]:
        """(B, M) φ and (B, L) summed ψ; the first `admit` entries may become landmarks."""
        messages = np.zeros((len(entries), self.selector.text_dim), np.float32)
        for row, entry in enumerate(entries):
            message = self.selector.kernel_input(entry.message_emb, entry.situation_emb)
            if message is not None:
                messages[row] = message
        self.selector.landmarks.admit_new(messages[:admit])
        phi = self.selector.features(messages)
        psi = np.zeros((len(entries), self.gate.landmarks.size), np.float32)
        rows: list[int] = []
        shown: list[Floats] = []
        new = 0
        for row, entry in enumerate(entries):
            if entry.memory_embs is not None and entry.memory_indices:
                chosen = entry.memory_embs[entry.memory_indices]
                if row < admit:
                    new = len(shown) + 1
                shown.append(chosen)
                rows.extend([row] * len(chosen))
        if new:
            self.gate.landmarks.admit_new(np.concatenate(shown[:new]))
        if shown:
            np.add.at(psi, rows, self.gate.landmarks.kernel(np.concatenate(shown)))
        return phi, psi

    def condition(
        self,
        entries: Sequence[ReplayEntry],
        phi: Floats,
        psi: Floats,
        *,
        mean: Floats,
        predicted: Floats,
        offset: Floats,
        strategy: Sequence[int],
        content: Floats,
        weight: Floats,
    ) -> None:
        """On fresh replies, in their order.

        Args:
            mean: (B,) P(content) of the strategy, averaged over the memories that go with it, which is what
                the selector estimates: explaining replies by memories first made it follow the gate's errors.
            predicted: (B,) P(content) of the whole answer before these replies.
            offset: (B,) log-odds of it without the gate's kernel part.
            weight: (B,) sureness of each reply.
        """
        for row, entry in enumerate(entries):
            w, y = float(weight[row]), float(content[row])
            before = self._known.pop(entry.id, None) if entry.id else None
            if entry.id:
                self._known[entry.id] = (y, w)
            if len(self._known) > KNOWN:
                self._known.popitem(last=False)
            if before is not None:
                # The reward was amended: the same place in the posterior, another value.
                change = (y * w - before[0] * before[1]) / max(w, before[1], 1e-6)
                self.selector.amend(phi[row], strategy[row], change, max(w, before[1]))
                continue
            if w > 0.0:
                self.selector.condition(phi[row], strategy[row], y - float(mean[row]), w)
                if entry.context:
                    self._contexts.append((entry.context, y, w))
                if psi[row].any():
                    self._ring.add(phi[row], psi[row], float(offset[row]), y, w)
        spread = predicted * (1.0 - predicted)
        self.gate.condition(phi, psi, weight * (content - predicted), weight * spread, fresh=True)
        self._replay_gate()
        if self._contexts:
            contexts, replies, weights = zip(*self._contexts, strict=True)
            self.estimator.fit(*(np.array(values, np.float32) for values in (contexts, replies, weights)))

    def _replay_gate(self) -> None:
        for _ in range(self.replay // REPLAY_BATCH if self._ring.used else 0):
            self._replay_batch()

    def _replay_batch(self) -> None:
        ring = self._ring
        rows = self._rng.integers(ring.used, size=min(REPLAY_BATCH, ring.used))
        phi, psi = ring.phi[rows], ring.psi[rows]
        logit = ring.offset[rows] + self.gate.kernel_logit(phi, psi)
        error = ring.content[rows] - 1.0 / (1.0 + np.exp(-logit))
        nothing = np.zeros(len(rows), np.float32)
        share = len(rows) / ring.used
        self.gate.condition(phi, psi, ring.weight[rows] * error, nothing, fresh=False, share=share)


def chosen_mean(selector: StrategySelector, phi: Floats, strategy: Sequence[int]) -> torch.Tensor:
    """(B,) μ_aᵀφ of the chosen strategies."""
    mean = selector.mean.numpy()[list(strategy)]
    return torch.from_numpy((mean * phi).sum(1))
