"""MemoryGate: how relevant each memory is to a situation.

It scores and selects; it stores nothing. Memories live with the agent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cortex_core.errors import ConfigError, DimensionError


@dataclass(frozen=True, slots=True)
class Slate:
    """The memories drawn for one answer, slot by slot."""

    indices: list[int]
    scores: list[float]
    propensities: list[float]
    """probability of each memory in its slot, given the slots before it"""
    best_passed: float | None
    """highest score that was passed over; None when nothing was"""


class MemoryGate(nn.Module):
    """score(situation, memory) = ŝᵀ W m̂, with ŝ and m̂ of L2 norm 1 and W the identity at birth.

    So that an untrained gate is exactly cosine similarity.

    Args:
        situation_dim: S.
        memory_dim: D of the memories' embeddings; None takes `situation_dim`.
    """

    def __init__(self, situation_dim: int = 384, memory_dim: int | None = None) -> None:
        super().__init__()
        memory_dim = situation_dim if memory_dim is None else memory_dim
        if min(situation_dim, memory_dim) < 1:
            raise ConfigError(f"MemoryGate wants positive dimensions, got {situation_dim=}, {memory_dim=}")
        self.situation_dim = situation_dim
        self.memory_dim = memory_dim
        self.weight = nn.Parameter(torch.eye(situation_dim, memory_dim))
        self.gain = nn.Parameter(torch.ones(()))
        self.bias = nn.Parameter(torch.zeros(()))

    def reset_parameters(self, basis: Tensor | None = None) -> None:
        """Back to birth: the identity, or (S, D) `basis` where situations are projections of texts."""
        with torch.no_grad():
            self.weight.copy_(torch.eye(self.situation_dim, self.memory_dim) if basis is None else basis)

    def score_memories(self, situation: Tensor, memories: Tensor) -> Tensor:
        """(N,) scores of (N, D) memories in one (S,) situation; (B, N) for (B, S) and (B, N, D) or (N, D)."""
        if situation.ndim not in (1, 2) or situation.shape[-1] != self.situation_dim:
            raise DimensionError("situation", tuple(situation.shape), f"(…, {self.situation_dim})")
        if memories.ndim not in (2, 3) or memories.shape[-1] != self.memory_dim:
            raise DimensionError("memories", tuple(memories.shape), f"(N, {self.memory_dim})")
        query = F.normalize(situation, dim=-1) @ self.weight
        unit = F.normalize(memories, dim=-1)
        return (unit @ query.unsqueeze(-1)).squeeze(-1) if memories.ndim == 3 else query @ unit.T

    def forward(self, situation: Tensor, memories: Tensor) -> Tensor:
        """Same as `score_memories`."""
        return self.score_memories(situation, memories)

    def select_top_k(self, situation: Tensor, memories: Tensor, k: int = 3) -> tuple[Tensor, Tensor]:
        """(indices, scores) of the `k` best, best first; fewer where there are fewer than `k`."""
        scores = self.score_memories(situation, memories)
        top = torch.topk(scores, min(max(k, 0), scores.shape[-1]), dim=-1)
        return top.indices, top.values

    @torch.no_grad()
    def draw_slate(
        self,
        situation: Tensor,
        memories: Tensor,
        k: int,
        *,
        explore: bool,
        rng: np.random.Generator,
        temperature: float = 0.05,
    ) -> Slate:
        """Draws `k` of (N, D) memories for one (S,) situation: Plackett–Luce over score / temperature.

        Each slot is a softmax over what is left, so that every slot's propensity is exact.
        """
        scores = self.score_memories(situation, memories).double().numpy()
        k = min(max(k, 0), len(scores))
        if k == 0:
            return Slate([], [], [], None)
        keys = scores + (temperature * rng.gumbel(size=len(scores)) if explore else 0.0)
        order = np.argsort(-keys, kind="stable")
        indices = [int(i) for i in order[:k]]
        propensities: list[float] = []
        left = np.exp((scores - scores.max()) / temperature)
        for index in indices:
            propensities.append(max(float(left[index] / left.sum()), 1e-12) if explore else 1.0)
            left[index] = 0.0
        passed = scores[order[k:]]
        return Slate(
            indices,
            [float(scores[i]) for i in indices],
            propensities,
            float(passed.max()) if len(passed) else None,
        )

    def slate_logit(self, scores: Tensor, mask: Tensor) -> Tensor:
        """(B,) what (B, K) scores of retrieved memories add to the log-odds of a content user."""
        return self.gain * (scores * mask).sum(-1) + self.bias * (mask.sum(-1) > 0)

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
