"""What all partitions of one trainer share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import redis

if TYPE_CHECKING:
    from streams.settings import Settings
    from streams.trainer.metrics import Metrics
    from streams.weights.control import ControlFollower
    from streams.weights.follower import WeightsFollower


@dataclass(frozen=True, slots=True)
class TrainerContext:
    """The clients, metrics and learning thread of one trainer."""

    settings: Settings
    follower: WeightsFollower
    controls: ControlFollower
    cache: redis.Redis
    metrics: Metrics
    in_thread: Callable[..., Awaitable[Any]]
    """Runs a function in the single learning thread."""
