"""Entries and samples as padded tensors: one forward pass for a whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cortex_core.confidence_estimator import CONTEXT_DIM
from cortex_core.errors import DimensionError
from cortex_core.metadata import METADATA_KEYS
from cortex_core.replay_buffer import ReplayEntry
from cortex_core.situation_encoder import SituationEncoder
from cortex_core.strategy_registry import StrategyRegistry


@dataclass(slots=True)
class Batch:
    """B experiences as tensors; K is the largest slate among them."""

    situation: Tensor
    """(B, S) as logged"""
    message: Tensor
    """(B, D), zero where not logged"""
    history: Tensor
    metadata: Tensor
    """(B, F)"""
    has_message: Tensor
    """(B,) bool: the Situation Encoder can be run again, and gets gradient"""
    strategy: Tensor
    """(B,) rows of the selector"""
    memories: Tensor
    """(B, K, D) retrieved, zero-padded"""
    memory_mask: Tensor
    """(B, K) 1 where a memory is"""
    context: Tensor
    """(B, 7)"""
    has_context: Tensor
    """(B,) bool"""
    reward: Tensor
    """(B,) in [-1, 1]"""
    weight: Tensor
    """(B,) in [0, 1]"""

    def content(self) -> Tensor:
        """(B,) 1 for a content user, 0 for one who is not, as far as the reply says."""
        return (self.reward > 0).float()

    def sureness(self) -> Tensor:
        """(B,) what each reply counts: half as sure counts a quarter, and a reward of 0 says nothing."""
        return torch.where(self.reward == 0, 0.0, self.weight**2)

    def __len__(self) -> int:
        return len(self.reward)


def collate(
    entries: Sequence[ReplayEntry], registry: StrategyRegistry, text_dim: int, situation_dim: int
) -> Batch:
    """Pads and stacks.

    Raises:
        InputError: an entry names an unknown strategy, or an embedding has the wrong size.
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
        weight=torch.tensor([e.reward_confidence for e in entries], dtype=torch.float32),
    )


def encode(encoder: SituationEncoder, batch: Batch) -> Tensor:
    """(B, S) situations: computed again, with gradient, where the features were logged; else as logged."""
    if not bool(batch.has_message.any()):
        return batch.situation
    fresh = encoder(batch.message, batch.history, batch.metadata)
    return torch.where(batch.has_message[:, None], fresh, batch.situation)


def _put(target: np.ndarray, value: np.ndarray, what: str) -> None:
    if target.shape != value.shape:
        raise DimensionError(
            what, value.shape, target.shape, "All experiences of a model share its dimensions."
        )
    target[...] = value
