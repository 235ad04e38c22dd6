"""What the learner's tests share: small worlds with a right answer."""

from __future__ import annotations

import numpy as np
import torch

from cortex_core.arrays import FloatArray
from cortex_core.model import CortexModel, ModelConfig, ModelDecision
from cortex_core.online_trainer import OnlineTrainer
from cortex_core.replay_buffer import ReplayBuffer, ReplayEntry

DIM = 32
SMALL = ModelConfig(
    text_dim=DIM,
    situation_dim=DIM,
    encoder_hidden_dim=16,
    selector_hidden_dim=16,
    estimator_hidden_dim=8,
    landmarks=48,
    memory_landmarks=32,
    strategies=("quick_answer", "step_by_step", "creative"),
)


def unit(rng: np.random.Generator, *shape: int) -> FloatArray:
    """Random rows of norm 1."""
    rows = rng.normal(size=(*shape, DIM))
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True), dtype=np.float32)


def near(rng: np.random.Generator, centre: FloatArray, spread: float = 0.08) -> FloatArray:
    """A message close to a centre."""
    row = centre + spread * rng.normal(size=DIM)
    return np.asarray(row / np.linalg.norm(row), dtype=np.float32)


def entry_of(
    decision: ModelDecision, message: FloatArray, memories: FloatArray | None, reward: float, id_: str
) -> ReplayEntry:
    """The experience that a decision becomes."""
    chosen = None if memories is None else memories[decision.memory_indices]
    return ReplayEntry(
        situation_emb=decision.situation,
        memory_indices=list(range(len(decision.memory_indices))),
        memory_scores=decision.memory_scores,
        strategy_id=decision.strategy_id,
        confidence=decision.confidence,
        reward=reward,
        id=id_,
        message_emb=message,
        history_emb=np.zeros(DIM, np.float32),
        metadata=np.zeros(10, np.float32),
        memory_embs=chosen,
        propensity=decision.propensity,
        memory_propensities=decision.memory_propensities,
        context=decision.context,
    )


def fresh(model_id: str = "test", **options: object) -> tuple[CortexModel, OnlineTrainer, ReplayBuffer]:
    """A small model at birth with its trainer."""
    torch.manual_seed(0)
    model = CortexModel.create(SMALL, model_id)
    buffer = ReplayBuffer(1000, rng=0)
    return model, OnlineTrainer.for_model(model, buffer=buffer, **options), buffer
