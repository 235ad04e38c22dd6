"""OnlineTrainer: trains all four components on users' replies as they arrive.

It reads experiences and samples replay; it publishes nothing and does not depend on Kafka.

    trainer = OnlineTrainer.for_model(model, buffer=buffer)
    for entry in experiences:       # each is already in the buffer
        update = trainer.observe(entry)
    trainer.flush()                 # trains on what is pending
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from cortex_core.arrays import FloatArray
from cortex_core.confidence_estimator import CalibrationLoss, ConfidenceEstimator
from cortex_core.errors import ConfigError, InputError
from cortex_core.memory_gate import MemoryGate
from cortex_core.metadata import metadata_features
from cortex_core.online import checkpoints
from cortex_core.online.batches import Batch, collate, encode
from cortex_core.online.degradation import GoodWeights, copy_weights, restore_weights
from cortex_core.online.optimizers import SGD, Adam
from cortex_core.online.posteriors import RING, Posteriors, chosen_mean
from cortex_core.online.progress import Progress, moving_average
from cortex_core.online.update import InteractionOutcome, Losses, OnlineUpdate
from cortex_core.replay_buffer import ReplayEntry, ReplayStore
from cortex_core.requirements import Requirements
from cortex_core.situation_encoder import SituationEncoder
from cortex_core.strategy_registry import StrategyRegistry
from cortex_core.strategy_selector import StrategySelector

if TYPE_CHECKING:
    from cortex_core.feedback_collector import FeedbackCollector
    from cortex_core.model import CortexModel


log = logging.getLogger(__name__)

NOISE_LR = 100.0
"""Learning rate of the estimator's reply noise ε, in units of `lr`: a single number does not overfit."""
GATE_LR = 30.0
"""Learning rate of the Memory Gate's W, in units of `lr`. By gradient descent without Adam, which would move
all of its 150,000 numbers by similar amounts and drown the few that the replies support."""
RECALLED = RING
"""Number of latest experiences that a restarted trainer recalls."""
COMPARED = 64
"""Number of latest experiences on which the current weights are compared with the last good ones."""


