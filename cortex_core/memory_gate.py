"""MemoryGate: scores how relevant each memory is to a situation, and selects memories.

It does not store memories; the agent does.
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
"""Log-odds of a satisfied user per unit of score: the untrained model's effect of a memory's cosine."""
MEMORY_GAMMA = 4.0
"""γ of the memory kernel: paraphrases of a memory share what is learned, memories of one topic do not."""
PRIOR_VARIANCE = 5.0
"""Prior variance of the kernel part of one memory's score, in squared log-odds."""
STRATEGY_VARIANCE = 2.0
"""Prior variance of a strategy's effect, in squared log-odds. The ratio to PRIOR_VARIANCE divides the credit
for a reply between strategy and memories."""
BIAS_VARIANCE = 1.0
"""Prior variance of the bias b, in squared log-odds."""
TEMPERATURE = 0.012
"""Temperature of the slate's softmax, in units of score: near ties are random, a lead of 0.05 is decisive."""


@dataclass(frozen=True, slots=True)
class Slate:
    """The memories drawn for one answer, in slot order."""

    indices: list[int]
    scores: list[float]
    propensities: list[float]
    """probability of each memory in its slot, given the slots before it"""
    logit: float
    """log-odds of a satisfied user that these memories add, relative to an average slate"""
    best_unselected: float | None
    """highest score among the memories not selected; None if all were selected"""


