"""Experience replay: entries, the interface of a replay store, and a store in a file.

`ReplayEntry` is one experience. `ReplayStore` is the interface that the trainer samples from, with two
implementations: `ReplayBuffer` stores JSON lines in a file, `streams.replay_store.RedisReplayBuffer` stores
entries in Redis. Does not import torch, which the joiner must not load.
"""

from __future__ import annotations

import base64
import json
import logging
import math
import os
import threading
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cortex_core.arrays import FloatArray, as_float32
from cortex_core.errors import ConfigError, DimensionError, InputError, NonFiniteError
from cortex_core.recency import RecencySampler

log = logging.getLogger(__name__)


@dataclass(slots=True)
class ReplayEntry:
    """One experience: a decision, its features and the reward.

    The first six fields are the specification's. The others are needed to train all components; without them
    an entry trains only the strategy selector and the confidence estimator.

    D is the text dimension, S the situation dimension, F the number of metadata features, N the number of
    logged candidate memories, K the number retrieved.
    """

    situation_emb: FloatArray
    """(S,) situation, as computed by the weights version that decided."""
    memory_indices: list[int]
    """(K,) retrieved memories, best first; rows of `memory_embs` if that is given."""
    memory_scores: list[float]
    """(K,) relevance scores of the retrieved memories."""
    strategy_id: str
    confidence: float
    """Predicted probability of a satisfied user, in [0, 1]."""
    reward: float
    """Aggregated feedback in [-1, 1]."""

    id: str = ""
    """The interaction id; a second entry with the same id amends the first in place."""
    revision: int = 1
    """Number of distinct replies behind `reward`; a higher revision replaces a lower one."""
    occurred_at: float = 0.0
    """Unix seconds of the interaction (not of the reply); determines the position in the buffer."""
    reward_confidence: float = 1.0
    """Confidence in `reward`, in [0, 1]; the sample weight is its square."""
    message_emb: FloatArray | None = None
    """(D,)"""
    history_emb: FloatArray | None = None
    """(D,)"""
    metadata: FloatArray | None = None
    """(F,) metadata features, as input to the Situation Encoder."""
    memory_embs: FloatArray | None = None
    """(N, D) the retrieved memories and some that were not retrieved."""
    propensity: float | None = None
    """Probability of the chosen strategy, in (0, 1]."""
    memory_propensities: list[float] = field(default_factory=list)
    """(K,) probability of each retrieved memory in its slot; empty if not logged."""
    context: list[float] = field(default_factory=list)
    """(7,) context summary, as input to the Confidence Estimator; empty if not logged."""
    weights_version: int = 0
    """Version of the weights that decided."""
    text: str = ""
    """The user's message; empty unless storing raw text is enabled."""
    encoder: str = ""
    """Name of the text encoder of the embeddings; empty if not logged."""

    def __post_init__(self) -> None:
        self.situation_emb = as_float32(self.situation_emb, "situation_emb", 1)
        for name, ndim in (("message_emb", 1), ("history_emb", 1), ("metadata", 1), ("memory_embs", 2)):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, as_float32(value, name, ndim))
        self.confidence, self.reward = float(self.confidence), float(self.reward)
        self.reward_confidence, self.occurred_at = float(self.reward_confidence), float(self.occurred_at)
        self.memory_indices = [int(i) for i in self.memory_indices]
        self.memory_scores = [float(s) for s in self.memory_scores]
        self.memory_propensities = [float(p) for p in self.memory_propensities]
        self.context = [float(x) for x in self.context]
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
                f"memory_indices {self.memory_indices} are out of range for {len(self.memory_embs)} memories"
            )
        numbers = [
            self.confidence,
            self.reward,
            self.reward_confidence,
            self.occurred_at,
            *self.memory_scores,
            *self.memory_propensities,
            *self.context,
        ]
        if not all(math.isfinite(x) for x in numbers):
            raise NonFiniteError(f"replay entry {self.id or '(without id)'}")
        if not -1.0 <= self.reward <= 1.0:
            raise InputError(f"reward is {self.reward}, expected a number in [-1, 1]")
        if self.propensity is not None and not 0.0 < self.propensity <= 1.0:
            raise InputError(f"propensity is {self.propensity}, expected a number in (0, 1]")

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; arrays as base64 of little-endian float32, with their shape."""
        out: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            out[name] = _pack(value) if isinstance(value, np.ndarray) else value
        return out

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ReplayEntry:
        """The inverse of `to_json`. Ignores unknown fields, which a newer version may write.

        Raises:
            InputError: a field is missing or invalid.
        """
        try:
            return cls(**{k: _unpack(v) for k, v in data.items() if k in cls.__dataclass_fields__})
        except InputError:
            raise
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise InputError(f"invalid replay entry: {type(error).__name__}: {error}") from error


def _pack(array: FloatArray) -> dict[str, Any]:
    return {"shape": list(array.shape), "f32": base64.b64encode(array.astype("<f4").tobytes()).decode()}


def _unpack(value: Any) -> Any:
    if isinstance(value, dict) and "f32" in value:
        return np.frombuffer(base64.b64decode(value["f32"]), dtype="<f4").reshape(value["shape"]).copy()
    return value


class ReplayStore(Protocol):
    """Interface of a replay store.

        for entry in arriving:
            store.add(entry)
            batch = store.sample(16)

    Entries are ordered by (`occurred_at`, `id`); recent means late in that order.
    """

    capacity: int

    def add(self, entry: ReplayEntry) -> bool:
        """Inserts an entry, or amends it in place if the id exists with a lower revision.

        Returns whether anything changed. Above `capacity` the first entry in order is evicted.
        """

    def sample(self, n: int, prioritize_recent: bool = True) -> list[ReplayEntry]:
        """Up to `n` distinct entries, recency-weighted or uniform; fewer if fewer are stored."""

    def get(self, entry_id: str) -> ReplayEntry | None:
        """The entry with this id, or None."""

    def entries(self) -> Iterator[ReplayEntry]:
        """All entries, in order."""

    def extend(self, entries: Iterable[ReplayEntry]) -> int:
        """Adds entries; returns how many of them changed anything."""

    def __len__(self) -> int: ...


class ReplayBuffer:
    """A `ReplayStore` of one process: in memory, and as JSON lines in a file if `path` is given.

        buffer = ReplayBuffer(capacity=10_000, path="replay.jsonl")
        buffer.add(entry)
        batch = buffer.sample(16)

    Durability: `add` returns after the operating system has the line, so a crash of the process loses
    nothing. With `fsync=True`, at some milliseconds per entry, a crash of the machine loses nothing either. A
    line truncated by a crash is skipped on loading, with a warning; the others are kept.

    Cost: `add` appends one line; the file is compacted when it has more than twice `capacity` lines
    (amortised O(1) lines per add). Memory: about 20 KB per entry with all features.

    Threads may share a buffer. Processes must not share a file.
    """

    def __init__(
        self,
        capacity: int = 10_000,
        path: str | os.PathLike[str] | None = None,
        *,
        rng: np.random.Generator | int | None = None,
        sampler: RecencySampler | None = None,
        fsync: bool = False,
    ) -> None:
        """
        Args:
            capacity: maximum number of entries; above it the first by (`occurred_at`, `id`) is evicted.
            path: the JSONL file, created with its folder if missing; None keeps entries in memory only.
            rng: a generator, or a seed for reproducible samples.
            sampler: weights of recent entries.
            fsync: flush to disk on every add.

        Raises:
            ConfigError: an invalid capacity.
            OSError: the file cannot be read or written.
        """
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
            raise ConfigError(
                f"capacity is {capacity!r}, expected a positive integer; pass the file as path=..."
            )
        self.capacity = capacity
        self.path = None if path is None else Path(path)
        self.sampler = sampler or RecencySampler()
        self._rng = np.random.default_rng(rng)
        self._fsync = fsync
        self._lock = threading.RLock()
        self._by_id: dict[str, ReplayEntry] = {}
        self._order: list[tuple[float, str]] = []
        self._lines = 0
        self._compact_over = max(2 * capacity, _MIN_LINES)
        self._unnamed = 0
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._load(self.path)

    def add(self, entry: ReplayEntry) -> bool:
        """Inserts or amends `entry`; an entry without an id gets a sequential one.

        Returns False if nothing changed: the revision is not higher, or the buffer is full of later entries.

        Raises:
            OSError: the file cannot be written; the buffer is unchanged.
        """
        return self.extend((entry,)) == 1

    def extend(self, entries: Iterable[ReplayEntry]) -> int:
        """Adds entries; returns how many changed anything. Entries before one that raises are kept."""
        changed = 0
        with self._lock:
            for entry in entries:
                named = entry if entry.id else replace(entry, id=f"{_LOCAL}{self._unnamed:012d}")
                if not self._changes(named):
                    continue
                if self.path is not None:
                    self._append(self.path, named)
                self._place(named)
                changed += 1
            if self.path is not None and self._lines > self._compact_over:
                try:
                    self._compact(self.path)
                except OSError as error:
                    log.warning("cannot compact %s, the file keeps growing: %s", self.path, error)
                    self._compact_over = self._lines + self.capacity
        return changed

    def sample(self, n: int, prioritize_recent: bool = True) -> list[ReplayEntry]:
        """Up to `n` distinct entries, recency-weighted (see `RecencySampler`) or uniform."""
        with self._lock:
            size = len(self._order)
            sampler = self.sampler if prioritize_recent else RecencySampler(floor=1.0)
            return [self._by_id[self._order[i][1]] for i in sampler.draw(size, n, self._rng)]

    def get(self, entry_id: str) -> ReplayEntry | None:
        """The entry with this id, or None."""
        with self._lock:
            return self._by_id.get(entry_id)

    def entries(self) -> Iterator[ReplayEntry]:
        """All entries, earliest first; a snapshot at the time of the call."""
        with self._lock:
            return iter([self._by_id[entry_id] for _, entry_id in self._order])

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[ReplayEntry]:
        return self.entries()

    def _changes(self, entry: ReplayEntry) -> bool:
        known = self._by_id.get(entry.id)
        if known is not None:
            return entry.revision > known.revision
        return len(self._order) < self.capacity or (entry.occurred_at, entry.id) > self._order[0]

    def _place(self, entry: ReplayEntry) -> None:
        known = self._by_id.get(entry.id)
        if known is not None:
            del self._order[bisect_left(self._order, (known.occurred_at, known.id))]
        insort(self._order, (entry.occurred_at, entry.id))
        self._by_id[entry.id] = entry
        if entry.id.startswith(_LOCAL) and entry.id[len(_LOCAL) :].isdecimal():
            self._unnamed = max(self._unnamed, int(entry.id[len(_LOCAL) :]) + 1)
        while len(self._order) > self.capacity:
            del self._by_id[self._order.pop(0)[1]]

    def _append(self, path: Path, entry: ReplayEntry) -> None:
        line = _line(entry)
        with path.open("ab", buffering=0) as file:
            start = file.seek(0, os.SEEK_END)
            try:
                view = memoryview(line)
                while view:
                    view = view[file.write(view) :]
                if self._fsync:
                    os.fsync(file.fileno())
            except OSError:
                file.truncate(start)  # a partial line would corrupt the next one
                raise
        self._lines += 1

    def _load(self, path: Path) -> None:
        torn_at: int | None = None
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                whole = line.endswith(b"\n")
                try:
                    entry = ReplayEntry.from_json(json.loads(line))
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    cause = "invalid" if whole else "truncated, probably by a crash during the write,"
                    log.warning("%s line %d is %s and is skipped: %s", path, number, cause, error)
                    if not whole:
                        torn_at = file.tell() - len(line)
                    continue
                self._lines += 1
                if self._changes(entry):
                    self._place(entry)
                if not whole:  # only the newline is missing
                    torn_at = -1
        if torn_at == -1:
            with path.open("ab") as file:
                file.write(b"\n")
        elif torn_at is not None:
            os.truncate(path, torn_at)

    def _compact(self, path: Path) -> None:
        """Rewrites the file with only the stored entries; a crash leaves the old file or the new one."""
        partial = path.with_name(path.name + ".compacting")
        with partial.open("wb") as file:
            for entry in self.entries():
                file.write(_line(entry))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        self._lines = len(self._order)
        self._compact_over = max(2 * self.capacity, _MIN_LINES)


_LOCAL = "local-"
"""Prefix of the ids of entries that were added without an id."""
_MIN_LINES = 64
"""Files with fewer lines are not compacted."""


def _line(entry: ReplayEntry) -> bytes:
    return json.dumps(entry.to_json(), ensure_ascii=False, allow_nan=False).encode() + b"\n"
