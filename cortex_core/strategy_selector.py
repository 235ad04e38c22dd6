"""StrategySelector: which strategy to answer with, and with what probability each could have been chosen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cortex_core.errors import ConfigError, DimensionError
from cortex_core.strategy_registry import StrategyProfile, StrategyRegistry

__all__ = ["Selection", "StrategyProfile", "StrategyRegistry", "StrategySelector"]


@dataclass(frozen=True, slots=True)
class Selection:
    """One choice: the strategy, its exact propensity and every strategy's."""

    strategy: StrategyProfile
    index: int
    propensity: float
    probabilities: Tensor
    """(A,)"""

    @property
    def strategy_id(self) -> str:
        return self.strategy.id


class StrategySelector(nn.Module):
    """Scores strategies in a situation; uniform at birth.

    Args:
        situation_dim: S.
        num_strategies: A.
        hidden_dim: width of the hidden layer.
    """

    def __init__(self, situation_dim: int = 384, num_strategies: int = 7, hidden_dim: int = 128) -> None:
        super().__init__()
        if min(situation_dim, num_strategies, hidden_dim) < 1:
            raise ConfigError(
                f"StrategySelector wants positive sizes, got situation_dim={situation_dim}, "
                f"num_strategies={num_strategies}, hidden_dim={hidden_dim}"
            )
        self.situation_dim = situation_dim
        self.num_strategies = num_strategies
        self.hidden = nn.Linear(situation_dim, hidden_dim)
        self.out = nn.Linear(hidden_dim, num_strategies)
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Back to birth; the same generator state gives the same weights."""
        bound = self.situation_dim**-0.5
        nn.init.uniform_(self.hidden.weight, -bound, bound, generator=generator)
        nn.init.zeros_(self.hidden.bias)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, situation: Tensor) -> Tensor:
        """(…, A) logits for (…, S)."""
        if situation.shape[-1] != self.situation_dim:
            raise DimensionError("situation", tuple(situation.shape), f"(…, {self.situation_dim})")
        out: Tensor = self.out(F.gelu(self.hidden(situation)))
        return out

    def probabilities(self, situation: Tensor) -> Tensor:
        """(…, A) with which each strategy is chosen when exploring."""
        return torch.softmax(self(situation), dim=-1)

    def select(
        self,
        situation: Tensor,
        registry: StrategyRegistry,
        explore: bool = True,
        *,
        rng: np.random.Generator | None = None,
    ) -> Selection:
        """Draws one strategy for one (S,) situation; the likeliest one when not exploring."""
        if len(registry) != self.num_strategies:
            raise ConfigError(
                f"the registry has {len(registry)} strategies, this selector {self.num_strategies}"
            )
        with torch.no_grad():
            probabilities = self.probabilities(situation)
        p = probabilities.double().numpy()
        index = (
            int((rng or np.random.default_rng()).choice(len(p), p=p / p.sum()))
            if explore
            else int(p.argmax())
        )
        return Selection(registry[index], index, float(p[index]) if explore else 1.0, probabilities)
