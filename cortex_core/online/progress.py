"""Counters and moving averages of a trainer, as stored in its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(slots=True)
class Progress:
    """Training progress since initialisation; the averages are None before the first step."""

    updates: int = 0
    """training steps"""
    interactions: int = 0
    """distinct experiences learned from"""
    ema_loss: float | None = None
    """exponential moving average of the training loss"""
    ema_reward: float | None = None
    """exponential moving average of the mean reward of a step's fresh experiences"""
    rollbacks: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Progress:
        """The inverse of `to_dict`."""
        return cls(
            updates=int(data["updates"]),
            interactions=int(data["interactions"]),
            ema_loss=data["ema_loss"],
            ema_reward=data.get("ema_reward"),
            rollbacks=int(data["rollbacks"]),
        )


def moving_average(old: float | None, new: float, decay: float) -> float:
    """Exponential moving average: decay · old + (1 − decay) · new; the first value starts it."""
    return new if old is None else decay * old + (1.0 - decay) * new
