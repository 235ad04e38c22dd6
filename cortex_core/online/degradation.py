"""Degradation detection: keeps the last good weights, and says when to compare the current ones with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

KEEP_EVERY = 50
"""Minimum number of steps between two copies of good weights."""

Weights = dict[str, Tensor]


def copy_weights(modules: Mapping[str, nn.Module]) -> Weights:
    """A copy of every parameter and buffer, keyed by "module.name"."""
    return {
        f"{name}.{key}": value.detach().clone()
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }


def restore_weights(modules: Mapping[str, nn.Module], weights: Weights) -> None:
    """The inverse of `copy_weights`."""
    for name, module in modules.items():
        prefix = f"{name}."
        module.load_state_dict({k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)})


@dataclass(slots=True)
class GoodWeights:
    """The last weights that were found good, and their averages."""

    weights: Weights
    ema_loss: float | None = None
    ema_reward: float | None = None
    updates: int = 0

    def should_replace(self, loss: float, reward: float, updates: int) -> bool:
        """Whether weights with these averages should replace these; at most every KEEP_EVERY steps."""
        if self.ema_loss is None or self.ema_reward is None:
            return True
        return (
            updates >= self.updates + KEEP_EVERY
            and loss <= self.ema_loss
            and reward >= self.ema_reward - 0.05
        )

    def suspects_degradation(
        self, loss: float, reward: float, loss_margin: float, reward_margin: float
    ) -> bool:
        """Whether these averages are worse by more than a margin, so that both weights should be compared."""
        if self.ema_loss is None or self.ema_reward is None:
            return False
        return loss > self.ema_loss + loss_margin or reward < self.ema_reward - reward_margin
