"""JointTrainer: trains all four components jointly on labelled samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cortex_core.arrays import FloatArray, as_float32, unit
from cortex_core.confidence_estimator import CalibrationLoss, ConfidenceEstimator
from cortex_core.errors import ConfigError, InputError
from cortex_core.memory_gate import MemoryGate, Slate
from cortex_core.metadata import metadata_features
from cortex_core.model import CortexModel, summarize
from cortex_core.online.optimizers import Adam
from cortex_core.situation_encoder import SituationEncoder
from cortex_core.strategy_registry import StrategyRegistry
from cortex_core.strategy_selector import Belief, StrategySelector


@dataclass(slots=True)
class TrainingSample:
    """A labelled example. Embeddings may be tensors, numpy arrays or lists."""

    message_emb: Any
    """(D,)"""
    history_emb: Any
    """(D,)"""
    metadata: Mapping[str, Any] | FloatArray
    """the argument of `metadata_features`, or its (F,) result"""
    memory_embs: Any
    """(N, D) candidates; N may be 0"""
    relevant_indices: set[int]
    """rows of the relevant memories in `memory_embs`"""
    strategy_id: str
    outcome: float
    """[0, 1]: outcome with this strategy; 1 is good, 0 is bad"""


@dataclass(slots=True)
class JointMetrics:
    """Mean losses per epoch."""

    total: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    strategy: list[float] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)

    @property
    def epochs(self) -> int:
        return len(self.total)

    def summary(self) -> str:
        """The losses of the first and the last epoch, one line per loss."""
        lines = [f"Joint Training: {self.epochs} epochs"]
        for name, values in (
            ("Total loss:", self.total),
            ("Memory loss:", self.memory),
            ("Strategy loss:", self.strategy),
            ("Confidence loss:", self.confidence),
        ):
            if values:
                lines.append(f"  {name:<16} {values[0]:.2f} → {values[-1]:.2f}")
        return "\n".join(lines)


@dataclass(slots=True)
class _Data:
    """Samples as tensors; N is the largest number of candidates."""

    message: Tensor
    history: Tensor
    metadata: Tensor
    memories: Tensor
    relevant: Tensor
    """(B, N) 1 for a relevant memory, else 0"""
    mask: Tensor
    """(B, N) 1 for a candidate, 0 for padding"""
    strategy: Tensor
    outcome: Tensor

    def rows(self, index: Tensor) -> _Data:
        return _Data(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


class JointTrainer:
    """Minimises L = w₁·L_memory + w₂·L_strategy + w₃·L_confidence through the shared Situation Encoder.

    L_memory is contrastive with a margin. L_strategy is the cross-entropy of the strategy for a good outcome,
    and −log(1 − p) for a bad one. L_confidence is BCE + soft ECE of the outcome. The optimizer is Adam with a
    cosine schedule and gradient clipping.

    Args:
        lr: initial learning rate.
        batch_size: samples per step.
        memory_weight: w₁.
        strategy_weight: w₂.
        confidence_weight: w₃.
        max_norm: maximum L2 norm of the gradients.
        margin: margin of the contrastive loss; untrained scores are cosines.
        seed: determines the order of the samples and dropout.
    """

    def __init__(
        self,
        encoder: SituationEncoder,
        gate: MemoryGate,
        selector: StrategySelector,
        estimator: ConfidenceEstimator,
        registry: StrategyRegistry,
        *,
        lr: float = 3e-3,
        batch_size: int = 16,
        memory_weight: float = 1.0,
        strategy_weight: float = 1.0,
        confidence_weight: float = 0.5,
        max_norm: float = 1.0,
        margin: float = 0.5,
        seed: int = 0,
    ) -> None:
        if lr <= 0 or batch_size < 1 or max_norm <= 0:
            raise ConfigError(
                "JointTrainer expects positive lr, batch_size and max_norm; "
                f"got {lr}, {batch_size}, {max_norm}"
            )
        self.encoder = encoder
        self.gate = gate
        self.selector = selector
        self.estimator = estimator
        self.registry = registry
        self.lr = lr
        self.batch_size = batch_size
        self.weights = (memory_weight, strategy_weight, confidence_weight)
        self.max_norm = max_norm
        self.margin = margin
        self.seed = seed
        self.calibration = CalibrationLoss()

    @classmethod
    def for_model(cls, model: CortexModel, **options: Any) -> JointTrainer:
        """A trainer that trains the components of a model in place."""
        return cls(model.encoder, model.gate, model.selector, model.estimator, model.registry, **options)

    def train(self, samples: Sequence[TrainingSample], epochs: int = 100) -> JointMetrics:
        """Trains in place; returns the losses.

        Raises:
            InputError: no samples, or an invalid one; nothing is trained.
        """
        if not samples or epochs < 1:
            raise InputError(
                f"joint training expects samples and epochs ≥ 1, got {len(samples)} and {epochs}"
            )
        data = self._collate(samples)
        modules = (self.encoder, self.gate, self.selector, self.estimator)
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        optimizer = Adam(parameters, lr=self.lr)
        steps = -(-len(samples) // self.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * steps)
        order = np.random.default_rng(self.seed)
        metrics = JointMetrics()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            for module in modules:
                module.train()
            for _ in range(epochs):
                sums = np.zeros(4)
                permutation = torch.from_numpy(order.permutation(len(samples)))
                for rows in torch.split(permutation, self.batch_size):
                    total, parts = self.loss(data.rows(rows))
                    optimizer.zero_grad(set_to_none=True)
                    total.backward()
                    torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
                    optimizer.step()
                    schedule.step()
                    sums += len(rows) * np.array([float(total.detach()), *(float(p.detach()) for p in parts)])
                for values, value in zip(
                    (metrics.total, metrics.memory, metrics.strategy, metrics.confidence),
                    sums / len(samples),
                    strict=True,
                ):
                    values.append(float(value))
            for module in modules:
                module.eval()
        self._condition(data)
        return metrics

    @torch.no_grad()
    def _condition(self, data: _Data) -> None:
        """Conditions the selector's posterior on the labels.

        This lowers the variance around the means that the head has learned, so that the first noisy replies
        after deployment do not override what was learned from the labels.
        """
        situations = self.encoder(data.message, data.history, data.metadata)
        rows = (data.message.numpy(), situations.numpy(), self.selector.prior(situations).numpy())
        for message, situation, row, strategy, outcome in zip(
            *rows, data.strategy.tolist(), data.outcome.tolist(), strict=True
        ):
            point = self.selector.kernel_input(message, situation)
            if point is None:
                return
            point = unit(point)
            self.selector.landmarks.admit(point)
            phi = self.selector.landmarks.features(point[None])[0]
            labels = (
                {strategy: outcome}
                if outcome < 0.5
                else {a: outcome * (a == strategy) for a in range(len(row))}
            )
            for index, label in labels.items():
                predicted = float(row[index] + self.selector.mean[index].numpy() @ phi)
                self.selector.condition(phi, index, label - predicted)

    def loss(self, data: _Data) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """The weighted total and its three terms, from one forward pass."""
        situation = self.encoder(data.message, data.history, data.metadata)
        scores = self.gate.score_memories(situation, data.memories)  # (B, N)
        memory = self._contrastive(scores, data)
        logits = self.selector(situation)
        log_p = F.log_softmax(logits, dim=-1)
        chosen = log_p.gather(1, data.strategy[:, None]).squeeze(1)
        not_chosen = torch.log1p(-chosen.exp().clamp(max=1 - 1e-6))
        strategy = -(data.outcome * chosen + (1 - data.outcome) * not_chosen).mean()
        with torch.no_grad():
            context = self._contexts(situation, scores, data)
        confidence = self.calibration(self.estimator(situation, context), data.outcome)
        w = self.weights
        return w[0] * memory + w[1] * strategy + w[2] * confidence, (memory, strategy, confidence)

    def _contrastive(self, scores: Tensor, data: _Data) -> Tensor:
        """`MemoryGate.contrastive_loss` of each row, averaged over the rows with at least one pair."""
        positive = data.relevant * data.mask
        negative = (1 - data.relevant) * data.mask
        pairs = positive[:, :, None] * negative[:, None, :]  # (B, N, N)
        hinge = F.relu(self.margin - scores[:, :, None] + scores[:, None, :])
        count = pairs.sum((1, 2))
        per_row = (pairs * hinge).sum((1, 2)) / count.clamp_min(1.0)
        return per_row.sum() / (count > 0).sum().clamp_min(1)

    def _contexts(self, situation: Tensor, scores: Tensor, data: _Data, top_k: int = 3) -> Tensor:
        """(B, 7) context summaries of the current weights' decisions with the given strategies."""
        prior = self.selector.prior(situation)
        rows = []
        for i in range(len(prior)):
            belief = Belief(prior[i].numpy(), np.ones(prior.shape[1], np.float32), prior[i].numpy())
            inside = data.mask[i] > 0
            order = scores[i][inside].argsort(descending=True)
            ranked = scores[i][inside][order].tolist()
            best = scores[i][inside][order][:top_k]
            logit = float(self.gate.log_odds(best, torch.ones(len(best))))
            unselected = ranked[top_k] if len(ranked) > top_k else None
            slate = Slate(order[:top_k].tolist(), ranked[:top_k], [], logit, unselected)
            rows.append(summarize(belief, int(data.strategy[i]), slate).to_tensor())
        return torch.stack(rows)

    def _collate(self, samples: Sequence[TrainingSample]) -> _Data:
        size, dim = len(samples), self.encoder.text_dim
        features = [
            as_float32(
                s.metadata if not isinstance(s.metadata, Mapping) else metadata_features(s.metadata),
                "metadata",
                1,
            )
            for s in samples
        ]
        memories = [
            as_float32(s.memory_embs, "memory_embs", 2)
            if len(s.memory_embs)
            else np.zeros((0, dim), np.float32)
            for s in samples
        ]
        most = max(len(m) for m in memories)
        padded = np.zeros((size, most, dim), dtype=np.float32)
        relevant = np.zeros((size, most), dtype=np.float32)
        mask = np.zeros((size, most), dtype=np.float32)
        for row, (sample, embs) in enumerate(zip(samples, memories, strict=True)):
            outside = [i for i in sample.relevant_indices if not 0 <= i < len(embs)]
            if outside:
                raise InputError(
                    f"sample {row}: relevant_indices {outside} are out of range for {len(embs)} memories"
                )
            if not 0.0 <= sample.outcome <= 1.0:
                raise InputError(f"sample {row}: outcome is {sample.outcome}, expected a number in [0, 1]")
            if embs.shape[1] != dim:
                raise InputError(f"sample {row}: memory_embs has {embs.shape[1]} columns, expected {dim}")
            padded[row, : len(embs)] = embs
            mask[row, : len(embs)] = 1.0
            relevant[row, list(sample.relevant_indices)] = 1.0
        return _Data(
            message=torch.from_numpy(
                np.stack([as_float32(s.message_emb, "message_emb", 1) for s in samples])
            ),
            history=torch.from_numpy(
                np.stack([as_float32(s.history_emb, "history_emb", 1) for s in samples])
            ),
            metadata=torch.from_numpy(np.stack(features)),
            memories=torch.from_numpy(padded),
            relevant=torch.from_numpy(relevant),
            mask=torch.from_numpy(mask),
            strategy=torch.tensor([self.registry.id_to_index(s.strategy_id) for s in samples]),
            outcome=torch.tensor([s.outcome for s in samples], dtype=torch.float32),
        )
