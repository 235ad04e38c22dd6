"""Replay: what the learner remembers of past interactions, and how it draws from them.

`ReplayEntry` is one experience. `ReplayStore` is the port that the trainer draws from: `ReplayBuffer`
here keeps it as JSON lines in a file, `streams.replay_store.RedisReplayBuffer` in Redis; one contract
suite runs on both. Nothing here imports torch: the joiner writes entries and stays small.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cortex_core.errors import DimensionError, InputError, NonFiniteError

FloatArray = npt.NDArray[np.float32]


def as_float32(value: Any, what: str, ndim: int) -> FloatArray:
    """A list, numpy array or tensor as a finite C-ordered float32 array with `ndim` axes.

    Raises:
        DimensionError: another number of axes.
        NonFiniteError: NaN or infinity inside.
    """
    if hasattr(value, "detach"):  # a tensor, named without importing torch
        value = value.detach().cpu().numpy()
    array = np.ascontiguousarray(value, dtype=np.float32)
    if array.ndim != ndim:
        raise DimensionError(what, array.shape, f"{ndim} axes")
    if not np.isfinite(array).all():
        raise NonFiniteError(what)
    return array


@dataclass(slots=True)
class ReplayEntry:
    """One experience: what was decided, on which features, and how the user took it.

    The first six fields are the specification's. The rest is what full learning needs; an entry without
    them still teaches the confidence estimator and the strategy selector's last layers.

    D is the text dimension, S the situation dimension, F the number of metadata features, N the number of
    candidate memories that were logged, K the number retrieved.
    """

    situation_emb: FloatArray
    """(S,) what the situation looked like to the weights version that decided."""
    memory_indices: list[int]
    """(K,) which memories were retrieved, best first; rows of `memory_embs` where that is given."""
    memory_scores: list[float]
    """(K,) how relevant they scored."""
    strategy_id: str
    confidence: float
    """Predicted probability in [0, 1] that the user will be content."""
    reward: float
    """Aggregated feedback in [-1, 1]."""

    id: str = ""
    """The interaction's id; a second entry with the same id amends the first in place."""
    revision: int = 1
    """How many distinct replies stand behind `reward`; the higher revision of an id wins."""
    occurred_at: float = 0.0
    """Unix seconds of the interaction (not of the reply): the place in the buffer."""
    reward_confidence: float = 1.0
    """[0, 1] how sure the reader is of `reward`; weighs the sample."""
    message_emb: FloatArray | None = None
    """(D,)"""
    history_emb: FloatArray | None = None
    """(D,)"""
    metadata: FloatArray | None = None
    """(F,) metadata features as the Situation Encoder saw them."""
    memory_embs: FloatArray | None = None
    """(N, D) the retrieved memories and some that were passed over."""
    propensity: float | None = None
    """(0, 1] probability with which the strategy was chosen."""
    memory_propensities: list[float] = field(default_factory=list)
    """(K,) probability with which each retrieved memory entered the slate; empty when not logged."""
    context: list[float] = field(default_factory=list)
    """(7,) the context summary that the Confidence Estimator saw; empty when not logged."""
    weights_version: int = 0
    """Version of the weights that decided."""
    text: str = ""
    """The user's message; kept only where storing raw text was asked for."""

    def __post_init__(self) -> None:
        self.situation_emb = as_float32(self.situation_emb, "situation_emb", 1)
        for name, ndim in (("message_emb", 1), ("history_emb", 1), ("metadata", 1), ("memory_embs", 2)):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, as_float32(value, name, ndim))
        self.memory_indices = [int(i) for i in self.memory_indices]
        self.memory_scores = [float(s) for s in self.memory_scores]
        if len(self.memory_indices) != len(self.memory_scores):
            raise DimensionError("memory_scores", len(self.memory_scores), len(self.memory_indices))
        if self.memory_propensities and len(self.memory_propensities) != len(self.memory_indices):
            raise DimensionError(
                "memory_propensities", len(self.memory_propensities), len(self.memory_indices)
            )
        if self.memory_embs is not None and any(
            not 0 <= i < len(self.memory_embs) for i in self.memory_indices
        ):
            raise InputError(
                f"memory_indices {self.memory_indices} point outside memory_embs with {len(self.memory_embs)} rows"
            )
        numbers = [
            self.confidence,
            self.reward,
            self.reward_confidence,
            self.occurred_at,
            *self.memory_scores,
        ]
        if not all(math.isfinite(x) for x in numbers):
            raise NonFiniteError(f"replay entry {self.id or '(without id)'}")
        if not -1.0 <= self.reward <= 1.0:
            raise InputError(f"reward is {self.reward}, wanted a number in [-1, 1]")
        if self.propensity is not None and not 0.0 < self.propensity <= 1.0:
            raise InputError(f"propensity is {self.propensity}, wanted a number in (0, 1]")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; arrays as base64 of little-endian float32 with their shape."""
        out: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            out[name] = _pack(value) if isinstance(value, np.ndarray) else value
        return out

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ReplayEntry:
        """The inverse of `to_json`. Unknown fields are ignored: a newer writer may know more.

        Raises:
            InputError: a field is missing or unusable.
        """
        known = {k: _unpack(v) for k, v in data.items() if k in cls.__dataclass_fields__}
        try:
            return cls(**known)
        except TypeError as error:
            raise InputError(f"a replay entry cannot be read: {error}") from error


def _pack(array: FloatArray) -> dict[str, Any]:
    return {"shape": list(array.shape), "f32": base64.b64encode(array.astype("<f4").tobytes()).decode()}


def _unpack(value: Any) -> Any:
    if isinstance(value, dict) and "f32" in value:
        return np.frombuffer(base64.b64decode(value["f32"]), dtype="<f4").reshape(value["shape"]).copy()
    return value


class ReplayStore(Protocol):
    """The port a trainer draws from. Order is by (`occurred_at`, `id`): recent means late in that order.

    for entry in arriving:
        store.add(entry)
        batch = store.sample(16)
    """

    capacity: int

    def add(self, entry: ReplayEntry) -> bool:
        """Insert, or amend in place where the id is known and `entry.revision` is higher.

        Returns whether anything changed. Over capacity the entry that comes first in order leaves.
        """

    def sample(self, n: int, prioritize_recent: bool = True) -> list[ReplayEntry]:
        """Up to `n` distinct entries, weighted to recent ones; fewer when fewer are stored."""

    def get(self, entry_id: str) -> ReplayEntry | None:
        """The entry with this id, or None."""

    def entries(self) -> Iterator[ReplayEntry]:
        """Every entry in order."""

    def extend(self, entries: Iterable[ReplayEntry]) -> int:
        """Add many; returns how many changed anything."""

    def __len__(self) -> int: ...
