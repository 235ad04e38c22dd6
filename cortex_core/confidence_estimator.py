"""ConfidenceEstimator: predicts the probability of a satisfied user, and the action that follows from it."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cortex_core.arrays import FloatArray
from cortex_core.errors import ConfigError, DimensionError
from cortex_core.requirements import CONTEXT_DIM

Action = Literal["proceed", "hedge", "escalate"]

PROCEED_AT = 0.8
HEDGE_AT = 0.4


def action_for(confidence: float) -> Action:
    """ "proceed" from 0.8, "hedge" from 0.4, else "escalate"."""
    return "proceed" if confidence >= PROCEED_AT else "hedge" if confidence >= HEDGE_AT else "escalate"


@dataclass(frozen=True, slots=True)
class ContextSummary:
    """Summary of a decision before its reply: the second input of the estimator."""

    satisfaction_logit: float = 0.0
    """log-odds of a satisfied user that the selector predicts for the chosen strategy"""
    strategy_margin: float = 0.0
    """predicted probability for the chosen strategy minus that for the best other one"""
    strategy_uncertainty: float = 1.0
    """posterior standard deviation of the chosen strategy; 1 without data"""
    memory_logit: float = 0.0
    """log-odds that the retrieved memories add, relative to an average slate"""
    top_memory_score: float = 0.0
    memory_margin: float = 0.0
    """lowest retrieved score minus the highest score not retrieved"""
    memory_count: float = 0.0
    """k / (k + 3) for k retrieved memories"""

    def to_tensor(self) -> Tensor:
        """(7,) float32 in the order of the fields."""
        return torch.tensor(astuple(self), dtype=torch.float32)


IDENTITY_CALIBRATION = np.array(
    [name in {"satisfaction_logit", "memory_logit"} for name in (*ContextSummary.__slots__, "bias")],
    np.float64,
)
"""(8,) weights of the 7 fields and the bias with which the confidence equals the predicted probability."""


class ConfidenceEstimator(nn.Module):
    """confidence = σ(linear(context) + MLP([situation, context])); exactly 0.5 untrained.

    The linear part on the predicted log-odds is Platt scaling; the MLP corrects it for the situation.

    Replies are noisy labels: P(positive reply) = ε + (1 − 2ε)·confidence, with a learned ε (Natarajan et al.
    2013, "Learning with Noisy Labels", with one symmetric rate). So `confidence` is about the user's
    satisfaction, not about the reply.
    """

    def __init__(self, situation_dim: int = 384, hidden_dim: int = 64, dropout: float = 0.1) -> None:
        super().__init__()
        if min(situation_dim, hidden_dim) < 1 or not 0.0 <= dropout < 1.0:
            raise ConfigError(
                "ConfidenceEstimator expects positive dimensions and dropout in [0, 1); "
                f"got {situation_dim=}, {hidden_dim=}, {dropout=}"
            )
        self.situation_dim = situation_dim
        self.linear = nn.Linear(CONTEXT_DIM, 1)
        self.hidden = nn.Linear(situation_dim + CONTEXT_DIM, hidden_dim)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(hidden_dim, 1, bias=False)
        self.noise = nn.Parameter(torch.zeros(()))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Resets to the untrained weights; the same generator state gives the same weights."""
        bound = self.hidden.in_features**-0.5
        nn.init.uniform_(self.hidden.weight, -bound, bound, generator=generator)
        for parameter in (
            self.hidden.bias,
            self.out.weight,
            self.linear.weight,
            self.linear.bias,
            self.noise,
        ):
            nn.init.zeros_(parameter)

    def logits(self, situation: Tensor, context: Tensor) -> Tensor:
        """(…,) log-odds for (…, S) situations and (…, 7) contexts."""
        if situation.shape[-1] != self.situation_dim:
            raise DimensionError("situation", tuple(situation.shape), f"(…, {self.situation_dim})")
        if context.shape[-1] != CONTEXT_DIM:
            raise DimensionError("context", tuple(context.shape), f"(…, {CONTEXT_DIM})")
        hidden = self.dropout(F.gelu(self.hidden(torch.cat([situation, context], dim=-1))))
        out: Tensor = (self.linear(context) + self.out(hidden)).squeeze(-1)
        return out

    @torch.no_grad()
    def fit(self, context: FloatArray, label: FloatArray, weight: FloatArray, *, steps: int = 2) -> None:
        """Newton steps on the linear part: Platt scaling on decisions with replies (Platt 1999).

        The contexts were logged at decision time, so that the fit uses predictions made before the replies. A
        ridge penalty of 1 pulls the weights towards `IDENTITY_CALIBRATION`.

        Args:
            context: (n, 7).
            label: (n,) 1 for a positive reply, else 0.
            weight: (n,) sample weights.
        """
        x = np.concatenate([context, np.ones((len(context), 1), np.float32)], axis=1).astype(np.float64)
        theta = np.append(self.linear.weight.numpy()[0], self.linear.bias.numpy()).astype(np.float64)
        epsilon = float(self.reply_noise())
        for _ in range(steps):
            p = 1.0 / (1.0 + np.exp(-np.clip(x @ theta, -30.0, 30.0)))
            reply = epsilon + (1.0 - 2.0 * epsilon) * p
            slope = (1.0 - 2.0 * epsilon) * p * (1.0 - p)
            # Fisher scoring for a Bernoulli label whose probability is an affine function of σ(xᵀθ).
            score = weight * (label - reply) * slope / (reply * (1.0 - reply))
            information = weight * slope**2 / (reply * (1.0 - reply))
            hessian = (x * information[:, None]).T @ x + np.eye(x.shape[1])
            theta += np.clip(
                np.linalg.solve(hessian, x.T @ score - (theta - IDENTITY_CALIBRATION)), -1.0, 1.0
            )
        self.linear.weight.copy_(torch.from_numpy(theta[None, :-1]).float())
        self.linear.bias.copy_(torch.from_numpy(theta[-1:]).float())

    def reply_noise(self) -> Tensor:
        """() ε in (0, 0.2): the fraction of replies with the wrong sign."""
        return 0.2 * torch.sigmoid(self.noise)

    def reply_probability(self, confidence: Tensor) -> Tensor:
        """(…,) P(positive reply) for (…,) confidences."""
        epsilon = self.reply_noise()
        return epsilon + (1.0 - 2.0 * epsilon) * confidence

    def forward(self, situation: Tensor, context: Tensor | ContextSummary) -> Tensor:
        """(…,) probability of a satisfied user, for (…, S) situations and (…, 7) contexts."""
        if isinstance(context, ContextSummary):
            context = context.to_tensor()
        return torch.sigmoid(self.logits(situation, context))


