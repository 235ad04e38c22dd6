"""The check before replay: whether an experience fits its model, without torch.

The trainer writes each model's architecture beside its replay buffer; `FitCheck` reads it.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import orjson
import structlog
from cachetools import LRUCache
from msgspec import Struct

from cortex_core.errors import InputError
from cortex_core.requirements import Requirements

if TYPE_CHECKING:
    import redis.asyncio

log = structlog.get_logger(__name__)

MODELS_KNOWN = 10_000
"""Models whose architecture is cached; more than a batch has."""
FRESH_S = 1.0
"""Seconds for which an architecture that was read counts as current, or as missing."""


class _Array(Struct):
    shape: tuple[int, ...]


class _Features(Struct):
    situation: _Array
    message: _Array
    history: _Array
    memories: _Array
    metadata: list[float]
    context: list[float]
    strategy_id: str
    encoder: str | None = None


class _Experience(Struct):
    interaction: _Features


_decode = msgspec.json.Decoder(_Experience).decode


def architecture_key(prefix: str, model_id: str) -> str:
    """The key of a model's architecture, beside its buffer."""
    return f"{prefix}:replay:{{{model_id}}}:architecture"


class FitCheck:
    """Finds the experiences that do not fit their models. About 30 µs for each."""

    def __init__(self, client: redis.asyncio.Redis, prefix: str, strategies: Collection[str] = ()) -> None:
        """
        Args:
            strategies: configured ones, which a model that was trained before learns when it is loaded next.
        """
        self._client = client
        self._prefix = prefix
        self._strategies = frozenset(strategies)
        self._read: LRUCache[str, tuple[float, Requirements | None]] = LRUCache(MODELS_KNOWN)

    async def unfit(self, experiences: Sequence[tuple[str, bytes]]) -> set[int]:
        """The positions of those that do not fit.

        Args:
            experiences: model_id, and JSON of an `ExperienceEvent`; empty bytes fit every model.
        """
        await self._refresh({model_id for model_id, _ in experiences})
        found: dict[int, str] = {}
        for i, (model_id, value) in enumerate(experiences):
            _, requirements = self._read[model_id]
            if value and requirements is not None and (why := _misfit(value, requirements)):
                found[i] = why
        for i in [*found][:1]:  # one line a batch, for the trainer says it of each
            log.warning("not stored in replay", model_id=experiences[i][0], number=len(found), why=found[i])
        return set(found)

    async def _refresh(self, model_ids: Iterable[str]) -> None:
        now = time.monotonic()
        stale = [m for m in model_ids if m not in self._read or now - self._read[m][0] > FRESH_S]
        if not stale:
            return
        pipe = self._client.pipeline(transaction=False)
        for model_id in stale:
            pipe.get(architecture_key(self._prefix, model_id))
        for model_id, value in zip(stale, await pipe.execute(), strict=True):
            self._read[model_id] = now, self._requirements(value)

    def _requirements(self, value: Any) -> Requirements | None:
        if value is None:
            return None
        try:
            known = Requirements.of(orjson.loads(value))
        except (ValueError, TypeError, LookupError):  # of a newer version: the trainer's check is what counts
            return None
        return known.with_strategies(self._strategies)


def _misfit(value: bytes, requirements: Requirements) -> str:
    """Why an experience does not fit; empty if it does, or is no experience."""
    try:
        it = _decode(value).interaction
    except msgspec.MsgspecError:
        return ""
    try:
        requirements.check(
            strategy_id=it.strategy_id,
            situation=it.situation.shape,
            message=it.message.shape,
            history=it.history.shape,
            memories=it.memories.shape,
            metadata=it.metadata,
            context=it.context,
            encoder=it.encoder,
        )
    except InputError as error:
        return str(error)
    return ""
