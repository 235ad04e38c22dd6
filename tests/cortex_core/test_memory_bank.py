"""The memory bank: recall, forgetting, merging, and what it refuses."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex_core.arrays import FloatArray
from cortex_core.errors import ConfigError, DimensionError, InputError, NonFiniteError
from cortex_core.memory_bank import DAY_S, MemoryBank

D = 8


def axis(i: int, lean: float = 0.0, to: int = 0) -> FloatArray:
    vector = np.zeros(D, np.float32)
    vector[i] = 1.0
    vector[to] += lean
    return vector


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def bank(clock: Clock) -> Iterator[MemoryBank]:
    with MemoryBank(dim=D, clock=clock) as bank:
        yield bank


def test_what_was_added_comes_back(bank: MemoryBank) -> None:
    new_id = bank.add("staging first", axis(1) * 3, importance=2.0, metadata={"tags": ["deploy"]})
    memory = bank.get(new_id)
    assert memory is not None
    assert (memory.text, memory.importance, memory.strength) == ("staging first", 2.0, 2.0)
    assert (memory.access_count, memory.created_at, memory.last_access) == (0, 1_000.0, 1_000.0)
    assert memory.metadata == {"tags": ["deploy"]}
    np.testing.assert_array_equal(memory.embedding, axis(1) * 3)
    assert len(bank) == 1
    assert bank.get("never seen") is None


def test_retrieval_ranks_by_cosine_and_counts_the_recall(bank: MemoryBank, clock: Clock) -> None:
    for i in range(5):
        bank.add(f"m{i}", axis(i) * (i + 1), memory_id=f"m{i}")  # length must not matter
    clock.now = 2_000.0
    got = bank.retrieve(axis(3) + 0.5 * axis(1), k=2)
    assert [r.memory.id for r in got] == ["m3", "m1"]
    assert [r.score for r in got] == pytest.approx([1 / np.sqrt(1.25), 0.5 / np.sqrt(1.25)])
    assert [(r.memory.access_count, r.memory.last_access) for r in got] == [(1, 2_000.0)] * 2
    untouched = bank.get("m0")
    assert untouched is not None
    assert untouched.access_count == 0
    assert len(bank.retrieve(axis(0), k=50)) == 5
    assert bank.retrieve(axis(0), k=0) == []
    assert MemoryBank(dim=D).retrieve(axis(0)) == []


def test_a_gate_overrules_the_cosine(bank: MemoryBank) -> None:
    import torch

    class Contrary:
        def score_memories(self, situation: torch.Tensor, memories: torch.Tensor) -> torch.Tensor:
            return -(memories @ situation)

    class Miscounting:
        def score_memories(self, situation: torch.Tensor, memories: torch.Tensor) -> torch.Tensor:
            return torch.zeros(1)

    for i in range(3):
        bank.add(f"m{i}", axis(i), memory_id=f"m{i}")
    assert bank.retrieve(axis(0), k=3, gate=Contrary())[-1].memory.id == "m0"
    with pytest.raises(DimensionError, match="the gate's scores"):
        bank.retrieve(axis(0), gate=Miscounting())


def test_changes_show_in_the_next_retrieval(bank: MemoryBank) -> None:
    bank.add("old", axis(0), memory_id="x")
    assert bank.retrieve(axis(0), k=1)[0].memory.text == "old"
    bank.add("new", axis(0), memory_id="x")
    assert [r.memory.text for r in bank.retrieve(axis(0))] == ["new"]
    assert bank.remove("x")
    assert not bank.remove("x")
    assert bank.retrieve(axis(0)) == []


def test_strength_halves_every_half_life_and_recall_slows_it(bank: MemoryBank, clock: Clock) -> None:
    for name in ("idle", "recalled"):
        bank.add(name, axis(len(name) % D), importance=0.8, memory_id=name)
    bank.retrieve(axis(len("recalled") % D), k=1)
    clock.now += 30 * DAY_S
    assert bank.decay() == 2
    strengths = {m.id: m.strength for m in bank.all()}
    assert strengths == pytest.approx({"idle": 0.4, "recalled": 0.8 / 2**0.5})
    bank.decay()
    assert {m.id: m.strength for m in bank.all()} == strengths  # the same time again
    bank.retrieve(axis(len("idle") % D), k=1)
    idle = bank.get("idle")
    assert idle is not None
    assert idle.strength == pytest.approx(0.8)  # recall starts the curve afresh


@given(st.lists(st.floats(0, 400 * DAY_S), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_decay_depends_on_the_time_alone_not_on_how_often_it_is_called(times: list[float]) -> None:
    with MemoryBank(dim=D, clock=lambda: 0.0) as often, MemoryBank(dim=D, clock=lambda: 0.0) as once:
        for bank in (often, once):
            bank.add("x", axis(0), memory_id="x")
        previous = 1.0
        for now in sorted(times):
            often.decay(now)
            x = often.get("x")
            assert x is not None
            assert x.strength <= previous
            previous = x.strength
        once.decay(max(times))
        assert previous == pytest.approx(once.all()[0].strength)


def test_a_clock_that_went_back_strengthens_nothing(bank: MemoryBank) -> None:
    bank.add("x", axis(0), memory_id="x", importance=0.5, now=1_000.0)
    bank.decay(now=10.0)
    assert bank.all()[0].strength == 0.5
    bank.retrieve(axis(0), now=10.0)
    assert bank.all()[0].last_access == 1_000.0


def test_prune_forgets_the_weak_and_the_surplus(bank: MemoryBank) -> None:
    for i in range(6):
        bank.add(f"m{i}", axis(i), memory_id=f"m{i}", importance=0.1 * (i + 1))
    assert bank.prune(min_strength=0.25) == 2
    assert bank.prune(min_strength=0.0, max_memories=3) == 1
    assert [m.id for m in bank.all()] == ["m3", "m4", "m5"]
    assert [r.memory.id for r in bank.retrieve(axis(0), k=9)] == ["m3", "m4", "m5"]
    assert bank.prune(min_strength=0.0, max_memories=0) == 3


def test_consolidate_merges_near_duplicates_into_the_strongest(bank: MemoryBank) -> None:
    bank.add("weak twin", axis(0, 0.1, 1), memory_id="weak", importance=0.4, now=1.0)
    bank.add("strong twin", axis(0), memory_id="strong", importance=0.9, now=5.0)
    bank.add("other", axis(3), memory_id="other", now=3.0)
    bank.retrieve(axis(0, 0.1, 1), k=1, now=9.0)
    assert bank.consolidate(0.95) == {"weak": "strong"}
    kept = bank.get("strong")
    assert kept is not None
    assert (kept.text, kept.importance, kept.access_count) == ("strong twin", 0.9, 1)
    assert (kept.created_at, kept.last_access) == (1.0, 9.0)
    assert {m.id for m in bank.all()} == {"strong", "other"}
    assert bank.consolidate(0.95) == {}


def test_a_chain_of_small_steps_does_not_join_what_is_unlike(bank: MemoryBank) -> None:
    angles = np.deg2rad([0, 15, 30, 45, 60])  # neighbours at cosine 0.966, ends at 0.5
    for i, angle in enumerate(angles):
        vector = np.zeros(D, np.float32)
        vector[:2] = np.cos(angle), np.sin(angle)
        bank.add(str(i), vector, memory_id=str(i), importance=1 - 0.1 * i)
    assert bank.consolidate(0.95) == {"1": "0", "3": "2"}


def test_consolidation_agrees_with_the_quadratic_definition_across_blocks() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(400, D)).astype(np.float32)
    points = (centres[rng.integers(0, 400, 2500)] + 0.05 * rng.normal(size=(2500, D))).astype(np.float32)
    with MemoryBank(dim=D, clock=lambda: 0.0) as bank:
        for i, point in enumerate(points):
            bank.add("", point, memory_id=f"{i:05d}")
        merged = bank.consolidate(0.99)
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    similarity = unit @ unit.T
    expected: dict[str, str] = {}
    leaders: list[int] = []
    for i in range(len(points)):
        first = next((j for j in leaders if similarity[i, j] >= 0.99 - 1e-6), None)
        if first is None:
            leaders.append(i)
        else:
            expected[f"{i:05d}"] = f"{first:05d}"
    assert merged == expected
    assert len(merged) > 1000


def test_it_survives_closing_and_is_shared_between_processes_banks(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "memories.db"
    with MemoryBank(path, dim=D) as first:
        first.add("kept", axis(2), memory_id="kept")
    with MemoryBank(path, dim=D) as one, MemoryBank(path, dim=D) as other:
        assert [r.memory.text for r in other.retrieve(axis(2))] == ["kept"]
        one.add("from the other side", axis(3), memory_id="new")
        assert other.retrieve(axis(3), k=1)[0].memory.id == "new"
    with pytest.raises(ConfigError, match="contains embeddings of 8 dimensions, but dim is 384"):
        MemoryBank(path)


def test_a_failure_inside_consolidation_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "memories.db"
    with MemoryBank(path, dim=D) as bank:
        bank.add("a", axis(0), memory_id="a")
        bank.add("b", axis(0), memory_id="b", importance=2.0)
        with sqlite3.connect(path) as raw:
            raw.execute(
                "CREATE TRIGGER refuse BEFORE DELETE ON memories BEGIN SELECT raise(ABORT, 'no room'); END"
            )
        raw.close()
        with pytest.raises(sqlite3.DatabaseError, match="no room"):
            bank.consolidate()
        assert {m.id for m in bank.all()} == {"a", "b"}
        bank.add("c", axis(1), memory_id="c")  # and goes on


def test_unusable_input_is_refused_with_what_was_wanted(bank: MemoryBank) -> None:
    with pytest.raises(DimensionError, match=r"embedding has shape \(3,\), expected \(8,\)"):
        bank.add("x", [1, 2, 3])
    with pytest.raises(DimensionError, match="query"):
        bank.retrieve(np.ones(3))
    with pytest.raises(NonFiniteError):
        bank.add("x", [float("nan")] * D)
    with pytest.raises(InputError, match="all zeros"):
        bank.add("x", np.zeros(D))
    with pytest.raises(InputError, match="importance is 0"):
        bank.add("x", axis(0), importance=0)
    with pytest.raises(InputError, match="metadata"):
        bank.add("x", axis(0), metadata={"f": object()})
    with pytest.raises(InputError, match="k is -1"):
        bank.retrieve(axis(0), k=-1)
    with pytest.raises(InputError, match=r"threshold is 1\.5"):
        bank.consolidate(1.5)
    with pytest.raises(InputError, match="half_life_s is 0"):
        bank.decay(half_life_s=0)
    with pytest.raises(InputError, match="max_memories is -1"):
        bank.prune(max_memories=-1)
    with pytest.raises(ConfigError, match="dim is 0"):
        MemoryBank(dim=0)
    assert len(bank) == 0


def test_threads_share_one_bank(bank: MemoryBank) -> None:
    failures: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            for i in range(25):
                bank.add(f"{thread}-{i}", axis(i % D), memory_id=f"{thread}-{i}")
                bank.retrieve(axis(i % D), k=3)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(bank) == 100
    assert sum(m.access_count for m in bank.all()) >= 4 * 25 * 1
