"""MemoryGate: how relevant each memory is to a situation.

It scores and selects; it stores no memories. They live with the agent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cortex_core.errors import ConfigError, DimensionError
from cortex_core.landmarks import Floats, Landmarks

GAIN = 5.0
"""Log-odds of a content user for one unit of score: a cosine's whole range is worth as much as a strategy."""
MEMORY_GAMMA = 4.0
"""Of the memories' kernel: paraphrases of one memory share what is learned, memories of one topic do not."""
PRIOR_PRECISION = 1.0
"""Of each weight of the kernel part, in units of log-odds⁻²."""
SHRINKAGE = 0.1
"""Precision with which replay pulls V to zero, so that going over replies again does not overfit them."""
OPTIMISM = 0.1
"""Score that a memory of which nothing is known gets on top: far ones are tried as well."""
TEMPERATURE = 0.02
"""Of the draw of a slate, in units of score."""


@dataclass(frozen=True, slots=True)
class Slate:
    """The memories drawn for one answer, slot by slot."""

    indices: list[int]
    scores: list[float]
    propensities: list[float]
    """probability of each memory in its slot, given the slots before it"""
    logit: float
    """what was learned about these memories adds to the log-odds of a content user"""
    best_passed: float | None
    """highest score that was passed over; None when nothing was"""


