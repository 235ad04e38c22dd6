"""MemoryBank: an agent's memories in SQLite, with embeddings, access counts and strengths.

It does not encode text and does not learn relevance: the caller passes embeddings and, optionally, a Memory
Gate. Maintenance has three calls: `decay`, `consolidate`, `prune`.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cortex_core.arrays import FloatArray, as_float32, unit
from cortex_core.errors import ConfigError, DimensionError, InputError

DAY_S = 86_400.0
_BLOCK = 1024
"""Rows per block of the similarity matrix: 1024 x 10,000 float32 take 40 MB."""


class Gate(Protocol):
    """Scores memories for a situation, e.g. `MemoryGate`."""

    def score_memories(self, situation: Any, memories: Any) -> Any:
        """(N,) scores for an (S,) situation and (N, D) memories."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredMemory:
    """A stored text."""

    id: str
    text: str
    embedding: FloatArray
    """(D,) as passed to `add`."""
    importance: float
    """Positive; the strength at the last retrieval."""
    strength: float
    """`importance` after `decay`."""
    access_count: int
    """Number of retrievals."""
    created_at: float
    """Unix seconds."""
    last_access: float
    """Unix seconds of the last retrieval, initially of the creation."""
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Recall:
    """A retrieved memory and its score."""

    memory: StoredMemory
    score: float


