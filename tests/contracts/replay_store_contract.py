"""What every `ReplayStore` promises: subclass it, give `make_store`, and it runs on that adapter.

class TestReplayBuffer(ReplayStoreContract):
    @pytest.fixture
    def make_store(self):
        return lambda capacity: ReplayBuffer(capacity)
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cortex_core.errors import ConfigError
from cortex_core.replay_buffer import ReplayEntry, ReplayStore

MakeStore = Callable[[int], ReplayStore]


def entry(entry_id: str, occurred_at: float, **changes: Any) -> ReplayEntry:
    """An entry with every feature, small, and different for each id."""
    rng = np.random.default_rng(zlib.crc32(entry_id.encode()))
    fields: dict[str, Any] = {
        "situation_emb": rng.normal(size=4),
        "memory_indices": [2, 0],
        "memory_scores": [0.9, 0.4],
        "strategy_id": "step_by_step",
        "confidence": 0.7,
        "reward": 0.6,
        "id": entry_id,
        "occurred_at": occurred_at,
        "reward_confidence": 0.8,
        "message_emb": rng.normal(size=3),
        "history_emb": rng.normal(size=3),
        "metadata": rng.normal(size=2),
        "memory_embs": rng.normal(size=(3, 3)),
        "propensity": 0.25,
        "memory_propensities": [0.5, 0.125],
        "context": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        "weights_version": 3,
        "text": "Wie geht das? 这样吗",
    }
    return ReplayEntry(**fields | changes)


def same(a: ReplayEntry, b: ReplayEntry, *, atol: float = 2e-3) -> bool:
    """Equal in every field. Arrays within `atol`: a store may keep them as float16."""
    for name in a.to_json():
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
            if x.shape != y.shape or not np.allclose(x, y, atol=atol):
                return False
        elif isinstance(x, list) and isinstance(y, list):
            if len(x) != len(y) or not np.allclose(x, y, atol=1e-6):
                return False
        elif isinstance(x, float) and isinstance(y, float):
            if abs(x - y) > 1e-6:
                return False
        elif x != y:
            return False
    return True


def ids(store: ReplayStore) -> list[str]:
    return [e.id for e in store.entries()]


class ReplayStoreContract:
    """`make_store(capacity)` gives a fresh, empty store at every call."""

    @pytest.fixture
    def make_store(self) -> MakeStore:
        raise NotImplementedError("give the adapter's `make_store` fixture")

    def test_an_entry_comes_back_as_it_was(self, make_store: MakeStore) -> None:
        store = make_store(10)
        full = entry("a", 1_700_000_000.25)
        bare = ReplayEntry(
            np.ones(4, np.float32), [], [], "quick_answer", 0.5, -1.0, id="b", occurred_at=1_700_000_001.0
        )
        assert store.add(full)
        assert store.add(bare)
        got_full, got_bare = store.get("a"), store.get("b")
        assert got_full is not None
        assert same(got_full, full)
        assert got_bare is not None
        assert same(got_bare, bare)
        assert got_bare.message_emb is None
        assert got_bare.propensity is None
        assert store.get("never seen") is None

    def test_an_empty_store(self, make_store: MakeStore) -> None:
        store = make_store(10)
        assert len(store) == 0
        assert store.sample(16) == []
        assert list(store.entries()) == []
        assert store.extend([]) == 0

    def test_order_is_by_time_then_id_and_not_by_arrival(self, make_store: MakeStore) -> None:
        store = make_store(10)
        store.extend([entry("c", 2.0), entry("b", 2.0), entry("z", 1.0), entry("a", 3.0)])
        assert ids(store) == ["z", "b", "c", "a"]

    def test_the_same_entry_twice_changes_nothing(self, make_store: MakeStore) -> None:
        store = make_store(10)
        assert store.add(entry("a", 1.0, reward=0.6))
        assert not store.add(entry("a", 1.0, reward=0.6))
        assert not store.add(entry("a", 1.0, reward=-1.0))
        assert len(store) == 1
        got = store.get("a")
        assert got is not None
        assert got.reward == pytest.approx(0.6)

    def test_a_higher_revision_amends_in_place(self, make_store: MakeStore) -> None:
        store = make_store(10)
        store.extend([entry("a", 1.0), entry("b", 2.0), entry("c", 3.0)])
        assert store.add(entry("a", 1.0, reward=-0.5, revision=3))
        assert not store.add(entry("a", 1.0, reward=0.9, revision=2))
        assert ids(store) == ["a", "b", "c"]
        got = store.get("a")
        assert got is not None
        assert got.revision == 3
        assert got.reward == pytest.approx(-0.5)
        assert [e.reward for e in store.sample(10) if e.id == "a"] == [pytest.approx(-0.5)]

    def test_over_capacity_the_earliest_leaves(self, make_store: MakeStore) -> None:
        store = make_store(3)
        assert store.capacity == 3
        assert store.extend(entry(str(i), float(i)) for i in (4, 2, 5, 3)) == 4
        assert ids(store) == ["3", "4", "5"]
        assert store.get("2") is None
        assert len(store) == 3

    def test_a_full_store_refuses_what_would_leave_at_once(self, make_store: MakeStore) -> None:
        store = make_store(2)
        store.extend([entry("b", 2.0), entry("c", 3.0)])
        assert not store.add(entry("a", 1.0))
        assert ids(store) == ["b", "c"]

    def test_amending_a_full_store_evicts_nobody(self, make_store: MakeStore) -> None:
        store = make_store(2)
        store.extend([entry("a", 1.0), entry("b", 2.0)])
        assert store.add(entry("a", 1.0, revision=2, reward=-1.0))
        assert ids(store) == ["a", "b"]

    def test_samples_are_distinct_and_no_more_than_stored(self, make_store: MakeStore) -> None:
        store = make_store(50)
        store.extend(entry(f"{i:02d}", float(i)) for i in range(20))
        for n in (1, 3, 16, 20, 100):
            for prioritize_recent in (True, False):
                got = [e.id for e in store.sample(n, prioritize_recent)]
                assert len(got) == len(set(got)) == min(n, 20)
        assert store.sample(0) == []

    def test_recent_entries_come_oftener_and_old_ones_are_not_lost(self, make_store: MakeStore) -> None:
        store = make_store(100)
        store.extend(entry(f"{i:02d}", float(i)) for i in range(60))
        drawn = Counter(e.id for _ in range(150) for e in store.sample(6))
        oldest = sum(drawn[f"{i:02d}"] for i in range(15))
        newest = sum(drawn[f"{i:02d}"] for i in range(45, 60))
        assert newest > 1.8 * oldest  # expected ratio 3.7
        assert oldest > 30  # expected 94 of 900
        uniform = Counter(e.id for _ in range(150) for e in store.sample(6, prioritize_recent=False))
        early = sum(uniform[f"{i:02d}"] for i in range(30))
        assert 0.4 < early / uniform.total() < 0.6

    def test_what_is_read_is_not_what_is_stored(self, make_store: MakeStore) -> None:
        store = make_store(5)
        store.extend(entry(str(i), float(i)) for i in range(5))
        for _ in store.entries():  # reading while writing neither fails nor misses
            store.add(entry("9", 9.0))
        assert ids(store) == ["1", "2", "3", "4", "9"]

    @pytest.mark.parametrize("capacity", [0, -1])
    def test_an_unusable_capacity_is_refused(self, make_store: MakeStore, capacity: int) -> None:
        with pytest.raises(ConfigError, match="capacity"):
            make_store(capacity)
