"""StrategySelector: selects a strategy and gives the exact probability of each choice.

A reward model with uncertainty: one Gaussian process over messages for each strategy, whose prior mean is a
parametric head on the situation. The head and, through it, the Situation Encoder learn by gradient descent;
the posterior is exact and is updated with every reply.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cortex_core.arrays import FloatArray, unit
from cortex_core.errors import ConfigError, DimensionError
from cortex_core.landmarks import Landmarks
from cortex_core.strategy_registry import StrategyProfile, StrategyRegistry

__all__ = ["Belief", "Selection", "StrategyProfile", "StrategyRegistry", "StrategySelector"]

NOISE = 0.4
"""Variance of a reply around the posterior mean, in units of the prior variance."""
FLOOR = 0.04
"""Lower bound of the posterior variance along the directions of new replies. The estimate there is a moving
average over about NOISE / FLOOR = 10 neighbouring replies, so that it follows changed preferences; directions
without new replies forget nothing (directional forgetting, Kulhavý & Kárný 1984)."""
OPTIMISM = 0.2
"""Standard deviations added to the mean when choosing (GP-UCB, Srinivas et al. 2010, eq. 6)."""
TEMPERATURE = 0.01
"""Temperature of the softmax over the optimistic estimates: near ties are random, with an exact propensity,
and an estimate that leads by 0.05 is chosen almost always."""


@dataclass(frozen=True, slots=True)
class Belief:
    """The posterior of every strategy in one situation; all arrays are (A,)."""

    mean: FloatArray
    """P(satisfied user), in (0, 1)"""
    deviation: FloatArray
    """posterior standard deviation; 1 without data"""
    probabilities: FloatArray
    """probability of choosing each strategy when exploring; sums to 1; 0 for those that are not allowed"""


@dataclass(frozen=True, slots=True)
class Selection:
    """A chosen strategy and its exact propensity."""

    strategy: StrategyProfile
    index: int
    propensity: float
    probabilities: FloatArray
    """(A,)"""
    belief: Belief

    @property
    def strategy_id(self) -> str:
        return self.strategy.id


class StrategySelector(nn.Module):
    """One Gaussian process per strategy, with a learned prior mean; untrained, the choice is uniform.

    mean_a = prior_a(situation) + μ_aᵀφ(message) and variance_a = φᵀΣ_aφ + 1 − φᵀφ, where φ are the features
    of `landmarks` (Quiñonero-Candela & Rasmussen 2005, the FITC predictive variance), and
    prior_a = Aπ_a / (1 + Aπ_a) for π = softmax(head(situation)), which is 1/2 for the untrained head.

    Args:
        situation_dim: S.
        num_strategies: A.
        hidden_dim: width of the head's hidden layer.
        text_dim: D of the message embeddings; None means `situation_dim`.
        landmarks: M; the posterior has A·M² numbers.
    """

    mean: Tensor
    """(A, M) μ"""
    covariance: Tensor
    """(A, M(M + 1)/2) lower triangles of Σ in float16, as stored and sent; computations use float32"""

    def __init__(
        self,
        situation_dim: int = 384,
        num_strategies: int = 7,
        hidden_dim: int = 128,
        *,
        text_dim: int | None = None,
        landmarks: int = 384,
    ) -> None:
        super().__init__()
        if min(situation_dim, num_strategies, hidden_dim) < 1:
            raise ConfigError(
                "StrategySelector expects positive sizes, "
                f"got {situation_dim=}, {num_strategies=}, {hidden_dim=}"
            )
        self.situation_dim = situation_dim
        self.num_strategies = num_strategies
        self.text_dim = situation_dim if text_dim is None else text_dim
        self.hidden = nn.Linear(situation_dim, hidden_dim)
        self.out = nn.Linear(hidden_dim, num_strategies)
        self.landmarks = Landmarks(self.text_dim, landmarks)
        self.register_buffer("mean", torch.zeros(num_strategies, landmarks))
        self._triangle = np.tril_indices(landmarks)
        identity = torch.from_numpy(np.eye(landmarks, dtype=np.float16)[self._triangle])
        self.register_buffer("covariance", identity.repeat(num_strategies, 1))
        self._seen: tuple[int, int] | None = None
        self._sigma: FloatArray = np.zeros((0,), np.float32)
        self._changed: set[int] = set()
        self._frozen = False
        self.register_state_dict_pre_hook(_commit)  # type: ignore[no-untyped-call]  # unannotated in torch
        self.reset_parameters()

    def freeze(self) -> None:
        """Computes everything that decisions read and makes it read-only, so that threads may share it."""
        self.commit()
        self.landmarks.freeze()
        self._covariance().flags.writeable = False
        self._frozen = True

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Resets the head to untrained weights; the same generator state gives the same weights."""
        bound = self.situation_dim**-0.5
        nn.init.uniform_(self.hidden.weight, -bound, bound, generator=generator)
        nn.init.zeros_(self.hidden.bias)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, situation: Tensor) -> Tensor:
        """(…, A) logits of the head for (…, S) situations."""
        if situation.shape[-1] != self.situation_dim:
            raise DimensionError("situation", tuple(situation.shape), f"(…, {self.situation_dim})")
        out: Tensor = self.out(F.gelu(self.hidden(situation)))
        return out

    def prior(self, situation: Tensor) -> Tensor:
        """(…, A) prior mean P(satisfied user), without the replies to similar messages; untrained: 1/2."""
        return torch.sigmoid(F.log_softmax(self(situation), dim=-1) + math.log(self.num_strategies))

    def kernel_input(self, message: FloatArray | None, situation: FloatArray | None) -> FloatArray | None:
        """The input of the kernel: the message if it has D numbers, else the situation, else None.

        A selector that was constructed without `text_dim` has D = S and compares situations.
        """
        return next((v for v in (message, situation) if v is not None and len(v) == self.text_dim), None)

    def features(self, message: FloatArray | None, rows: int = 1) -> FloatArray:
        """(B, M) features of (B, D) messages; for None, `rows` rows of zeros, which mean "no data"."""
        if message is None:
            return np.zeros((rows, self.landmarks.size), np.float32)
        return self.landmarks.features(unit(message))

    def belief(
        self,
        situation: Tensor,
        message: FloatArray | None = None,
        *,
        phi: FloatArray | None = None,
        allowed: npt.NDArray[np.bool_] | None = None,
    ) -> Belief:
        """Posterior for one (S,) situation and its (D,) message; None means the situation, if S = D.

        Args:
            phi: (M,) message features, if the caller has computed them.
            allowed: (A,) the strategies that may be chosen, at least one; None means all.
        """
        with torch.no_grad():
            prior = self.prior(situation).numpy()
        if phi is None:
            message = self.kernel_input(message, situation.detach().numpy())
            phi = self.features(None if message is None else message[None])[0]
        mean = np.clip(prior + self.mean.numpy() @ phi, 0.01, 0.99)
        size = len(phi)
        spread = (self._covariance().reshape(-1, size) @ phi).reshape(-1, size)
        variance = spread @ phi + max(1.0 - float(phi @ phi), 0.0)
        deviation = np.sqrt(np.clip(variance, 1e-6, None))
        index = (mean + OPTIMISM * deviation).astype(np.float64) / TEMPERATURE
        if allowed is not None:
            index[~allowed] = -np.inf
        weights = np.exp(index - index.max())
        # A lower bound on the propensity bounds the importance weights.
        weights = np.maximum(weights / weights.sum(), 1e-5)
        if allowed is not None:
            weights[~allowed] = 0.0
        return Belief(mean, deviation, (weights / weights.sum()).astype(np.float32))

    def probabilities(self, situation: Tensor, message: FloatArray | None = None) -> Tensor:
        """(A,) exact probability of choosing each strategy when exploring."""
        return torch.from_numpy(self.belief(situation, message).probabilities)

    def select(
        self,
        situation: Tensor,
        registry: StrategyRegistry,
        explore: bool = True,
        *,
        message: FloatArray | None = None,
        phi: FloatArray | None = None,
        allowed: Collection[str] | None = None,
        rng: np.random.Generator | None = None,
    ) -> Selection:
        """Draws a strategy for one (S,) situation; without `explore`, takes the one with the highest mean.

        Args:
            allowed: ids of the strategies to choose among, unknown ones ignored; None means all.

        Raises:
            ConfigError: the registry is of another model, or none of `allowed` is known.
        """
        if len(registry) != self.num_strategies:
            raise ConfigError(
                f"the registry has {len(registry)} strategies, this selector {self.num_strategies}"
            )
        mask = None if allowed is None else np.array([id_ in allowed for id_ in registry.ids])
        if mask is not None and not mask.any():
            raise ConfigError(f"none of {sorted(allowed or ())} is a strategy of this model: {registry}")
        belief = self.belief(situation, message, phi=phi, allowed=mask)
        p = belief.probabilities.astype(np.float64)
        if not explore:
            index = int(np.where(p > 0.0, belief.mean, -np.inf).argmax())
            greedy = np.eye(len(p), dtype=np.float32)[index]
            return Selection(registry[index], index, 1.0, greedy, belief)
        index = int((rng or np.random.default_rng()).choice(len(p), p=p / p.sum()))
        return Selection(registry[index], index, float(p[index] / p.sum()), belief.probabilities, belief)

    @torch.no_grad()
    def copy_strategies(self, old: StrategySelector) -> None:
        """Takes over what another selector has learned of its strategies, which are the first of this one.

        The others get the mean of their rows in the head, which disturbs the prior of the old ones least, and
        no posterior.
        """
        known = old.num_strategies
        for name, value in old.state_dict().items():
            own = self.state_dict()[name]
            own[:known].copy_(value) if own.ndim and own.shape != value.shape else own.copy_(value)
        self.out.weight[known:] = old.out.weight.mean(0)
        self.out.bias[known:] = old.out.bias.mean()

    def condition(self, phi: FloatArray, strategy: int, residual: float, weight: float = 1.0) -> None:
        """Conditions the posterior on one reply: `residual` is label − prediction, `weight` is in (0, 1].

        A Kalman update with the measurement variance NOISE / weight, after the forgetting that FLOOR
        requires. `commit` or the next `state_dict` writes the new covariance to the weights.
        """
        sigma = self._covariance()[strategy]
        if not sigma.flags.writeable:
            raise ValueError("the selector is frozen: read-only, cannot be trained")
        self._changed.add(strategy)
        gain = sigma @ phi
        variance = float(phi @ gain)
        grown = min(FLOOR, float(phi @ phi))
        ratio = grown / variance if 1e-9 < variance < grown else 1.0
        total = ratio * variance + NOISE / max(weight, 1e-3)
        with torch.no_grad():
            self.mean[strategy] += torch.from_numpy(gain * (ratio * residual / total))
        # Forgetting and conditioning change the covariance along the same direction: one rank-one update.
        change = (ratio - 1.0) / max(variance, 1e-9) - ratio**2 / total
        sigma += np.outer(gain, gain * np.float32(change))

    def amend(self, phi: FloatArray, strategy: int, change: float, weight: float = 1.0) -> None:
        """Changes the label of an earlier reply by `change`: only the mean changes, not the covariance."""
        gain = self._covariance()[strategy] @ phi
        with torch.no_grad():
            self.mean[strategy] += torch.from_numpy(gain * (change * weight / NOISE))

    def commit(self) -> None:
        """Writes the updated covariances to the `covariance` buffer."""
        if not self._changed:
            return
        sigma = self._covariance()
        with torch.no_grad():
            for strategy in self._changed:
                packed = sigma[strategy][self._triangle].astype(np.float16)
                self.covariance[strategy] = torch.from_numpy(packed)
        self._changed.clear()
        self._seen = (id(self.covariance), self.covariance._version)

    def _covariance(self) -> FloatArray:
        """(A, M, M) float32; reloaded if the buffer was changed from outside."""
        version = (id(self.covariance), self.covariance._version)
        if not self._frozen and version != self._seen:
            size = self.landmarks.size
            lower = np.zeros((self.num_strategies, size, size), np.float32)
            lower[:, self._triangle[0], self._triangle[1]] = self.covariance.float().numpy()
            diagonal = np.einsum("aii->ai", lower).copy()
            self._sigma = lower + lower.transpose(0, 2, 1)
            np.einsum("aii->ai", self._sigma)[:] = diagonal
            self._changed.clear()
            self._seen = version
        return self._sigma


def _commit(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Packing a triangle costs more than updating it, so it waits until the weights are read."""
    del prefix, keep_vars
    assert isinstance(module, StrategySelector)
    module.commit()
