"""What an experience must be like, so that a model can learn from it.

The same check for everyone: the trainer before it learns, the joiner before it stores. Does not import torch,
which the joiner must not load.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cortex_core.errors import DimensionError, InputError, shown
from cortex_core.metadata import METADATA_KEYS

if TYPE_CHECKING:
    from cortex_core.replay_buffer import ReplayEntry

CONTEXT_DIM = 7
"""Numbers in a context summary."""
LARGEST = 65_504.0
"""Absolute value of a metadata feature or a context number; as of an embedding, which is float16. Numbers
near float32's limit would make every training step that they are in overflow."""

Shape = tuple[int, ...]

_HINT = "All experiences of a model must have its dimensions: use its text encoder, or another model_id"


@dataclass(frozen=True, slots=True)
class Requirements:
    """The facts of a model's architecture that its experiences depend on."""

    text_dim: int
    """D"""
    situation_dim: int
    """S"""
    strategies: frozenset[str]
    encoder: str = ""
    """Name of the text encoder; empty if not known."""

    @classmethod
    def of(cls, architecture: Mapping[str, Any]) -> Requirements:
        """The requirements of an architecture: `ModelConfig.to_dict()`, with the name of the `encoder`
        if that is known.

        Raises:
            KeyError, TypeError, ValueError: it is not an architecture.
        """
        sizes = int(architecture["text_dim"]), int(architecture["situation_dim"])
        strategies = frozenset(map(str, architecture["strategies"]))
        return cls(*sizes, strategies, str(architecture.get("encoder") or ""))

    def with_strategies(self, ids: Iterable[str]) -> Requirements:
        """These requirements with further known strategies."""
        return replace(self, strategies=self.strategies.union(ids))

    def encoder_misfit(self, encoder: str | None) -> str:
        """Why embeddings of this encoder do not fit; empty if they do, or if either name is not known."""
        if not encoder or not self.encoder or encoder == self.encoder:
            return ""
        return (
            f"the embeddings are from text encoder {encoder!r}, this model learns from those of "
            f"{self.encoder!r}: use that one (CORTEX_ENCODER), or another model_id"
        )

    def check(
        self,
        *,
        strategy_id: object,
        situation: Shape,
        message: Shape | None,
        history: Shape | None,
        memories: Shape | None,
        metadata: Iterable[float] | None,
        context: Iterable[float],
        encoder: str | None,
    ) -> None:
        """Checks the features of an experience, arrays by their shapes; None if a feature is not logged.

        Raises:
            InputError: names the first feature that does not fit this model.
        """
        if not isinstance(strategy_id, str) or strategy_id not in self.strategies:
            known = ", ".join(sorted(self.strategies))
            raise InputError(
                f"unknown strategy {shown(strategy_id)}, expected one of {known}. All workers need the same "
                "CORTEX_STRATEGIES"
            )
        if why := self.encoder_misfit(encoder):
            raise InputError(why)
        text = (self.text_dim,)
        for name, shape, expected in (
            ("situation_emb", situation, (self.situation_dim,)),
            ("message_emb", message, text),
            ("history_emb", history, text),
        ):
            if shape is not None and shape != expected:
                raise DimensionError(name, shape, expected, _HINT)
        if memories is not None and (len(memories) != 2 or memories[1:] != text):
            raise DimensionError("memory_embs", memories, f"(N, {self.text_dim})", _HINT)
        if metadata is not None:
            _check_numbers("metadata", list(metadata), len(METADATA_KEYS))
        if numbers := list(context):
            _check_numbers("context", numbers, CONTEXT_DIM)

    def check_entry(self, entry: ReplayEntry) -> None:
        """Checks a replay entry.

        Raises:
            InputError: as `check`.
        """
        self.check(
            strategy_id=entry.strategy_id,
            situation=entry.situation_emb.shape,
            message=None if entry.message_emb is None else entry.message_emb.shape,
            history=None if entry.history_emb is None else entry.history_emb.shape,
            memories=None if entry.memory_embs is None else entry.memory_embs.shape,
            metadata=None if entry.metadata is None else entry.metadata.tolist(),
            context=entry.context,
            encoder=entry.encoder,
        )


def _check_numbers(name: str, numbers: list[float], expected: int) -> None:
    if len(numbers) != expected:
        raise DimensionError(name, (len(numbers),), (expected,))
    for number in numbers:
        if not abs(number) <= LARGEST:  # NaN is not
            raise InputError(f"{name} contains {number}, expected numbers between ±{LARGEST:g}")
