"""What an online training step reports: to metrics, to callers, and to the step itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from cortex_core.replay_buffer import ReplayEntry

if TYPE_CHECKING:
    from cortex_core.feedback_collector import FeedbackSignal


@dataclass(frozen=True, slots=True)
class OnlineUpdate:
    """One training step, as metrics want it."""

    update: int
    """number of this step since birth"""
    loss: float
    strategy_loss: float
    confidence_loss: float
    ema_loss: float
    grad_norm: float
    """before clipping"""
    fresh: int
    """experiences trained on for the first time"""
    replayed: int
    skipped: bool = False
    """the loss or a gradient was not finite, and the weights are as before"""
    rolled_back: bool = False
    """the step ended in going back to the last good weights"""


@dataclass(frozen=True, slots=True)
class InteractionOutcome:
    """What a user's reply was taken to mean."""

    entry: ReplayEntry
    reward: float
    signals: Sequence[FeedbackSignal]
    update: OnlineUpdate | None
    """the training step this interaction completed, if it did"""


@dataclass(frozen=True, slots=True)
class Losses:
    """Of one batch."""

    total: Tensor
    reward: Tensor
    """of strategy and memories, which explain one reward together"""
    calibration: Tensor
    prior: Tensor
    """(B,) the strategies' estimates before any neighbour's reply"""
    scores: Tensor
    """(B,) mean bilinear score of the memories shown"""
    bilinear: Tensor
    """(B,) log-odds that they add"""
