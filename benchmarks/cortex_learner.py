"""This project's learner in the benchmark, run as the inference worker and the trainer worker run it.

One model serves, another one is trained. After each training step the weights go from one to the other as a
snapshot that is split, joined and verified, and the features of a decision are rounded as on the wire, so
that the benchmark includes whatever serialisation loses.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.tasks import Answer, Request, Task
from cortex_core.arrays import FloatArray
from cortex_core.feedback_collector import Feedback
from cortex_core.metadata import metadata_features
from cortex_core.replay_buffer import ReplayBuffer, ReplayEntry
from cortex_core.strategy_registry import StrategyRegistry

LOGGED_NEGATIVES = 5
"""Number of memories logged besides the retrieved ones, as by default in the inference service."""


@dataclass(frozen=True, slots=True)
class Ablation:
    """Components to disable."""

    replay: bool = True
    encoder_gradient: bool = True
    exploration: bool = True
    soft_ece: bool = True


class CortexLearner:
    """`CortexModel.decide` and `OnlineTrainer.observe` with default settings."""

    name = "cortex"

    def __init__(self, task: Task, seed: int, *, ablation: Ablation | None = None) -> None:
        import torch  # noqa: PLC0415 - takes seconds; not needed by the baselines

        from cortex_core.model import CortexModel, ModelConfig  # noqa: PLC0415
        from cortex_core.online_trainer import OnlineTrainer  # noqa: PLC0415

        torch.set_num_threads(1)
        torch.manual_seed(seed)
        self._ablation = ablation or Ablation()
        self._rng = np.random.default_rng(seed)
        self._memories = task.memories
        self._model_id = f"benchmark-{task.world}-{seed}"
        config = ModelConfig(
            text_dim=len(task.requests[0].message), strategies=strategy_ids(task.settings.strategies)
        )
        self._learning = CortexModel.create(config, self._model_id)
        self._serving = CortexModel.create(config, self._model_id)
        if not self._ablation.encoder_gradient:
            self._learning.encoder.requires_grad_(False)
        self._buffer = ReplayBuffer(rng=seed)
        self._trainer = OnlineTrainer.for_model(
            self._learning, buffer=self._buffer, replay=self._ablation.replay
        )
        if not self._ablation.soft_ece:
            self._trainer.calibration.ece_weight = 0.0
        self._version = 0

    def decide(self, request: Request) -> Answer:
        metadata = metadata_features({}, request.text)
        decision = self._serving.decide(
            request.message,
            None,
            metadata,
            self._memories,
            explore=self._ablation.exploration,
            rng=self._rng,
        )
        retrieved = decision.memory_indices
        logged: FloatArray | None = None
        if self._memories is not None:
            others = np.setdiff1d(np.arange(len(self._memories)), retrieved)
            negatives = self._rng.choice(others, min(LOGGED_NEGATIVES, len(others)), replace=False).tolist()
            logged = _as_sent(self._memories[[*retrieved, *negatives]])
        entry = ReplayEntry(
            situation_emb=_as_sent(decision.situation),
            memory_indices=list(range(len(retrieved))),
            memory_scores=decision.memory_scores,
            strategy_id=decision.strategy_id,
            confidence=decision.confidence,
            reward=0.0,
            id=f"{request.step:08d}",
            occurred_at=float(request.step),
            message_emb=_as_sent(request.message),
            history_emb=np.zeros_like(request.message),
            metadata=metadata,
            memory_embs=logged,
            propensity=decision.propensity,
            memory_propensities=decision.memory_propensities,
            context=decision.context,
            weights_version=self._version,
        )
        return Answer(decision.strategy_index, tuple(retrieved), decision.confidence, extra=entry)

    def learn(self, request: Request, answer: Answer, feedback: Feedback) -> None:
        """Adds the experience to replay, trains, and sends new weights to the serving model."""
        del request
        entry = answer.extra
        assert isinstance(entry, ReplayEntry)
        entry.reward, entry.reward_confidence = feedback.reward, feedback.confidence
        self._buffer.add(entry)
        if self._trainer.observe(entry) is not None:
            self._publish()

    def _publish(self) -> None:
        from cortex_core.weights import WeightsSnapshot  # noqa: PLC0415

        sent = WeightsSnapshot.of(
            self._learning,
            model_id=self._model_id,
            version=self._version + 1,
            parent=self._version or None,
            updates=self._trainer.total_updates,
            interactions=self._trainer.total_interactions,
            ema_loss=self._trainer.ema_loss,
        )
        received = WeightsSnapshot.join(sent.manifest, sent.split())
        received.load_into(self._serving)
        self._version = received.manifest.version


def strategy_ids(count: int) -> tuple[str, ...]:
    """`count` ids: those of the generic set, then numbered ones."""
    ids = StrategyRegistry().ids
    return (*ids, *(f"strategy_{i}" for i in range(len(ids), count)))[:count]


def _as_sent(array: FloatArray) -> FloatArray:
    """Rounds to little-endian float16, as events do."""
    return array.astype("<f2").astype(np.float32)
