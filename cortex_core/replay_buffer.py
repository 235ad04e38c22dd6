"""Replay: what the learner remembers of past interactions, and how it draws from them.

`ReplayEntry` is one experience. `ReplayStore` is the port that the trainer draws from: `ReplayBuffer`
here keeps it as JSON lines in a file, `streams.replay_store.RedisReplayBuffer` in Redis; one contract
suite runs on both. Nothing here imports torch: the joiner writes entries and stays small.
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
        self.confidence, self.reward = float(self.confidence), float(self.reward)
        self.reward_confidence, self.occurred_at = float(self.reward_confidence), float(self.occurred_at)
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
                f"memory_indices {self.memory_indices} point outside the {len(self.memory_embs)} memory_embs"
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


class ReplayBuffer:
    """The `ReplayStore` of one process: in memory, and as JSON lines in a file when `path` is given.

        buffer = ReplayBuffer(capacity=10_000, path="replay.jsonl")
        buffer.add(entry)
        batch = buffer.sample(16)

    Durability: `add` returns after its line is with the operating system, so the death of this process
    loses nothing; `fsync=True` also survives the death of the machine, at some milliseconds an entry.
    A line cut short by a crash costs that line only; loading logs a warning that names it.

    Cost: `add` appends one line and never rewrites the file, which is compacted when it holds more than
    twice `capacity` lines (amortised O(1) lines per add). Memory: about 20 KB an entry with all features.

    Threads may share one buffer. Two processes may not write the same file.
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
            capacity: most entries kept; over it the earliest by (`occurred_at`, `id`) leaves.
            path: the JSONL file, made with its folder when missing; None keeps entries in memory only.
            rng: a generator or a seed, for repeatable samples.
            sampler: how recent entries are preferred.
            fsync: flush to the disk on every add.

        Raises:
            ConfigError: an unusable capacity.
            OSError: the file cannot be read or written.
        """
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 1:
            raise ConfigError(
                f"capacity is {capacity!r}, wanted a positive integer; the file is given as path=..."
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
        """Insert or amend `entry`; an entry without an id is given one in the order of adding.

        Returns False when nothing changed: its revision is known, or the buffer is full of later ones.

        Raises:
            OSError: the file took no more; the buffer is as before.
        """
        return self.extend((entry,)) == 1

    def extend(self, entries: Iterable[ReplayEntry]) -> int:
        """Add many; returns how many changed anything. Entries before one that raises are kept."""
        changed = 0
        with self._lock:
            for entry in entries:
                named = entry if entry.id else replace(entry, id=f"{_LOCAL}{self._unnamed:012d}")
                if not self._is_news(named):
                    continue
                if self.path is not None:
                    self._append(self.path, named)
                self._place(named)
                changed += 1
            if self.path is not None and self._lines > self._compact_over:
                try:
                    self._compact(self.path)
                except OSError as error:
                    log.warning("%s is not compacted, and grows until it is: %s", self.path, error)
                    self._compact_over = self._lines + self.capacity
        return changed

    def sample(self, n: int, prioritize_recent: bool = True) -> list[ReplayEntry]:
        """Up to `n` distinct entries; recent ones oftener (see `RecencySampler`), or uniformly."""
        with self._lock:
            size = len(self._order)
            sampler = self.sampler if prioritize_recent else RecencySampler(floor=1.0)
            return [self._by_id[self._order[i][1]] for i in sampler.draw(size, n, self._rng)]

    def get(self, entry_id: str) -> ReplayEntry | None:
        """The entry with this id, or None."""
        with self._lock:
            return self._by_id.get(entry_id)

    def entries(self) -> Iterator[ReplayEntry]:
        """Every entry, earliest first, as they stood at the call."""
        with self._lock:
            return iter([self._by_id[entry_id] for _, entry_id in self._order])

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[ReplayEntry]:
        return self.entries()

    def _is_news(self, entry: ReplayEntry) -> bool:
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
                file.truncate(start)  # half a line would swallow the next one
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
                    cause = "unreadable" if whole else "cut short, as by a crash while it was written"
                    log.warning("%s line %d is %s and is passed over: %s", path, number, cause, error)
                    if not whole:
                        torn_at = file.tell() - len(line)
                    continue
                self._lines += 1
                if self._is_news(entry):
                    self._place(entry)
                if not whole:  # all but the newline arrived
                    torn_at = -1
        if torn_at == -1:
            with path.open("ab") as file:
                file.write(b"\n")
        elif torn_at is not None:
            os.truncate(path, torn_at)

    def _compact(self, path: Path) -> None:
        """Rewrites the file with the stored entries alone; a crash leaves the old file or the new one."""
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
"""Begins the ids of entries that came without one."""
_MIN_LINES = 64
"""A file of fewer lines is not worth compacting."""


def _line(entry: ReplayEntry) -> bytes:
    return json.dumps(entry.to_json(), ensure_ascii=False, allow_nan=False).encode() + b"\n"
