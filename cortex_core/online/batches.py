"""Batches: replay entries as padded tensors, for one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cortex_core.errors import DimensionError
from cortex_core.metadata import METADATA_KEYS
from cortex_core.replay_buffer import ReplayEntry
from cortex_core.requirements import CONTEXT_DIM
from cortex_core.situation_encoder import SituationEncoder
from cortex_core.strategy_registry import StrategyRegistry


@dataclass(slots=True)
class Batch:
    """B experiences as tensors; K is the size of the largest slate."""

    situation: Tensor
    """(B, S) as logged"""
    message: Tensor
    """(B, D), zeros if not logged"""
    history: Tensor
    metadata: Tensor
    """(B, F)"""
    has_message: Tensor
    """(B,) bool: the message is logged, so that the situation can be recomputed with gradient"""
    strategy: Tensor
    """(B,) strategy indices"""
    memories: Tensor
    """(B, K, D) retrieved memories, zero-padded"""
    memory_mask: Tensor
    """(B, K) 1 for a memory, 0 for padding"""
    context: Tensor
    """(B, 7)"""
    has_context: Tensor
    """(B,) bool"""
    reward: Tensor
    """(B,) in [-1, 1]"""
    reward_confidence: Tensor
    """(B,) in [0, 1]"""

    def label(self) -> Tensor:
        """(B,) 1 for a positive reward (a satisfied user), else 0."""
        return (self.reward > 0).float()

    def sample_weight(self) -> Tensor:
        """(B,) in [0, 1]: the squared confidence of the reward; 0 for a reward of 0."""
        return torch.where(self.reward == 0, 0.0, self.reward_confidence**2)

    def __len__(self) -> int:
        return len(self.reward)


def collate(
    entries: Sequence[ReplayEntry], registry: StrategyRegistry, text_dim: int, situation_dim: int
) -> Batch:
    """Stacks entries into a batch, with padding.

    Raises:
        InputError: an entry has an unknown strategy or an array of the wrong shape.
    """
    size = len(entries)
    slots = max((len(e.memory_indices) for e in entries if e.memory_embs is not None), default=0)
    message = np.zeros((size, text_dim), dtype=np.float32)
    history = np.zeros((size, text_dim), dtype=np.float32)
    metadata = np.zeros((size, len(METADATA_KEYS)), dtype=np.float32)
    situation = np.zeros((size, situation_dim), dtype=np.float32)
    memories = np.zeros((size, slots, text_dim), dtype=np.float32)
    memory_mask = np.zeros((size, slots), dtype=np.float32)
    context = np.zeros((size, CONTEXT_DIM), dtype=np.float32)
    for row, entry in enumerate(entries):
        _put(situation[row], entry.situation_emb, "situation_emb")
        if entry.message_emb is not None:
            _put(message[row], entry.message_emb, "message_emb")
        if entry.history_emb is not None:
            _put(history[row], entry.history_emb, "history_emb")
        if entry.metadata is not None:
            _put(metadata[row], entry.metadata, "metadata")
        if entry.memory_embs is not None and entry.memory_indices:
            chosen = entry.memory_embs[entry.memory_indices]
            _put(memories[row, : len(chosen)], chosen, "memory_embs")
            memory_mask[row, : len(chosen)] = 1.0
        if entry.context:
            _put(context[row], np.asarray(entry.context, dtype=np.float32), "context")
    return Batch(
        situation=torch.from_numpy(situation),
        message=torch.from_numpy(message),
        history=torch.from_numpy(history),
        metadata=torch.from_numpy(metadata),
        has_message=torch.tensor([e.message_emb is not None for e in entries]),
        strategy=torch.tensor([registry.id_to_index(e.strategy_id) for e in entries]),
        memories=torch.from_numpy(memories),
        memory_mask=torch.from_numpy(memory_mask),
        context=torch.from_numpy(context),
        has_context=torch.tensor([bool(e.context) for e in entries]),
        reward=torch.tensor([e.reward for e in entries], dtype=torch.float32),
        reward_confidence=torch.tensor([e.reward_confidence for e in entries], dtype=torch.float32),
    )


def encode(encoder: SituationEncoder, batch: Batch) -> Tensor:
    """(B, S) situations: recomputed with gradient if the message was logged, else as logged."""
    if not bool(batch.has_message.any()):
        return batch.situation
    fresh = encoder(batch.message, batch.history, batch.metadata)
    return torch.where(batch.has_message[:, None], fresh, batch.situation)


def _put(target: np.ndarray, value: np.ndarray, what: str) -> None:
    if target.shape != value.shape:
        raise DimensionError(
            what, value.shape, target.shape, "All experiences of a model must have its dimensions."
        )
    target[...] = value
