"""Results of an online training step."""

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
    """Metrics of one training step."""

    update: int
    """number of this step since initialisation"""
    loss: float
    strategy_loss: float
    confidence_loss: float
    ema_loss: float
    grad_norm: float
    """before clipping"""
    fresh: int
    """experiences trained on for the first time"""
    replayed: int
    """experiences sampled from replay"""
    skipped: bool = False
    """the loss or a gradient was not finite, and the weights are unchanged"""
    rolled_back: bool = False
    """the last good weights were restored after the step"""


@dataclass(frozen=True, slots=True)
class InteractionOutcome:
    """The result of `OnlineTrainer.record_interaction`."""

    entry: ReplayEntry
    reward: float
    signals: Sequence[FeedbackSignal]
    update: OnlineUpdate | None
    """the training step that this interaction triggered, if any"""


@dataclass(frozen=True, slots=True)
class Losses:
    """Losses of one batch, and intermediate results."""

    total: Tensor
    reward: Tensor
    """loss of the reward model of strategy and memories"""
    calibration: Tensor
    prior: Tensor
    """(B,) prior means of the chosen strategies"""
    scores: Tensor
    """(B,) mean bilinear score of the memories shown"""
    bilinear: Tensor
    """(B,) log-odds that the memories add"""
