"""OnlineTrainer: users' replies become gradient steps on all four components, live.

It reads experiences and draws replay; it publishes nothing and knows no Kafka.

    trainer = OnlineTrainer.for_model(model, buffer=buffer)
    for entry in experiences:       # each is in the buffer already
        update = trainer.observe(entry)
    trainer.flush()                 # whatever is pending, now
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from cortex_core.arrays import FloatArray
from cortex_core.confidence_estimator import CalibrationLoss, ConfidenceEstimator
from cortex_core.errors import ConfigError
from cortex_core.memory_gate import MemoryGate
from cortex_core.metadata import metadata_features
from cortex_core.online import checkpoints
from cortex_core.online.batches import Batch, collate, encode
from cortex_core.online.degradation import GoodWeights, put_back, weights_of
from cortex_core.online.posteriors import Posteriors, chosen_mean
from cortex_core.online.update import InteractionOutcome, Losses, OnlineUpdate
from cortex_core.replay_buffer import ReplayEntry, ReplayStore
from cortex_core.situation_encoder import SituationEncoder
from cortex_core.strategy_registry import StrategyRegistry
from cortex_core.strategy_selector import StrategySelector

if TYPE_CHECKING:
    from cortex_core.feedback_collector import FeedbackCollector
    from cortex_core.model import CortexModel


QUICK = 100.0
"""Learning rate of the share of misleading replies, in units of `lr`."""
GATE = 30.0
"""Learning rate of the Memory Gate's W, in units of `lr`, by plain gradient descent: Adam moves each of its
150,000 numbers alike, and what few replies say would be lost in that."""
RECENT = 64
"""Experiences that two sets of weights are compared on, when learning is suspected to have degraded."""


@dataclass(slots=True)
class _Progress:
    updates: int = 0
    interactions: int = 0
    ema_loss: float | None = None
    ema_reward: float | None = None
    rollbacks: int = 0
    pending: dict[str, ReplayEntry] = field(default_factory=dict)


class OnlineTrainer:
    """Learns from logged bandit feedback.

    Args:
        buffer: where replay comes from; `record_interaction` also adds to it.
        lr: Adam's learning rate.
        update_every: experiences between two steps.
        batch_size: experiences in a step; the fresh ones are always among them, the rest is replay.
        max_norm: gradients are clipped to this L2 norm.
        ema_decay: of `ema_loss`.
        degradation_margin: in nats; when `ema_loss` stands this much above that of the last good weights,
            or the mean reward `reward_margin` below theirs, both are compared on the latest experiences. The
            old ones are restored where they do better there by half this margin: where the world changed and
            not the learner, they do not.
        replay: False trains on fresh experiences alone, to measure what replay is worth.
        collector: reads replies in `record_interaction`; a `FeedbackCollector()` when not given.
    """

    def __init__(
        self,
        encoder: SituationEncoder,
        gate: MemoryGate,
        selector: StrategySelector,
        estimator: ConfidenceEstimator,
        registry: StrategyRegistry,
        *,
        buffer: ReplayStore,
        lr: float = 1e-4,
        update_every: int = 5,
        batch_size: int = 16,
        max_norm: float = 1.0,
        ema_decay: float = 0.95,
        degradation_margin: float = 0.3,
        reward_margin: float = 0.3,
        replay: bool = True,
        collector: FeedbackCollector | None = None,
    ) -> None:
        if lr <= 0 or update_every < 1 or batch_size < 1 or max_norm <= 0 or not 0 <= ema_decay < 1:
            raise ConfigError(
                "OnlineTrainer wants lr > 0, update_every ≥ 1, batch_size ≥ 1, max_norm > 0 and ema_decay in "
                f"[0, 1); got {lr}, {update_every}, {batch_size}, {max_norm}, {ema_decay}"
            )
        self.encoder = encoder
        self.gate = gate
        self.selector = selector
        self.estimator = estimator
        self.registry = registry
        self.buffer = buffer
        self.update_every = update_every
        self.batch_size = batch_size
        self.max_norm = max_norm
        self.ema_decay = ema_decay
        self.degradation_margin = degradation_margin
        self.reward_margin = reward_margin
        self._collector = collector
        self.calibration = CalibrationLoss()
        self._modules: dict[str, nn.Module] = {
            "encoder": encoder,
            "gate": gate,
            "selector": selector,
            "estimator": estimator,
        }
        self._parameters = [p for m in self._modules.values() for p in m.parameters() if p.requires_grad]
        quick = [estimator.noise]
        apart = [*quick, gate.weight]
        slow = [p for p in self._parameters if all(p is not q for q in apart)]
        # One number cannot overfit as layers can.
        self.optimizer = torch.optim.Adam(
            [{"params": slow, "lr": lr}, {"params": quick, "lr": QUICK * lr}], fused=True
        )
        self._descent = torch.optim.SGD([gate.weight], lr=GATE * lr)
        self._replay = replay
        self._posteriors = Posteriors(selector, gate, estimator, replay=replay)
        self._progress = _Progress()
        self._recent: deque[ReplayEntry] = deque(maxlen=RECENT)
        self._good = GoodWeights(weights_of(self._modules))

    @classmethod
    def for_model(cls, model: CortexModel, *, buffer: ReplayStore, **options: Any) -> OnlineTrainer:
        """A trainer of a model's components, in place."""
        return cls(
            model.encoder,
            model.gate,
            model.selector,
            model.estimator,
            model.registry,
            buffer=buffer,
            **options,
        )

    @property
    def ema_loss(self) -> float | None:
        """Exponential moving average of the training loss; None before the first step."""
        return self._progress.ema_loss

    @property
    def total_updates(self) -> int:
        """Steps since birth."""
        return self._progress.updates

    @property
    def total_interactions(self) -> int:
        """Distinct experiences learned from since birth."""
        return self._progress.interactions

    @property
    def pending(self) -> int:
        """Experiences observed and not yet trained on."""
        return len(self._progress.pending)

    def record_interaction(  # noqa: PLR0917 - the specification names these six
        self,
        situation_emb: Any,
        memory_indices: Sequence[int],
        memory_scores: Sequence[float],
        strategy_id: str,
        confidence: float,
        user_response: str,
        *,
        message_emb: Any = None,
        history_emb: Any = None,
        metadata: Mapping[str, Any] | Any = None,
        memory_embs: Any = None,
        propensity: float | None = None,
        memory_propensities: Sequence[float] = (),
        context: Sequence[float] = (),
        conversation_continued: bool = True,
        topic_switched: bool = False,
        interaction_id: str = "",
        occurred_at: float | None = None,
    ) -> InteractionOutcome:
        """Reads the reply, stores the experience and trains when enough have come.

        The first six arguments are enough to teach the selector and the estimator. With the optional ones,
        as `Decision` holds them, the Situation Encoder and the Memory Gate learn as well.

        Raises:
            InputError: something is unusable; nothing is stored then.
        """
        if self._collector is None:
            from cortex_core.feedback_collector import FeedbackCollector  # noqa: PLC0415

            self._collector = FeedbackCollector()
        self.registry.id_to_index(strategy_id)
        feedback = self._collector.extract(
            user_response, conversation_continued=conversation_continued, topic_switched=topic_switched
        )
        now = time.time() if occurred_at is None else occurred_at
        entry = ReplayEntry(
            situation_emb=situation_emb,
            memory_indices=list(memory_indices),
            memory_scores=list(memory_scores),
            strategy_id=strategy_id,
            confidence=float(confidence),
            reward=feedback.reward,
            id=interaction_id or f"{now:.6f}-{self._progress.interactions + self.pending}",
            occurred_at=now,
            reward_confidence=feedback.confidence,
            message_emb=message_emb,
            history_emb=history_emb,
            metadata=metadata_features(metadata) if isinstance(metadata, Mapping) else metadata,
            memory_embs=memory_embs,
            propensity=propensity,
            memory_propensities=list(memory_propensities),
            context=list(context),
        )
        self._check(entry)
        self.buffer.add(entry)
        return InteractionOutcome(entry, feedback.reward, feedback.signals, self.observe(entry))

    def observe(self, entry: ReplayEntry) -> OnlineUpdate | None:
        """Counts one experience that the buffer holds already; trains when `update_every` are pending.

        A higher revision of a known id is an amended reward: it replaces the pending one.

        Raises:
            InputError: the entry does not fit this model; it is not counted.
        """
        self._check(entry)
        known = self._progress.pending.get(entry.id) if entry.id else None
        if known is not None and known.revision >= entry.revision:
            return None
        self._progress.pending[entry.id or f"#{len(self._progress.pending)}"] = entry
        return self.flush() if self.pending >= self.update_every else None

    def flush(self) -> OnlineUpdate | None:
        """One training step on everything pending plus replay; None where nothing is pending."""
        fresh = list(self._progress.pending.values())
        if not fresh:
            return None
        self._progress.pending.clear()
        self._progress.interactions += sum(not self._posteriors.knows(e.id) for e in fresh)
        ids = {e.id for e in fresh}
        want = max(self.batch_size - len(fresh), 0) if self._replay else 0
        drawn = self.buffer.sample(self.batch_size) if want else []
        replay = [e for e in drawn if e.id not in ids][:want]
        return self._step([*fresh, *replay], len(fresh))

    def loss(self, batch: Batch, phi: FloatArray, psi: FloatArray) -> Losses:
        """One forward pass of all four components over a batch and its kernel features."""
        situation = encode(self.encoder, batch)
        content, weight = batch.content(), batch.sureness()
        prior = self.selector.prior(situation).gather(1, batch.strategy[:, None]).squeeze(1)
        mean = prior + chosen_mean(self.selector, phi, batch.strategy.tolist())
        # Through the gate the encoder would move every score for the sake of a few memories.
        scores = self.gate.score_memories(situation.detach(), batch.memories)
        bilinear = self.gate.log_odds(scores, batch.memory_mask)
        kernel_part = torch.from_numpy(self.gate.kernel_logit(phi, psi))
        logit = torch.logit(mean, eps=0.01) + bilinear + kernel_part
        nll = F.binary_cross_entropy_with_logits(logit, content, reduction="none")
        total = weight.sum().clamp_min(1e-6)
        reward = (weight * nll).sum() / total
        confidence = self.estimator.reply_probability(self.estimator(situation, batch.context))
        calibration = self.calibration(confidence, content, weight * batch.has_context)
        shown = (scores * batch.memory_mask).sum(1) / batch.memory_mask.sum(1).clamp_min(1.0)
        return Losses(
            reward + 0.5 * calibration, reward, calibration, prior.detach(), shown.detach(), bilinear.detach()
        )

    def restore_best(self) -> None:
        """Back to the last good weights; the optimizer forgets its momentum, which led away from them."""
        put_back(self._modules, self._good.weights)
        self._posteriors.start_anew()
        self.optimizer.state.clear()
        self._progress.ema_loss = self._good.ema_loss
        self._progress.ema_reward = self._good.ema_reward
        self._progress.rollbacks += 1

    def state_dict(self) -> dict[str, Any]:
        """`tensors` by name, and `meta` of plain JSON values: all that resuming needs."""
        return checkpoints.pack(weights_of(self._modules), self.optimizer, self._meta())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`; `WeightsError` where it does not fit, and nothing changes then."""
        meta = checkpoints.unpack(state, self._modules, self.optimizer)
        self._posteriors.start_anew()
        self._progress = _Progress(
            updates=int(meta["updates"]),
            interactions=int(meta["interactions"]),
            ema_loss=meta["ema_loss"],
            ema_reward=meta.get("ema_reward"),
            rollbacks=int(meta["rollbacks"]),
        )
        self._good = GoodWeights(
            weights_of(self._modules),
            self._progress.ema_loss,
            self._progress.ema_reward,
            self._progress.updates,
        )

    def save_checkpoint(self, path: Path | str) -> None:
        """Weights and optimizer in one safetensors file, atomically: a crash leaves the old or the new."""
        checkpoints.save(path, self.state_dict())

    def load_checkpoint(self, path: Path | str) -> None:
        """Resumes where `save_checkpoint` stood; `WeightsError` where the file is damaged or does not fit."""
        self.load_state_dict(checkpoints.load(path))

    def _check(self, entry: ReplayEntry) -> None:
        collate([entry], self.registry, self.encoder.text_dim, self.encoder.output_dim)

    def _meta(self) -> dict[str, Any]:
        p = self._progress
        return {
            "updates": p.updates,
            "interactions": p.interactions,
            "ema_loss": p.ema_loss,
            "ema_reward": p.ema_reward,
            "rollbacks": p.rollbacks,
        }

    def _step(self, entries: list[ReplayEntry], fresh: int) -> OnlineUpdate:
        batch = collate(entries, self.registry, self.encoder.text_dim, self.encoder.output_dim)
        phi, psi = self._posteriors.features(entries, fresh)
        for module in self._modules.values():
            module.train()
        try:
            losses = self.loss(batch, phi, psi)
            for parameter in self._parameters:
                parameter.grad = None
            losses.total.backward()
            norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self.max_norm))
            value = float(losses.total.detach())
            usable = math.isfinite(value) and math.isfinite(norm)
            if usable:
                self.optimizer.step()
                self._descent.step()
                self._posteriors.condition(
                    entries[:fresh],
                    phi[:fresh],
                    psi[:fresh],
                    strategy=batch.strategy[:fresh].tolist(),
                    prior=losses.prior[:fresh].numpy(),
                    scores=losses.scores[:fresh].numpy(),
                    bilinear=losses.bilinear[:fresh].numpy(),
                    content=batch.content()[:fresh].numpy(),
                    weight=batch.sureness()[:fresh].numpy(),
                )
        finally:
            for module in self._modules.values():
                module.eval()
        progress = self._progress
        rolled_back = False
        if usable:
            progress.updates += 1
            self._recent.extend(entries[:fresh])
            mean = sum(entry.reward for entry in entries[:fresh]) / fresh
            progress.ema_loss = self._averaged(progress.ema_loss, value)
            progress.ema_reward = self._averaged(progress.ema_reward, mean)
            rolled_back = self._watch(progress.ema_loss, progress.ema_reward)
        return OnlineUpdate(
            update=progress.updates,
            loss=value,
            strategy_loss=float(losses.reward.detach()),
            confidence_loss=float(losses.calibration.detach()),
            ema_loss=progress.ema_loss if progress.ema_loss is not None else math.nan,
            grad_norm=norm,
            fresh=fresh,
            replayed=len(entries) - fresh,
            skipped=not usable,
            rolled_back=rolled_back,
        )

    def _averaged(self, old: float | None, new: float) -> float:
        return new if old is None else self.ema_decay * old + (1.0 - self.ema_decay) * new

    def _watch(self, ema_loss: float, ema_reward: float) -> bool:
        """Notes the weights when they are the best so far; goes back to those when they have degraded."""
        updates = self._progress.updates
        if self._good.is_better(ema_loss, ema_reward, updates):
            self._good = GoodWeights(weights_of(self._modules), ema_loss, ema_reward, updates)
            return False
        if not self._good.suspects(ema_loss, ema_reward, self.degradation_margin, self.reward_margin):
            return False
        current = weights_of(self._modules)
        now = self._recent_loss()
        put_back(self._modules, self._good.weights)
        then = self._recent_loss()
        put_back(self._modules, current)
        if then + 0.5 * self.degradation_margin < now:
            self.restore_best()
            return True
        # The world changed and not the learner: the old weights are no better on what comes in now.
        self._good = GoodWeights(current, ema_loss, ema_reward, updates)
        return False

    def _recent_loss(self) -> float:
        """Of the present weights on the latest experiences, dropout off."""
        entries = list(self._recent)
        batch = collate(entries, self.registry, self.encoder.text_dim, self.encoder.output_dim)
        phi, psi = self._posteriors.features(entries, 0)
        with torch.no_grad():
            value = float(self.loss(batch, phi, psi).total)
        return value if math.isfinite(value) else math.inf