class MemoryGate(nn.Module):
    """score(situation, memory) = ŝᵀ W m̂ + φ(message)ᵀ V ψ(memory) / GAIN.

    ŝ and m̂ have L2 norm 1. W is initialised to the identity and V to zero, so that an untrained gate is
    exactly cosine similarity. W generalises to any memory. V learns quickly that a memory helps or hurts with
    similar requests: it is the mean of a Gaussian process over (message, memory) with the product of two
    kernels; φ are the features of the selector's landmarks, ψ those of the gate's own. The score of a slate
    is the sum of its memories' scores. After strategy a, the log-odds of a satisfied user are
    b + U_aᵀφ + GAIN · (score − mean score). U and b are fitted jointly with V, so that memories get no credit
    for the effect of the strategy; the selector does not use them.

    Args:
        situation_dim: S.
        memory_dim: D of the memory embeddings; None means `situation_dim`.
        features: M, number of message features φ.
        landmarks: L, number of memories that V can distinguish.
        strategies: A.
    """

    kernel_weight: Tensor
    """(M, L) V, in log-odds"""
    strategy_weight: Tensor
    """(A, M + 1) U; the last column holds b, equal for all strategies"""
    mean_score: Tensor
    """(2,) mean ŝᵀWm̂ of the memories shown so far, and the number of slates in the mean"""

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
            raise ConfigError(f"MemoryGate expects positive dimensions, got {situation_dim=}, {memory_dim=}")
        self.situation_dim = situation_dim
        self.memory_dim = memory_dim
        self.weight = nn.Parameter(torch.eye(situation_dim, memory_dim))
        self.landmarks = Landmarks(memory_dim, landmarks, gamma=MEMORY_GAMMA, novelty=0.2)
        self.register_buffer("kernel_weight", torch.zeros(features, landmarks))
        self.register_buffer("strategy_weight", torch.zeros(strategies, features + 1))
        self.register_buffer("mean_score", torch.zeros(2))

    def reset_parameters(self, basis: Tensor | None = None) -> None:
        """Resets W to the identity, or to (S, D) `basis` if situations are projections of text embeddings."""
        with torch.no_grad():
            self.weight.copy_(torch.eye(self.situation_dim, self.memory_dim) if basis is None else basis)

    def score_memories(self, situation: Tensor, memories: Tensor) -> Tensor:
        """(N,) ŝᵀWm̂ of (N, D) memories for one (S,) situation; (B, N) for (B, S) and (B, N, D) or (N, D)."""
        return self._bilinear(situation, F.normalize(memories, dim=-1))

    def forward(self, situation: Tensor, memories: Tensor) -> Tensor:
        """Same as `score_memories`."""
        return self.score_memories(situation, memories)

    def select_top_k(self, situation: Tensor, memories: Tensor, k: int = 3) -> tuple[Tensor, Tensor]:
        """(indices, scores) of the `k` best memories, best first; fewer if there are fewer than `k`."""
        scores = self.score_memories(situation, memories)
        top = torch.topk(scores, min(max(k, 0), scores.shape[-1]), dim=-1)
        return top.indices, top.values

    def log_odds(self, scores: Tensor, mask: Tensor) -> Tensor:
        """(B,) log-odds of a satisfied user that slates add, for (B, K) scores ŝᵀWm̂ and their 0/1 `mask`."""
        mean, slates = self.mean_score.tolist()
        gain = GAIN if slates else 0.0
        out: Tensor = gain * ((scores - mean) * mask).sum(-1)
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
        """Draws `k` of (N, D) memories for one (S,) situation from a Plackett–Luce model of the scores.

        Each slot is a softmax over the remaining memories, so that its propensity is exact. `phi` (M,) are
        the message features; without them the score is ŝᵀWm̂.
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
        remaining = np.exp((scores - scores.max()) / TEMPERATURE)
        for chosen in indices:
            propensities.append(max(float(remaining[chosen] / remaining.sum()), 1e-12) if explore else 1.0)
            remaining[chosen] = 0.0
        unselected = scores[order[k:]]
        bilinear_logit = float(self.log_odds(bilinear[indices], torch.ones(k)))
        return Slate(
            indices,
            [float(scores[i]) for i in indices],
            propensities,
            bilinear_logit + float(kernel_part[indices].sum()),
            float(unselected.max()) if len(unselected) else None,
        )

    def kernel_logit(self, phi: FloatArray, psi: FloatArray) -> FloatArray:
        """(B,) kernel part of the log-odds, for (B, M) message features and (B, L) summed memory features."""
        out: FloatArray = ((phi @ self.kernel_weight.numpy()) * psi).sum(1)
        return out

    def condition(
        self,
        *,
        phi: FloatArray,
        psi: FloatArray,
        strategy: npt.NDArray[np.int64],
        bilinear: FloatArray,
        label: FloatArray,
        weight: FloatArray,
        dual: FloatArray,
    ) -> FloatArray:
        """Fits V, U and b to a block of replies: one Newton step in the dual.

        The posterior mode is a sum over all replies, V = PRIOR_VARIANCE · Σ αᵢ φᵢψᵢᵀ and U and b likewise,
        with αᵢ = wᵢ(yᵢ − σ(logitᵢ)) (Rasmussen & Williams 2006, eq. 3.17). Each call updates the α of one
        block and keeps the others (Yu, Huang & Lin 2011, "Dual coordinate descent methods for logistic
        regression", in blocks).

        Args:
            phi: (B, M) message features.
            psi: (B, L) memory features, summed over each slate.
            strategy: (B,) index of the strategy used.
            bilinear: (B,) results of `log_odds`.
            label: (B,) in [0, 1], 1 for a satisfied user.
            weight: (B,) sample weights in [0, 1].
            dual: (B,) current α.

        Returns:
            (B,) new α.
        """
        p = self._satisfied(phi, psi, strategy, bilinear)
        spread = np.maximum(weight * p * (1.0 - p), 1e-3)
        chosen = np.eye(len(self.strategy_weight), dtype=np.float32)[strategy]  # (B, A)
        kernel: FloatArray = PRIOR_VARIANCE * (psi @ psi.T) + STRATEGY_VARIANCE * (chosen @ chosen.T)
        kernel *= phi @ phi.T
        kernel += BIAS_VARIANCE
        kernel[np.diag_indices_from(kernel)] += 1.0 / spread
        change = np.linalg.solve(kernel, (weight * (label - p) - dual) / spread).astype(np.float32)
        with torch.no_grad():
            self.kernel_weight += torch.from_numpy(phi.T @ ((PRIOR_VARIANCE * change)[:, None] * psi))
            strategies = chosen.T @ ((STRATEGY_VARIANCE * change)[:, None] * phi)
            self.strategy_weight[:, :-1] += torch.from_numpy(strategies)
            self.strategy_weight[:, -1] += BIAS_VARIANCE * float(change.sum())
        return dual + change

    def dual_of(
        self,
        *,
        phi: FloatArray,
        psi: FloatArray,
        strategy: npt.NDArray[np.int64],
        bilinear: FloatArray,
        label: FloatArray,
        weight: FloatArray,
    ) -> FloatArray:
        """(B,) α of replies that this gate was fitted to: exact at the posterior mode (see `condition`).

        With these, `condition` changes nothing that the replies themselves do not.
        """
        out: FloatArray = weight * (label - self._satisfied(phi, psi, strategy, bilinear))
        return out

    def _satisfied(
        self, phi: FloatArray, psi: FloatArray, strategy: npt.NDArray[np.int64], bilinear: FloatArray
    ) -> FloatArray:
        """(B,) probability of a satisfied user."""
        share = self.strategy_weight.numpy()[strategy]
        logit = bilinear + self.kernel_logit(phi, psi) + (share[:, :-1] * phi).sum(1) + share[:, -1]
        out: FloatArray = 1.0 / (1.0 + np.exp(-logit))
        return out

    @torch.no_grad()
    def copy_strategies(self, old: MemoryGate) -> None:
        """Takes over another gate's weights, whose strategies are the first of this one's.

        The others have no effect yet, and the common bias.
        """
        known = len(old.strategy_weight)
        for name, value in old.state_dict().items():
            own = self.state_dict()[name]
            own[:known].copy_(value) if name == "strategy_weight" else own.copy_(value)
        self.strategy_weight[known:, -1] = old.strategy_weight[0, -1]

    def contrastive_loss(
        self, situation: Tensor, positive: Tensor, negative: Tensor, margin: float = 0.5
    ) -> Tensor:
        """Mean of max(0, margin − score(positive) + score(negative)) over all pairs (Hadsell et al. 2006).

        Args:
            situation: (S,).
            positive: (P, D) memories that helped.
            negative: (Q, D) memories that did not.

        Returns:
            A scalar; 0 if either set is empty.
        """
        positive = positive.reshape(-1, self.memory_dim)
        negative = negative.reshape(-1, self.memory_dim)
        if not len(positive) or not len(negative):
            return situation.sum() * 0.0
        scores = self.score_memories(situation, torch.cat([positive, negative]))
        good, bad = scores[: len(positive)], scores[len(positive) :]
        return F.relu(margin - good[:, None] + bad[None, :]).mean()

    def _bilinear(self, situation: Tensor, memories: Tensor) -> Tensor:
        """`score_memories` for memories of norm 1."""
        if situation.ndim not in (1, 2) or situation.shape[-1] != self.situation_dim:
            raise DimensionError("situation", tuple(situation.shape), f"(…, {self.situation_dim})")
        if memories.ndim not in (2, 3) or memories.shape[-1] != self.memory_dim:
            raise DimensionError("memories", tuple(memories.shape), f"(N, {self.memory_dim})")
        query = F.normalize(situation, dim=-1) @ self.weight
        return (memories @ query.unsqueeze(-1)).squeeze(-1) if memories.ndim == 3 else query @ memories.T
