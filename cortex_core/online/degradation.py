"""Knowing good weights, and going back to them when learning has made things worse.

It compares and remembers; what a loss is, the trainer says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

KEEP_EVERY = 50
"""Steps between two copies of good weights."""

Weights = dict[str, Tensor]


def weights_of(modules: Mapping[str, nn.Module]) -> Weights:
    """A copy of every parameter and buffer, as "module.name"."""
    return {
        f"{name}.{key}": value.detach().clone()
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }


def put_back(modules: Mapping[str, nn.Module], weights: Weights) -> None:
    """The inverse of `weights_of`."""
    for name, module in modules.items():
        prefix = f"{name}."
        module.load_state_dict({k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)})


@dataclass(slots=True)
class GoodWeights:
    """The last weights that were found good, and what they were good at."""

    weights: Weights
    ema_loss: float | None = None
    ema_reward: float | None = None
    updates: int = 0

    def is_better(self, loss: float, reward: float, updates: int) -> bool:
        """Whether weights with these averages should be kept instead; copies are not made at every step."""
        if self.ema_loss is None or self.ema_reward is None:
            return True
        return (
            updates >= self.updates + KEEP_EVERY
            and loss <= self.ema_loss
            and reward >= self.ema_reward - 0.05
        )

    def suspects(self, loss: float, reward: float, loss_margin: float, reward_margin: float) -> bool:
        """Whether these averages are so much worse that the two should be compared on what comes in now."""
        if self.ema_loss is None or self.ema_reward is None:
            return False
        return loss > self.ema_loss + loss_margin or reward < self.ema_reward - reward_margin