class CalibrationLoss(nn.Module):
    """BCE + `ece_weight` · soft-binned ECE (Karandikar et al., NeurIPS 2021, eq. 4 and 5, ‖·‖₂).

    Each prediction has a soft membership of every bin: softmax(−(p − centre)² / temperature). The loss is the
    root of the membership-weighted mean squared gap between a bin's mean confidence and its mean outcome.

    Args:
        ece_weight: weight of the soft ECE; 0 gives plain BCE.
        bins: number of bins over [0, 1].
        temperature: width of the membership; in the limit 0 this is the hard-binned ECE.
    """

    centres: Tensor

    def __init__(self, ece_weight: float = 0.5, bins: int = 15, temperature: float = 0.01) -> None:
        super().__init__()
        if bins < 1 or temperature <= 0 or ece_weight < 0:
            raise ConfigError(
                "CalibrationLoss expects bins ≥ 1, temperature > 0, ece_weight ≥ 0; got "
                f"{bins}, {temperature}, {ece_weight}"
            )
        self.ece_weight = ece_weight
        self.temperature = temperature
        self.register_buffer("centres", (torch.arange(bins) + 0.5) / bins, persistent=False)

    def soft_ece(self, confidence: Tensor, outcome: Tensor, weight: Tensor | None = None) -> Tensor:
        """Scalar in [0, 1], for (B,) confidences and (B,) outcomes in [0, 1]."""
        weight = torch.ones_like(confidence) if weight is None else weight
        membership = torch.softmax(
            -((confidence[:, None] - self.centres[None, :]) ** 2) / self.temperature, dim=1
        )  # (B, bins)
        membership = membership * weight[:, None]
        size = membership.sum(0)
        mean_gap = (membership * (confidence - outcome)[:, None]).sum(0) / size.clamp_min(1e-8)
        share = size / weight.sum().clamp_min(1e-8)
        return torch.sqrt((share * mean_gap**2).sum() + 1e-12)

    def forward(self, confidence: Tensor, outcome: Tensor, weight: Tensor | None = None) -> Tensor:
        """Scalar loss; `weight` (B,) are sample weights."""
        weight = torch.ones_like(confidence) if weight is None else weight
        bce = F.binary_cross_entropy(confidence.clamp(1e-6, 1 - 1e-6), outcome, reduction="none")
        loss = (weight * bce).sum() / weight.sum().clamp_min(1e-8)
        return (
            loss + self.ece_weight * self.soft_ece(confidence, outcome, weight) if self.ece_weight else loss
        )
