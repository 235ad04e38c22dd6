"""The JSONL replay buffer: the store's contract, its file, its crashes and its draws."""

from __future__ import annotations

import errno
import json
import logging
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex_core.errors import ConfigError, InputError, NonFiniteError
from cortex_core.recency import RecencySampler
from cortex_core.replay_buffer import ReplayBuffer, ReplayEntry
from tests.contracts.replay_store_contract import MakeStore, ReplayStoreContract, entry, ids, same


class TestInMemory(ReplayStoreContract):
    @pytest.fixture
    def make_store(self) -> MakeStore:
        return lambda capacity: ReplayBuffer(capacity, rng=5)


class TestInAFile(ReplayStoreContract):
    @pytest.fixture
    def make_store(self, tmp_path: Path) -> MakeStore:
        made = iter(range(100))
        return lambda capacity: ReplayBuffer(capacity, path=tmp_path / f"{next(made)}.jsonl", rng=5)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "replay.jsonl"


def test_defaults_are_the_specifications() -> None:
    assert ReplayBuffer().capacity == 10_000


def test_what_was_added_is_there_after_opening_again(path: Path) -> None:
    first = ReplayBuffer(3, path=path)
    first.extend([entry("a", 1.0), entry("b", 2.0), entry("c", 3.0), entry("d", 4.0)])
    first.add(entry("c", 3.0, revision=2, reward=-0.75))
    again = ReplayBuffer(3, path=path)
    assert ids(again) == ["b", "c", "d"]
    assert all(same(x, y, atol=0) for x, y in zip(first.entries(), again.entries(), strict=True))


def test_adding_appends_and_leaves_earlier_bytes_alone(path: Path) -> None:
    buffer = ReplayBuffer(100, path=path)
    for i in range(20):
        before = path.read_bytes() if path.exists() else b""
        buffer.add(entry(f"{i:02d}", float(i)))
        after = path.read_bytes()
        assert after.startswith(before)
        assert after.count(b"\n") == i + 1
    assert not buffer.add(entry("03", 3.0))
    assert path.read_bytes() == after  # a repeated entry costs no line


def test_the_file_stays_within_a_small_multiple_of_the_capacity(path: Path) -> None:
    buffer = ReplayBuffer(40, path=path)
    sizes = []
    for i in range(400):
        buffer.add(entry(f"{i:04d}", float(i)))
        sizes.append(path.read_bytes().count(b"\n"))
    assert max(sizes) <= 81
    assert sum(b < a for a, b in pairwise(sizes)) <= 10  # compacted seldom
    assert ids(ReplayBuffer(40, path=path)) == [f"{i:04d}" for i in range(360, 400)]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("keep", [1, 40, -2, -1])
def test_a_torn_last_line_costs_that_line_only_and_says_so(
    path: Path, caplog: pytest.LogCaptureFixture, keep: int
) -> None:
    ReplayBuffer(10, path=path).extend([entry("a", 1.0), entry("b", 2.0), entry("c", 3.0)])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:keep])
    whole = keep == -1  # only the newline is missing: nothing is lost
    with caplog.at_level(logging.WARNING, logger="cortex_core.replay_buffer"):
        again = ReplayBuffer(10, path=path)
    assert ids(again) == (["a", "b", "c"] if whole else ["a", "b"])
    assert [r.getMessage() for r in caplog.records if "line 3 is truncated" in r.getMessage()] == [
        r.getMessage() for r in caplog.records
    ]
    assert len(caplog.records) == (0 if whole else 1)
    again.add(entry("d", 4.0))
    caplog.clear()
    assert ids(ReplayBuffer(10, path=path)) == [*ids(again)]
    assert not caplog.records