class OnlineTrainer:
    """Trains on logged bandit feedback.

    Args:
        buffer: the replay store; `record_interaction` also adds to it.
        lr: learning rate of Adam.
        update_every: experiences per training step.
        batch_size: experiences in a batch: all fresh ones, the rest sampled from replay.
        max_norm: maximum L2 norm of the gradients, by clipping.
        ema_decay: decay of `ema_loss` and of the mean reward.
        degradation_margin: in nats; if `ema_loss` exceeds that of the last good weights by this margin, or
            the mean reward falls below theirs by `reward_margin`, both weights are compared on the latest
            experiences. The old ones are restored if their loss is lower by half this margin. (If the
            environment changed, the old weights are not better.)
        replay: False trains on fresh experiences only, to measure the effect of replay.
        collector: reads replies in `record_interaction`; None means a `FeedbackCollector()`.
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
                "OnlineTrainer expects lr > 0, update_every ≥ 1, batch_size ≥ 1, max_norm > 0 and ema_decay "
                f"in [0, 1); got {lr}, {update_every}, {batch_size}, {max_norm}, {ema_decay}"
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
        self.requirements = Requirements(encoder.text_dim, encoder.output_dim, frozenset(registry.ids))
        self._modules: dict[str, nn.Module] = {
            "encoder": encoder,
            "gate": gate,
            "selector": selector,
            "estimator": estimator,
        }
        self._parameters = [p for m in self._modules.values() for p in m.parameters() if p.requires_grad]
        special = [estimator.noise, gate.weight]
        others = [p for p in self._parameters if all(p is not q for q in special)]
        self.optimizer = Adam(
            [{"params": others, "lr": lr}, {"params": [estimator.noise], "lr": NOISE_LR * lr}], fused=True
        )
        self._gate_optimizer = SGD([gate.weight], lr=GATE_LR * lr)
        self._replay = replay
        self._posteriors = Posteriors(selector, gate, estimator, replay=replay)
        self._progress = Progress()
        self._pending: dict[str, ReplayEntry] = {}
        self._recent: deque[ReplayEntry] = deque(maxlen=COMPARED)
        self._good = GoodWeights(copy_weights(self._modules))

    @classmethod
    def for_model(cls, model: CortexModel, *, buffer: ReplayStore, **options: Any) -> OnlineTrainer:
        """A trainer that trains the components of a model in place."""
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
        """Training steps since initialisation."""
        return self._progress.updates

    @property
    def total_interactions(self) -> int:
        """Distinct experiences learned from since initialisation."""
        return self._progress.interactions

    @property
    def pending(self) -> int:
        """Number of experiences observed and not yet trained on."""
        return len(self._pending)

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
        """Extracts the feedback of a reply, stores the experience, and trains if `update_every` are pending.

        The first six arguments train the selector and the estimator. With the optional ones, which
        `ModelDecision` contains, the Situation Encoder and the Memory Gate are trained as well.

        Raises:
            InputError: an argument is invalid; nothing is stored.
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
        self.requirements.check_entry(entry)
        self.buffer.add(entry)
        return InteractionOutcome(entry, feedback.reward, feedback.signals, self.observe(entry))

    def observe(self, entry: ReplayEntry) -> OnlineUpdate | None:
        """Adds an experience that is already in the buffer; trains if `update_every` are pending.

        A higher revision of a pending id is an amended reward and replaces the pending entry.

        Raises:
            InputError: the entry does not fit this model; it is not added.
        """
        self.requirements.check_entry(entry)
        known = self._pending.get(entry.id) if entry.id else None
        if known is not None and known.revision >= entry.revision:
            return None
        self._pending[entry.id or f"#{len(self._pending)}"] = entry
        return self.flush() if self.pending >= self.update_every else None

    def flush(self) -> OnlineUpdate | None:
        """One training step on all pending experiences plus replay; None if nothing is pending."""
        fresh = list(self._pending.values())
        if not fresh:
            return None
        self._pending.clear()
        self._progress.interactions += sum(not self._posteriors.knows(e.id) for e in fresh)
        ids = {e.id for e in fresh}
        count = max(self.batch_size - len(fresh), 0) if self._replay else 0
        drawn = self.buffer.sample(self.batch_size) if count else []
        replay = [e for e in drawn if e.id not in ids and self._fits(e)][:count]
        return self._step([*fresh, *replay], len(fresh))

    @torch.no_grad()
    def recall(self, entries: Sequence[ReplayEntry]) -> None:
        """Restores what is not in a checkpoint, from experiences that the weights have learned from.

        These are the confidence's calibration window and the gate's ring (`Posteriors.recall`). Without them
        the first replies after a restart would count for all before. Changes no weight.

        Args:
            entries: in the order in which they were learned; the `RECALLED` latest are enough.

        Raises:
            InputError: an entry does not fit this model.
        """
        for start in range(0, len(entries), 256):
            chunk = entries[start : start + 256]
            batch = collate(chunk, self.registry, self.encoder.text_dim, self.encoder.output_dim)
            phi, psi = self._posteriors.features(chunk, 0)
            situation = encode(self.encoder, batch)
            prior = self.selector.prior(situation).gather(1, batch.strategy[:, None]).squeeze(1)
            scores = self.gate.score_memories(situation, batch.memories)
            self._posteriors.recall(
                chunk,
                phi,
                psi,
                strategy=batch.strategy.tolist(),
                prior=prior.numpy(),
                bilinear=self.gate.log_odds(scores, batch.memory_mask).numpy(),
                label=batch.label().numpy(),
                weight=batch.sample_weight().numpy(),
            )

    def loss(self, batch: Batch, phi: FloatArray, psi: FloatArray) -> Losses:
        """One forward pass of all components, for a batch and its (B, M) and (B, L) kernel features."""
        situation = encode(self.encoder, batch)
        label, weight = batch.label(), batch.sample_weight()
        prior = self.selector.prior(situation).gather(1, batch.strategy[:, None]).squeeze(1)
        mean = prior + chosen_mean(self.selector, phi, batch.strategy.tolist())
        # No gradient from the gate to the encoder: it would change every score because of a few memories.
        scores = self.gate.score_memories(situation.detach(), batch.memories)
        bilinear = self.gate.log_odds(scores, batch.memory_mask)
        kernel_part = torch.from_numpy(self.gate.kernel_logit(phi, psi))
        logit = torch.logit(mean, eps=0.01) + bilinear + kernel_part
        nll = F.binary_cross_entropy_with_logits(logit, label, reduction="none")
        total = weight.sum().clamp_min(1e-6)
        reward = (weight * nll).sum() / total
        confidence = self.estimator.reply_probability(self.estimator(situation, batch.context))
        calibration = self.calibration(confidence, label, weight * batch.has_context)
        shown = (scores * batch.memory_mask).sum(1) / batch.memory_mask.sum(1).clamp_min(1.0)
        return Losses(
            reward + 0.5 * calibration, reward, calibration, prior.detach(), shown.detach(), bilinear.detach()
        )

    def restore_best(self) -> None:
        """Restores the last good weights and clears the optimizer's momentum."""
        restore_weights(self._modules, self._good.weights)
        self._posteriors.clear()
        self.optimizer.state.clear()
        self._progress.ema_loss = self._good.ema_loss
        self._progress.ema_reward = self._good.ema_reward
        self._progress.rollbacks += 1

    def state_dict(self) -> dict[str, Any]:
        """`tensors` by name, and `meta` as JSON values: the state needed to resume."""
        return checkpoints.pack(copy_weights(self._modules), self.optimizer, self._progress.to_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`; raises `WeightsError` without changes if the state does not fit."""
        meta = checkpoints.unpack(state, self._modules, self.optimizer)
        self._posteriors.clear()
        self._pending.clear()
        self._progress = progress = Progress.from_dict(meta)
        self._good = GoodWeights(
            copy_weights(self._modules), progress.ema_loss, progress.ema_reward, progress.updates
        )

    def save_checkpoint(self, path: Path | str) -> None:
        """Writes the state to a safetensors file, atomically: a crash leaves the old file or the new one."""
        checkpoints.save(path, self.state_dict())

    def load_checkpoint(self, path: Path | str) -> None:
        """Resumes from `save_checkpoint`; raises `WeightsError` if the file is damaged or does not fit."""
        self.load_state_dict(checkpoints.load(path))

    def _fits(self, entry: ReplayEntry) -> bool:
        """Whether a drawn entry fits this model. One that does not must not fail the step of the others."""
        try:
            self.requirements.check_entry(entry)
        except InputError as error:
            log.warning("replay entry %r is skipped: %s", entry.id, error)
            return False
        return True

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
                self._gate_optimizer.step()
                self._posteriors.condition(
                    entries[:fresh],
                    phi[:fresh],
                    psi[:fresh],
                    strategy=batch.strategy[:fresh].tolist(),
                    prior=losses.prior[:fresh].numpy(),
                    scores=losses.scores[:fresh].numpy(),
                    bilinear=losses.bilinear[:fresh].numpy(),
                    label=batch.label()[:fresh].numpy(),
                    weight=batch.sample_weight()[:fresh].numpy(),
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
            progress.ema_loss = moving_average(progress.ema_loss, value, self.ema_decay)
            progress.ema_reward = moving_average(progress.ema_reward, mean, self.ema_decay)
            rolled_back = self._check_degradation(progress.ema_loss, progress.ema_reward)
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

    def _check_degradation(self, ema_loss: float, ema_reward: float) -> bool:
        """Keeps the weights if they are the best so far; restores the last good ones if these are worse."""
        updates, good = self._progress.updates, self._good
        if good.should_replace(ema_loss, ema_reward, updates):
            self._good = GoodWeights(copy_weights(self._modules), ema_loss, ema_reward, updates)
            return False
        if not good.suspects_degradation(ema_loss, ema_reward, self.degradation_margin, self.reward_margin):
            return False
        current = copy_weights(self._modules)
        current_loss = self._recent_loss()
        restore_weights(self._modules, good.weights)
        good_loss = self._recent_loss()
        restore_weights(self._modules, current)
        if good_loss + 0.5 * self.degradation_margin < current_loss:
            self.restore_best()
            return True
        # The environment changed: on the latest experiences the old weights are not better.
        self._good = GoodWeights(current, ema_loss, ema_reward, updates)
        return False

    def _recent_loss(self) -> float:
        """Loss of the current weights on the latest experiences, without dropout."""
        entries = list(self._recent)
        batch = collate(entries, self.registry, self.encoder.text_dim, self.encoder.output_dim)
        phi, psi = self._posteriors.features(entries, 0)
        with torch.no_grad():
            value = float(self.loss(batch, phi, psi).total)
        return value if math.isfinite(value) else math.inf
