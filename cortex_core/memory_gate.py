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

from cortex_core.arrays import FloatArray
from cortex_core.errors import ConfigError, DimensionError
from cortex_core.landmarks import Landmarks

GAIN = 2.0
"""Log-odds of a content user for one unit of score, a cosine's whole range: what is believed at birth."""
MEMORY_GAMMA = 4.0
"""Of the memories' kernel: paraphrases of one memory share what is learned, memories of one topic do not."""
PRIOR_VARIANCE = 5.0
"""Of the kernel part of one memory in one situation, in squared log-odds."""
STRATEGY_VARIANCE = 2.0
"""Of what the strategy adds in one situation, in squared log-odds: replies are shared out between it and the
memories by these two."""
BIAS_VARIANCE = 1.0
"""Of how content users are on the whole."""
TEMPERATURE = 0.012
"""Of the draw of a slate, in units of score: near ties are drawn by chance, a lead of 0.05 is decisive."""


@dataclass(frozen=True, slots=True)
class Slate:
    """The memories drawn for one answer, slot by slot."""

    indices: list[int]
    scores: list[float]
    propensities: list[float]
    """probability of each memory in its slot, given the slots before it"""
    logit: float
    """log-odds that these memories add for a content user, against the usual slate"""
    best_passed: float | None
    """highest score that was passed over; None when nothing was"""