class MemoryBank:
    """The memories of one agent, in a SQLite file or in memory.

        bank = MemoryBank("memories.db")
        bank.add("Deploys go through staging first", embedding)
        for recall in bank.retrieve(query_embedding, k=3):
            print(recall.score, recall.memory.text)
        bank.decay(); bank.consolidate(); bank.prune()

    Threads may share a bank: calls are serialised. Processes may share a file (SQLite write-ahead log); each
    sees the others' changes at its next call. Retrieval keeps all embeddings in memory (1.5 KB each
    at D = 384).
    """

    def __init__(
        self,
        path: str | os.PathLike[str] = ":memory:",
        dim: int = 384,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            path: the file, created with its folder if missing; ":memory:" stores nothing on disk.
            dim: D, dimension of every embedding.
            clock: returns Unix seconds; used if `now` is not passed.

        Raises:
            ConfigError: an invalid dimension, or a file with embeddings of a different dimension.
        """
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise ConfigError(f"dim is {dim!r}, expected a positive integer")
        self.dim = dim
        self.clock = clock
        self._lock = threading.RLock()
        if str(path) != ":memory:":
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=30.0)
        self._close = weakref.finalize(self, self._db.close)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.create_function("retention", 4, retention, deterministic=True)
        self._db.executescript(
            """
            CREATE TABLE IF NOT EXISTS memories (
                id TEXT PRIMARY KEY, text TEXT NOT NULL, embedding BLOB NOT NULL, importance REAL NOT NULL,
                strength REAL NOT NULL, access_count INTEGER NOT NULL DEFAULT 0, created_at REAL NOT NULL,
                last_access REAL NOT NULL, metadata TEXT NOT NULL DEFAULT '{}'
            );
            CREATE INDEX IF NOT EXISTS by_strength ON memories (strength);
            CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
            """
        )
        self._db.execute("INSERT OR IGNORE INTO settings VALUES ('dim', ?)", (str(dim),))
        (stored,) = self._db.execute("SELECT value FROM settings WHERE name = 'dim'").fetchone()
        if int(stored) != dim:
            self.close()
            raise ConfigError(f"{path} contains embeddings of {stored} dimensions, but dim is {dim}")
        self._cache: tuple[list[str], FloatArray, FloatArray] | None = None
        self._seen_version = -1

    def close(self) -> None:
        """Closes the file; the bank cannot be used afterwards."""
        self._close()

    def __enter__(self) -> MemoryBank:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        with self._lock:
            return int(self._db.execute("SELECT count(*) FROM memories").fetchone()[0])

    def add(
        self,
        text: str,
        embedding: Any,
        *,
        importance: float = 1.0,
        metadata: dict[str, Any] | None = None,
        memory_id: str | None = None,
        now: float | None = None,
    ) -> str:
        """Stores `text` and returns its id. An existing id is replaced.

        Raises:
            DimensionError, NonFiniteError: an invalid embedding.
            InputError: an importance that is not positive and finite, or metadata that is not JSON.
        """
        vector = self._vector(embedding, "embedding")
        if not (math.isfinite(importance) and importance > 0):
            raise InputError(f"importance is {importance}, expected a positive number")
        try:
            extra = json.dumps(metadata or {}, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"metadata cannot be stored as JSON: {error}") from error
        at = self.clock() if now is None else now
        new_id = memory_id or uuid.uuid4().hex
        with self._lock:
            self._db.execute(
                "INSERT OR REPLACE INTO memories VALUES (?, ?, ?, ?, ?, 0, ?, ?, ?)",
                (new_id, text, vector.astype("<f4").tobytes(), importance, importance, at, at, extra),
            )
            self._cache = None
        return new_id

    def get(self, memory_id: str) -> StoredMemory | None:
        """The memory with this id, or None. Does not change the access count."""
        with self._lock:
            row = self._db.execute(f"SELECT {_COLUMNS} FROM memories WHERE id = ?", (memory_id,)).fetchone()
        return None if row is None else _memory(row)

    def remove(self, memory_id: str) -> bool:
        """Deletes one memory; returns whether it existed."""
        with self._lock:
            self._cache = None
            return self._db.execute("DELETE FROM memories WHERE id = ?", (memory_id,)).rowcount > 0

    def all(self) -> list[StoredMemory]:
        """All memories, oldest first."""
        with self._lock:
            rows = self._db.execute(f"SELECT {_COLUMNS} FROM memories ORDER BY created_at, id").fetchall()
        return [_memory(row) for row in rows]

    def retrieve(
        self, query: Any, k: int = 5, *, gate: Gate | None = None, now: float | None = None
    ) -> list[Recall]:
        """The `k` best memories for `query`, best first; counts each as retrieved at `now`.

        Args:
            query: (D,) embedding, or (S,) situation if a gate is given.
            k: maximum number of memories.
            gate: scores the memories; without a gate the score is the cosine similarity.

        Raises:
            InputError: `k` is negative.
            DimensionError, NonFiniteError: an invalid query, or an invalid result of the gate.
        """
        if k < 0:
            raise InputError(f"k is {k}, expected 0 or more")
        at = self.clock() if now is None else now
        with self._lock:
            ids, matrix, norms = self._matrix()
            vector = as_float32(query, "query", 1) if gate is not None else self._vector(query, "query")
            if not ids or k == 0:
                return []
            scores = matrix @ unit(vector) / norms if gate is None else _gated(gate, vector, matrix)
            top = np.argsort(-scores, kind="stable")[:k]
            chosen = [ids[i] for i in top]
            marks = ",".join("?" * len(chosen))
            self._db.execute(
                f"UPDATE memories SET access_count = access_count + 1, last_access = max(last_access, ?), "
                f"strength = importance WHERE id IN ({marks})",
                (at, *chosen),
            )
            rows = self._db.execute(
                f"SELECT {_COLUMNS} FROM memories WHERE id IN ({marks})", chosen
            ).fetchall()
        found = {row[0]: _memory(row) for row in rows}
        return [Recall(found[ids[i]], float(scores[i])) for i in top]

    def decay(self, now: float | None = None, *, half_life_s: float = 30 * DAY_S) -> int:
        """Recomputes every strength; returns the number of memories.

            strength = importance * 2 ** (-(now - last_access) / (half_life_s * (1 + access_count)))

        The forgetting curve of Zhong et al. (2023, "MemoryBank", eq. 1) with base 2: each retrieval restarts
        it and adds `half_life_s` to its half-life. Idempotent for the same `now`.
        """
        if not (math.isfinite(half_life_s) and half_life_s > 0):
            raise InputError(f"half_life_s is {half_life_s}, expected a positive number of seconds")
        at = self.clock() if now is None else now
        with self._lock:
            return self._db.execute(
                "UPDATE memories SET strength = importance * retention(?, last_access, access_count, ?)",
                (at, half_life_s),
            ).rowcount

    def consolidate(self, threshold: float = 0.95) -> dict[str, str]:
        """Merges near-duplicates; returns a map from the id of each deleted memory to that of its leader.

        Leaders are chosen by strength, access count and recency. Each leader absorbs the memories within
        cosine `threshold` of itself, so that chains of small steps do not merge dissimilar memories. The
        leader keeps its text, id and embedding, and gets the highest importance, the sum of the access
        counts, the earliest creation and the latest access.

        Cost: blocked matrix products, about 2 s for 10,000 memories of 384 dimensions on one core.
        """
        if not 0.0 < threshold <= 1.0:
            raise InputError(f"threshold is {threshold}, expected a cosine in (0, 1]")
        with self._lock:
            memories = self.all()
            memories.sort(key=lambda m: (-m.strength, -m.access_count, -m.last_access, m.id))
            if len(memories) < 2:
                return {}
            leader_of = _leaders(np.stack([m.embedding for m in memories]), threshold)
            groups: dict[int, list[StoredMemory]] = {}
            for i, leader in enumerate(leader_of.tolist()):
                groups.setdefault(leader, []).append(memories[i])
            merged: dict[str, str] = {}
            self._db.execute("BEGIN IMMEDIATE")
            try:
                for leader, group in groups.items():
                    if len(group) == 1:
                        continue
                    kept = memories[leader]
                    merged |= {m.id: kept.id for m in group if m.id != kept.id}
                    self._db.execute(
                        "UPDATE memories SET importance = ?, strength = ?, access_count = ?, created_at = ?, "
                        "last_access = ? WHERE id = ?",
                        (
                            max(m.importance for m in group),
                            max(m.strength for m in group),
                            sum(m.access_count for m in group),
                            min(m.created_at for m in group),
                            max(m.last_access for m in group),
                            kept.id,
                        ),
                    )
                self._db.executemany("DELETE FROM memories WHERE id = ?", [(deleted,) for deleted in merged])
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
            self._cache = None
        return merged

    def prune(self, min_strength: float = 0.05, *, max_memories: int | None = None) -> int:
        """Deletes memories weaker than `min_strength` (as of the last `decay`), then the weakest ones above
        `max_memories`; returns the number deleted."""
        if max_memories is not None and max_memories < 0:
            raise InputError(f"max_memories is {max_memories}, expected 0 or more")
        with self._lock:
            deleted = self._db.execute("DELETE FROM memories WHERE strength < ?", (min_strength,)).rowcount
            if max_memories is not None:
                deleted += self._db.execute(
                    "DELETE FROM memories WHERE id IN (SELECT id FROM memories "
                    "ORDER BY strength DESC, last_access DESC, id LIMIT -1 OFFSET ?)",
                    (max_memories,),
                ).rowcount
            self._cache = None
        return deleted

    def _vector(self, value: Any, what: str) -> FloatArray:
        vector = as_float32(value, what, 1)
        if vector.shape != (self.dim,):
            raise DimensionError(what, vector.shape, (self.dim,), "The bank was created with this dimension.")
        if not vector.any():
            raise InputError(f"{what} is all zeros, expected a vector with a direction")
        return vector

    def _matrix(self) -> tuple[list[str], FloatArray, FloatArray]:
        """All ids, embeddings and norms; reloaded only after a change by any process."""
        (version,) = self._db.execute("PRAGMA data_version").fetchone()
        if self._cache is None or version != self._seen_version:
            rows = self._db.execute("SELECT id, embedding FROM memories ORDER BY created_at, id").fetchall()
            flat = np.frombuffer(b"".join(row[1] for row in rows), dtype="<f4")
            matrix = flat.reshape(len(rows), self.dim).astype(np.float32)
            self._cache = ([row[0] for row in rows], matrix, np.linalg.norm(matrix, axis=1))
            self._seen_version = version
        return self._cache


_COLUMNS = "id, text, embedding, importance, strength, access_count, created_at, last_access, metadata"


def retention(now: float, last_access: float, access_count: int, half_life_s: float) -> float:
    """[0, 1] fraction retained since the last access; 1 if the clock went backwards."""
    return float(2.0 ** (-max(now - last_access, 0.0) / (half_life_s * (1 + access_count))))


def _memory(row: tuple[Any, ...]) -> StoredMemory:
    return StoredMemory(
        id=row[0],
        text=row[1],
        embedding=np.frombuffer(row[2], dtype="<f4").astype(np.float32),
        importance=row[3],
        strength=row[4],
        access_count=row[5],
        created_at=row[6],
        last_access=row[7],
        metadata=json.loads(row[8]),
    )


def _gated(gate: Gate, situation: FloatArray, memories: FloatArray) -> FloatArray:
    import torch  # noqa: PLC0415 - needed only with a gate, which is a torch module

    with torch.no_grad():
        scores = gate.score_memories(torch.from_numpy(situation), torch.from_numpy(memories))
    array = as_float32(scores, "the gate's scores", 1)
    if array.shape != (len(memories),):
        raise DimensionError("the gate's scores", array.shape, (len(memories),))
    return array


def _leaders(embeddings: FloatArray, threshold: float) -> np.ndarray[Any, np.dtype[np.intp]]:
    """(N,) index of each row's leader: the earliest leader within `threshold`, or the row itself."""
    rows = unit(embeddings)
    n = len(rows)
    leader = np.full(n, -1, dtype=np.intp)
    for start in range(0, n, _BLOCK):
        block = np.arange(start, min(start + _BLOCK, n))
        block = block[leader[block] < 0]
        if not len(block):
            continue
        close = rows[block] @ rows[start:].T >= threshold - 1e-6
        for i, row in enumerate(block):
            if leader[row] < 0:
                members = start + np.flatnonzero(close[i])
                leader[members[leader[members] < 0]] = row
                leader[row] = row
    return leader