def test_a_damaged_line_in_the_middle_costs_that_line_only(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ReplayBuffer(10, path=path).extend(entry(c, float(i)) for i, c in enumerate("abcdef"))
    lines = path.read_bytes().splitlines()
    bad_reward = json.loads(lines[3]) | {"reward": 7}
    lines[1:5] = [b"\x00\xff garbage", b"[1, 2]", json.dumps(bad_reward).encode(), b'{"reward": 0.5}']
    path.write_bytes(b"\n".join(lines) + b"\n")
    assert ids(ReplayBuffer(10, path=path)) == ["a", "f"]
    assert [f"line {n} is invalid" in caplog.text for n in range(1, 7)] == [
        False,
        True,
        True,
        True,
        True,
        False,
    ]


def test_a_full_disk_leaves_buffer_and_file_as_they_were(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = ReplayBuffer(10, path=path, fsync=True)
    buffer.add(entry("a", 1.0))
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("cortex_core.replay_buffer.os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            buffer.add(entry("b", 2.0))
    assert path.read_bytes() == before
    assert ids(buffer) == ["a"]
    assert buffer.add(entry("b", 2.0))
    assert ids(ReplayBuffer(10, path=path)) == ["a", "b"]


def test_compacting_that_fails_leaves_the_old_file_and_says_so(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    buffer = ReplayBuffer(40, path=path)

    def die(*_: object) -> None:
        raise OSError(errno.EIO, "pulled the plug")

    monkeypatch.setattr("cortex_core.replay_buffer.os.fsync", die)
    assert buffer.extend(entry(f"{i:04d}", float(i)) for i in range(100)) == 100
    assert "cannot compact" in caplog.text
    monkeypatch.undo()
    assert ids(ReplayBuffer(40, path=path)) == [f"{i:04d}" for i in range(60, 100)]


def test_entries_without_an_id_keep_the_order_of_adding(path: Path) -> None:
    def nameless(reward: float) -> ReplayEntry:
        return ReplayEntry(np.ones(2, np.float32), [0], [0.5], "quick_answer", 0.5, reward)

    buffer = ReplayBuffer(3, path=path)
    given = nameless(0.1)
    buffer.extend([given, nameless(0.2), nameless(0.3)])
    assert given.id == ""
    again = ReplayBuffer(3, path=path)
    again.add(nameless(0.4))
    assert [e.reward for e in again.entries()] == pytest.approx([0.2, 0.3, 0.4])
    assert len(set(ids(again))) == 3


def test_numbers_of_numpy_are_stored(path: Path) -> None:
    ReplayBuffer(3, path=path).add(
        entry("a", 1.0, confidence=np.float32(0.5), reward=np.float32(0.25), memory_scores=np.array([1, 0]))
    )
    assert [e.reward for e in ReplayBuffer(3, path=path).entries()] == [0.25]


def test_a_seed_repeats_the_samples() -> None:
    def draws(seed: int) -> list[list[str]]:
        buffer = ReplayBuffer(100, rng=seed)
        buffer.extend(entry(str(i), float(i)) for i in range(80))
        return [[e.id for e in buffer.sample(5)] for _ in range(5)]

    assert draws(1) == draws(1) != draws(2)


@pytest.mark.parametrize("capacity", [1.5, True, "replay.jsonl", None])
def test_a_capacity_that_is_no_integer_is_refused(capacity: object) -> None:
    with pytest.raises(ConfigError, match="expected a positive integer"):
        ReplayBuffer(capacity)  # type: ignore[arg-type]  # the wrong type is the test


def test_entries_that_nobody_could_learn_from_are_refused() -> None:
    with pytest.raises(NonFiniteError):
        entry("a", 1.0, situation_emb=[float("nan")])
    with pytest.raises(InputError, match=r"reward is 1.5, expected a number in \[-1, 1\]"):
        entry("a", 1.0, reward=1.5)
    with pytest.raises(InputError, match="missing"):
        ReplayEntry.from_json({"reward": 1.0})


def test_threads_share_one_buffer(path: Path) -> None:
    buffer = ReplayBuffer(1000, path=path)

    def work(name: str) -> None:
        for i in range(40):
            buffer.add(entry(f"{name}{i}", float(i)))
            buffer.sample(4)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(buffer) == 160
    assert ids(ReplayBuffer(1000, path=path)) == ids(buffer)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 5), st.integers(1, 3)), max_size=40),
    st.integers(1, 6),
)
def test_the_file_replays_to_what_was_in_memory(
    tmp_path_factory: pytest.TempPathFactory, adds: list[tuple[str, int, int]], capacity: int
) -> None:
    path = tmp_path_factory.mktemp("replay") / "replay.jsonl"
    buffer = ReplayBuffer(capacity, path=path)
    for name, time, revision in adds:
        buffer.add(entry(name, float(time), revision=revision))
    assert len(buffer) <= capacity
    keys = [(e.occurred_at, e.id) for e in buffer.entries()]
    assert keys == sorted(keys)
    again = ReplayBuffer(capacity, path=path)
    assert [(e.id, e.revision) for e in again.entries()] == [(e.id, e.revision) for e in buffer.entries()]


class TestRecencySampler:
    def test_draws_follow_the_stated_weights_whichever_way_they_are_made(self) -> None:
        """First draws are distributed as w / sum(w), on the fast path and on the exact one."""
        sampler = RecencySampler()
        size = 40
        wanted = sampler.weights(size) / sampler.weights(size).sum()
        for n in (1, 20):  # rejection, exponential keys
            rng = np.random.default_rng(3)
            first = np.bincount([sampler.draw(size, n, rng)[0] for _ in range(20_000)], minlength=size)
            deviation = (first - 20_000 * wanted) ** 2 / (20_000 * wanted)
            assert deviation.sum() < 73.4  # chi-squared, 39 degrees of freedom, p = 0.0007

    def test_both_ways_include_positions_equally_often(self) -> None:
        sampler = RecencySampler()
        rng = np.random.default_rng(3)
        size, n, rounds = 64, 16, 6000  # 4 n = size: the rejecting way; one more: the keyed way
        fast = np.bincount(
            np.concatenate([sampler.draw(size, n, rng) for _ in range(rounds)]), minlength=size
        )
        keyed = np.bincount(
            np.concatenate([sampler.draw(size, n + 1, rng)[:n] for _ in range(rounds)]), minlength=size
        )
        assert np.abs(fast - keyed).max() < 5 * np.sqrt(2 * rounds * 0.25)

    def test_the_newest_weighs_about_six_times_the_oldest(self) -> None:
        for size in (10, 100, 10_000):
            weights = RecencySampler().weights(size)
            assert weights[-1] == pytest.approx(1.0)
            assert 4.5 < weights[-1] / weights[0] < 6.5
            assert (np.diff(weights) > 0).all()

    @given(st.integers(0, 300), st.integers(0, 320), st.integers(0, 99))
    def test_positions_are_distinct_and_inside(self, size: int, n: int, seed: int) -> None:
        got = RecencySampler().draw(size, n, np.random.default_rng(seed)).tolist()
        assert len(got) == len(set(got)) == min(size, n)
        assert all(0 <= i < size for i in got)

    @pytest.mark.parametrize(
        ("half_life", "floor"), [(0.0, 0.1), (-1.0, 0.1), (float("nan"), 0.1), (0.25, 1.5)]
    )
    def test_unusable_settings_are_refused(self, half_life: float, floor: float) -> None:
        with pytest.raises(ConfigError):
            RecencySampler(half_life, floor)