class MemoryGate(nn.Module):
    """score(situation, memory) = ŝᵀ W m̂ + φ(message)ᵀ V ψ(memory) / GAIN.

    ŝ and m̂ have L2 norm 1; W is the identity and V zero at birth, so that an untrained gate is exactly cosine
    similarity. W generalises to any memory; V learns quickly that this memory helps, or hurts, with requests
    like that: it is the mean of a Gaussian process over (message, memory) with the product of two kernels, φ
    the features of the selector's landmarks and ψ those of the gate's own. A slate's score is the sum of its
    memories'. A user who got strategy a is content with log-odds b + U_aᵀφ + GAIN · (score − usual score): U
    and b are fitted with V, so that memories are not credited with what the strategy did. Decisions on
    strategies are the selector's.

    Args:
        situation_dim: S.
        memory_dim: D of the memories' embeddings; None takes `situation_dim`.
        features: number of the message's features φ.
        landmarks: number of memories that V can tell apart.
        strategies: A.
    """

    kernel_weight: Tensor
    """(features, landmarks) V, in log-odds"""
    strategy_weight: Tensor
    """(A, features + 1) U, and b in its last column, which all strategies share"""
    usual: Tensor
    """(2,) mean ŝᵀWm̂ of the memories shown so far, and how many slates that is the mean of"""

    def __init__(
        self,
        situation_dim: int = 384,
        memory_dim: int | None = None,
        *,
        features: int = 384,
        landmarks: int = 256,
        strategies: int = 7,
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
        self.register_buffer("strategy_weight", torch.zeros(strategies, features + 1))
        self.register_buffer("usual", torch.zeros(2))

    def reset_parameters(self, basis: Tensor | None = None) -> None:
        """W back to birth: the identity, or (S, D) `basis` where situations are projections of texts."""
        with torch.no_grad():
            self.weight.copy_(torch.eye(self.situation_dim, self.memory_dim) if basis is None else basis)

    def score_memories(self, situation: Tensor, memories: Tensor) -> Tensor:
        """(N,) ŝᵀWm̂ of (N, D) memories in one (S,) situation; (B, N) for (B, S) and (B, N, D) or (N, D)."""
        return self._bilinear(situation, F.normalize(memories, dim=-1))

    def forward(self, situation: Tensor, memories: Tensor) -> Tensor:
        """Same as `score_memories`."""
        return self.score_memories(situation, memories)

    def select_top_k(self, situation: Tensor, memories: Tensor, k: int = 3) -> tuple[Tensor, Tensor]:
        """(indices, scores) of the `k` best, best first; fewer where there are fewer than `k`."""
        scores = self.score_memories(situation, memories)
        top = torch.topk(scores, min(max(k, 0), scores.shape[-1]), dim=-1)
        return top.indices, top.values

    def log_odds(self, scores: Tensor, mask: Tensor) -> Tensor:
        """(B,) log-odds of a content user that slates add, with ŝᵀWm̂ (B, K) where `mask` (B, K) is 1."""
        usual, slates = self.usual.tolist()
        gain = GAIN if slates else 0.0
        out: Tensor = gain * ((scores - usual) * mask).sum(-1)
        return out

    @torch.no_grad()
    def draw_slate(
        self,
        situation: Tensor,
        memories: Tensor,
        k: int,
        *,
        explore: bool,
        rng: np.random.Generator,
        phi: FloatArray | None = None,
    ) -> Slate:
        """Draws `k` of (N, D) memories for one (S,) situation: Plackett–Luce over the scores.

        Each slot is a softmax over what is left, so that every slot's propensity is exact. `phi` (M,) are the
        message's features; without them W alone decides.
        """
        k = min(max(k, 0), len(memories))
        if k == 0:
            return Slate([], [], [], 0.0, None)
        memories = F.normalize(memories, dim=-1)
        bilinear = self._bilinear(situation, memories)
        scores = bilinear.double().numpy()
        kernel_part = np.zeros(len(scores))
        if phi is not None and int(self.landmarks.count):
            kernel_part = self.landmarks.evaluate(memories.numpy(), phi @ self.kernel_weight.numpy())
            scores = scores + kernel_part / GAIN
        keys = scores + TEMPERATURE * rng.gumbel(size=len(scores)) if explore else scores
        order = np.argsort(-keys, kind="stable")
        indices = [int(i) for i in order[:k]]
        propensities: list[float] = []
        left = np.exp((scores - scores.max()) / TEMPERATURE)
        for chosen in indices:
            propensities.append(max(float(left[chosen] / left.sum()), 1e-12) if explore else 1.0)
            left[chosen] = 0.0
        passed = scores[order[k:]]
        usual = float(self.log_odds(bilinear[indices], torch.ones(k)))
        return Slate(
            indices,
            [float(scores[i]) for i in indices],
            propensities,
            usual + float(kernel_part[indices].sum()),
            float(passed.max()) if len(passed) else None,
        )

    def kernel_logit(self, phi: FloatArray, psi: FloatArray) -> FloatArray:
        """(B,) the kernel part of slates with features (B, M) and summed memory features (B, L)."""
        out: FloatArray = ((phi @ self.kernel_weight.numpy()) * psi).sum(1)
        return out

    def condition(
        self,
        *,
        phi: FloatArray,
        psi: FloatArray,
        strategy: npt.NDArray[np.int64],
        bilinear: FloatArray,
        content: FloatArray,
        weight: FloatArray,
        dual: FloatArray,
    ) -> FloatArray:
        """Fits V, U and b to a block of replies: one Newton step in the dual.

        Their posterior mode given all replies is a sum over them, V = PRIOR_VARIANCE · Σ αᵢ φᵢψᵢᵀ and U and b
        likewise, with αᵢ = wᵢ(yᵢ − σ(logitᵢ)) (Rasmussen & Williams 2006, eq. 3.17). It is approached a block
        at a time, the others' α as they are (Yu, Huang & Lin 2011, "Dual coordinate descent methods for
        logistic regression", in blocks).

        Args:
            phi: (B, M); psi: (B, L) summed over a slate.
            strategy: (B,) of the answers.
            bilinear: (B,) what `log_odds` gave.
            content: (B,) replies in [0, 1].
            weight: (B,) their sureness in [0, 1].
            dual: (B,) their α so far.

        Returns:
            (B,) their new α.
        """
        share = self.strategy_weight.numpy()[strategy]
        logit = bilinear + self.kernel_logit(phi, psi) + (share[:, :-1] * phi).sum(1) + share[:, -1]
        p = 1.0 / (1.0 + np.exp(-logit))
        spread = np.maximum(weight * p * (1.0 - p), 1e-3)
        chosen = np.eye(len(self.strategy_weight), dtype=np.float32)[strategy]  # (B, A)
        kernel: FloatArray = PRIOR_VARIANCE * (psi @ psi.T) + STRATEGY_VARIANCE * (chosen @ chosen.T)
        kernel *= phi @ phi.T
        kernel += BIAS_VARIANCE
        kernel[np.diag_indices_from(kernel)] += 1.0 / spread
        change = np.linalg.solve(kernel, (weight * (content - p) - dual) / spread).astype(np.float32)
        with torch.no_grad():
            self.kernel_weight += torch.from_numpy(phi.T @ ((PRIOR_VARIANCE * change)[:, None] * psi))
            strategies = chosen.T @ ((STRATEGY_VARIANCE * change)[:, None] * phi)
            self.strategy_weight[:, :-1] += torch.from_numpy(strategies)
            self.strategy_weight[:, -1] += BIAS_VARIANCE * float(change.sum())
        return dual + change

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

    def _bilinear(self, situation: Tensor, memories: Tensor) -> Tensor:
        """`score_memories` of memories of norm 1."""
        if situation.ndim not in (1, 2) or situation.shape[-1] != self.situation_dim:
            raise DimensionError("situation", tuple(situation.shape), f"(…, {self.situation_dim})")
        if memories.ndim not in (2, 3) or memories.shape[-1] != self.memory_dim:
            raise DimensionError("memories", tuple(memories.shape), f"(N, {self.memory_dim})")
        query = F.normalize(situation, dim=-1) @ self.weight
        return (memories @ query.unsqueeze(-1)).squeeze(-1) if memories.ndim == 3 else query @ memories.T