class MemoryGate(nn.Module):
    """score(situation, memory) = ŝᵀ W m̂ + φ(message)ᵀ V ψ(memory) / GAIN.

    ŝ and m̂ have L2 norm 1; W is the identity and V zero at birth, so that an untrained gate is exactly cosine
    similarity. W generalises to any memory; V, on kernel features of the message and of the memory, learns
    quickly that this memory helps, or hurts, with requests like that. φ are the features of the selector's
    landmarks, ψ the kernel values with the gate's own.

    Args:
        situation_dim: S.
        memory_dim: D of the memories' embeddings; None takes `situation_dim`.
        features: number of the message's features φ.
        landmarks: number of memories that V can tell apart.
    """

    precision: Tensor
    """(features, landmarks) float16: how much is known of each weight of V"""
    kernel_weight: Tensor
    """(features, landmarks) V, in log-odds"""

    def __init__(
        self,
        situation_dim: int = 384,
        memory_dim: int | None = None,
        *,
        features: int = 384,
        landmarks: int = 256,
    ) -> None:
        super().__init__()
        memory_dim = situation_dim if memory_dim is None else memory_dim
        if min(situation_dim, memory_dim) < 1:
            raise ConfigError(f"MemoryGate wants positive dimensions, got {situation_dim=}, {memory_dim=}")
        self.situation_dim = situation_dim
        self.memory_dim = memory_dim
        self.weight = nn.Parameter(torch.eye(situation_dim, memory_dim))
        self.landmarks = Landmarks(memory_dim, landmarks, gamma=MEMORY_GAMMA, novelty=0.2)
        self.register_buffer("kernel_weight", torch.zeros(features, landmarks))
        self.register_buffer("precision", torch.zeros(features, landmarks, dtype=torch.float16))
        self.register_buffer("birth", torch.zeros(0))
        self._seen: tuple[int, int] | None = None
        self._known: Floats = np.zeros((0,), np.float32)

    def reset_parameters(self, basis: Tensor | None = None) -> None:
        """W back to birth: the identity, or (S, D) `basis` where situations are projections of texts."""
        with torch.no_grad():
            self.weight.copy_(torch.eye(self.situation_dim, self.memory_dim) if basis is None else basis)
        if basis is not None:
            self.birth = basis.clone()

    def score_memories(self, situation: Tensor, memories: Tensor) -> Tensor:
        """(N,) ŝᵀWm̂ of (N, D) memories in one (S,) situation; (B, N) for (B, S) and (B, N, D) or (N, D)."""
        return self._bilinear(situation, memories, self.weight)

    def forward(self, situation: Tensor, memories: Tensor) -> Tensor:
        """Same as `score_memories`."""
        return self.score_memories(situation, memories)

    def select_top_k(self, situation: Tensor, memories: Tensor, k: int = 3) -> tuple[Tensor, Tensor]:
        """(indices, scores) of the `k` best, best first; fewer where there are fewer than `k`."""
        scores = self.score_memories(situation, memories)
        top = torch.topk(scores, min(max(k, 0), scores.shape[-1]), dim=-1)
        return top.indices, top.values

    def learned_scores(self, situation: Tensor, memories: Tensor) -> Tensor:
        """What W has learned since birth: ŝᵀ(W − W₀)m̂, shaped as `score_memories` gives it."""
        born = self.birth if self.birth.numel() else torch.eye(self.situation_dim, self.memory_dim)
        return self._bilinear(situation, memories, self.weight - born)

    @torch.no_grad()
    def draw_slate(
        self,
        situation: Tensor,
        memories: Tensor,
        k: int,
        *,
        explore: bool,
        rng: np.random.Generator,
        phi: Floats | None = None,
    ) -> Slate:
        """Draws `k` of (N, D) memories for one (S,) situation: Plackett–Luce over optimistic scores.

        Each slot is a softmax over what is left, so that every slot's propensity is exact. `phi` (M,) are the
        message's features; without them W alone decides.
        """
        k = min(max(k, 0), len(memories))
        if k == 0:
            return Slate([], [], [], 0.0, None)
        scores = self.score_memories(situation, memories).double().numpy()
        index = scores
        kernel_part = np.zeros(len(scores))
        if phi is not None and int(self.landmarks.count):
            psi = self.landmarks.kernel(memories.numpy())  # (N, L)
            kernel_part = (psi @ (phi @ self.kernel_weight.numpy())).astype(np.float64)
            scores = scores + kernel_part / GAIN
            index = scores + OPTIMISM * self.deviation(phi, psi)
        keys = index + TEMPERATURE * rng.gumbel(size=len(index)) if explore else scores
        order = np.argsort(-keys, kind="stable")
        indices = [int(i) for i in order[:k]]
        propensities: list[float] = []
        left = np.exp((index - index.max()) / TEMPERATURE)
        for chosen in indices:
            propensities.append(max(float(left[chosen] / left.sum()), 1e-12) if explore else 1.0)
            left[chosen] = 0.0
        passed = scores[order[k:]]
        learned = self.learned_scores(situation, memories[indices]).double().numpy()
        return Slate(
            indices,
            [float(scores[i]) for i in indices],
            propensities,
            float(GAIN * learned.sum() + kernel_part[indices].sum()),
            float(passed.max()) if len(passed) else None,
        )

    def deviation(self, phi: Floats, psi: Floats) -> npt.NDArray[np.float64]:
        """(N,) posterior standard deviation of the kernel part relative to its prior one, in [0, 1]."""
        share = phi * phi
        known = share @ (PRIOR_PRECISION / (PRIOR_PRECISION + self._precision()))  # (L,)
        total = float(share.sum())
        inside = np.minimum((psi * psi) @ known, 1.0)
        outside = np.maximum(1.0 - np.minimum((psi * psi).sum(1), 1.0) * total, 0.0)
        out: npt.NDArray[np.float64] = np.sqrt(np.clip(inside + outside, 0.0, 1.0)).astype(np.float64)
        return out

    def kernel_logit(self, phi: Floats, psi: Floats) -> Floats:
        """(B,) the kernel part of slates with features (B, M) and summed memory features (B, L)."""
        out: Floats = ((phi @ self.kernel_weight.numpy()) * psi).sum(1)
        return out

    def condition(
        self,
        phi: Floats,
        psi: Floats,
        gradient: Floats,
        curvature: Floats,
        *,
        fresh: bool,
        share: float = 0.0,
    ) -> None:
        """A step on V: the diagonal Laplace posterior of Chapelle & Li 2011, algorithm 3, batch by batch.

        Args:
            phi: (B, M); psi: (B, L) summed over a slate.
            gradient: (B,) of the log-likelihood by the logit, weighted.
            share: of all experiences that this batch is; so much of the prior pulls as well.
            curvature: (B,) of minus it; counted only for `fresh` replies, so that replay adds no certainty.
        """
        with torch.no_grad():
            precision = self._precision()
            if fresh:
                precision += (phi * phi).T @ (curvature[:, None] * psi * psi)
                np.minimum(precision, 6e4, out=precision)  # float16 ends at 65,504
                self.precision.copy_(torch.from_numpy(precision))
                self._seen = (id(self.precision), self.precision._version)
            step = phi.T @ (gradient[:, None] * psi)
            if share:
                step -= (share * SHRINKAGE) * self.kernel_weight.numpy()
            self.kernel_weight += torch.from_numpy((step / (PRIOR_PRECISION + precision)).astype(np.float32))

    def _precision(self) -> Floats:
        """(features, landmarks) float32, read again where the buffer was written to from outside."""
        version = (id(self.precision), self.precision._version)
        if version != self._seen:
            self._known, self._seen = self.precision.float().numpy(), version
        return self._known

    def contrastive_loss(
        self, situation: Tensor, positive: Tensor, negative: Tensor, margin: float = 0.5
    ) -> Tensor:
        """Mean of max(0, margin − score(positive) + score(negative)) over all pairs (Hadsell et al. 2006).

        Args:
            situation: (S,).
            positive: (P, D) memories that helped.
            negative: (Q, D) memories that did not.

        Returns:
            A scalar; 0 where either side is empty.
        """
        positive = positive.reshape(-1, self.memory_dim)
        negative = negative.reshape(-1, self.memory_dim)
        if not len(positive) or not len(negative):
            return situation.sum() * 0.0
        scores = self.score_memories(situation, torch.cat([positive, negative]))
        good, bad = scores[: len(positive)], scores[len(positive) :]
        return F.relu(margin - good[:, None] + bad[None, :]).mean()

    def _bilinear(self, situation: Tensor, memories: Tensor, weight: Tensor) -> Tensor:
        if situation.ndim not in (1, 2) or situation.shape[-1] != self.situation_dim:
            raise DimensionError("situation", tuple(situation.shape), f"(…, {self.situation_dim})")
        if memories.ndim not in (2, 3) or memories.shape[-1] != self.memory_dim:
            raise DimensionError("memories", tuple(memories.shape), f"(N, {self.memory_dim})")
        query = F.normalize(situation, dim=-1) @ weight
        unit = F.normalize(memories, dim=-1)
        return (unit @ query.unsqueeze(-1)).squeeze(-1) if memories.ndim == 3 else query @ unit.T
