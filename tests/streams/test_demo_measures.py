"""What the demo measures: means, calibration, latency at the slowest worker, and counting what is lost."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest

from streams.demo import measures
from streams.demo.measures import ExperienceSeen, Sample, Tally, VersionSeen

T0 = datetime(2026, 1, 1, tzinfo=UTC)
TOPIC = "cortex.experiences"


def sample(index: int, reward: float = 0.5, **changes: Any) -> Sample:
    fields: dict[str, Any] = {
        "index": index,
        "reward": reward,
        "satisfied": True,
        "precision": 0.0,
        "control_precision": 0.0,
        "confidence": 0.5,
        "weights_version": 0,
        "control": {"a": 0.1, "b": 0.2},
    }
    return Sample(**fields | changes)


def experience(interaction: str, offset: int = 0, **changes: Any) -> ExperienceSeen:
    fields: dict[str, Any] = {
        "partition": 0,
        "offset": offset,
        "interaction_id": interaction,
        "version": 1,
        "revision": 1,
        "reply_ids": (f"r-{interaction}",),
        "replied_at": T0,
        "digest": f"{interaction}-1",
    }
    return ExperienceSeen(**fields | changes)


def version(number: int, at_ms: float, **consumed: int) -> VersionSeen:
    offsets = {f"{TOPIC}-{name[1:]}": offset for name, offset in consumed.items()}
    return VersionSeen(number, T0 + timedelta(milliseconds=at_ms), offsets)


# --- means --------------------------------------------------------------------------------------------------


def test_the_first_and_the_last_part_are_taken_in_order_of_the_requests() -> None:
    first, last = measures.spans([sample(i, reward=i / 100) for i in reversed(range(100))])
    assert [s.index for s in first] == list(range(10))
    assert [s.index for s in last] == list(range(75, 100))


def test_the_control_is_the_strategy_that_was_best_in_hindsight() -> None:
    samples = [sample(0, control={"a": 0.9, "b": 0.2}), sample(1, control={"a": 0.1, "b": 0.9})]
    assert measures.best_fixed(samples) == "b"
    assert measures.control_rewards(samples) == [0.2, 0.9]
    assert measures.control_rewards(samples, "a") == [0.9, 0.1]
    assert measures.control_rewards([]) == []


def test_nothing_is_none_and_not_zero() -> None:
    assert measures.mean([]) is None
    assert measures.percentile([], 99) is None
    assert measures.calibration_error([], []) is None


# --- calibration --------------------------------------------------------------------------------------------


def test_calibration_error_of_known_cases() -> None:
    assert measures.calibration_error([0.99, 0.99], [True, True]) == pytest.approx(0.01)
    assert measures.calibration_error([1.0, 0.0], [False, True]) == pytest.approx(1.0)
    # Two bins of unequal size: (3 · |0.9 − 2/3| + 1 · |0.1 − 0|) / 4.
    error = measures.calibration_error([0.9, 0.9, 0.9, 0.1], [True, True, False, False])
    assert error == pytest.approx((3 * (0.9 - 2 / 3) + 0.1) / 4)


def test_calibrated_confidence_has_a_small_error_and_a_constant_one_has_not() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    y = rng.random(20_000) < p
    measured = measures.calibration_error(p.tolist(), y.tolist())
    assert measured is not None
    assert measured < 0.02
    assert measures.calibration_error([0.9] * 20_000, y.tolist()) == pytest.approx(0.4, abs=0.02)


# --- reply → weights ----------------------------------------------------------------------------------------


def test_latency_counts_to_the_first_version_that_learned_from_it_at_the_slowest_worker() -> None:
    fast = [version(1, 100, p0=5), version(2, 200, p0=6), version(3, 900, p0=9)]
    slow = [version(1, 150, p0=5), version(3, 950, p0=9)]  # it never served version 2
    seen = [experience("a", offset=4), experience("b", offset=5)]
    assert measures.reply_to_weights_ms(seen, TOPIC, [fast]) == pytest.approx([100, 200])
    assert measures.reply_to_weights_ms(seen, TOPIC, [fast, slow]) == pytest.approx([150, 950])


def test_latency_knows_partitions_apart_and_leaves_out_what_is_not_learned_yet() -> None:
    worker = [version(1, 100, p0=5, p1=1), version(2, 200, p0=5, p1=2)]
    seen = [
        experience("a", offset=1, partition=1),
        experience("b", offset=5, partition=0),
        experience("c", offset=0, partition=7),
        experience("d", offset=0, replied_at=None),
    ]
    assert measures.reply_to_weights_ms(seen, TOPIC, [worker]) == pytest.approx([200])
    assert measures.unlearned(seen, TOPIC, [worker]) == 2
    assert measures.unlearned(seen, TOPIC, [worker, []]) == 4
    assert measures.reply_to_weights_ms(seen, TOPIC, []) == []


def test_a_rollback_does_not_forget_what_was_consumed_before_it() -> None:
    worker = [version(1, 100, p0=5), version(2, 200, p0=3), version(3, 300, p0=7)]
    assert measures.reply_to_weights_ms([experience("a", offset=6)], TOPIC, [worker]) == pytest.approx([300])
    assert measures.reply_to_weights_ms([experience("a", offset=4)], TOPIC, [worker]) == pytest.approx([100])


# --- counting -----------------------------------------------------------------------------------------------


EVERYTHING = frozenset(["a", "b", "silent", "ca", "cb", "r-a", "r-b", "r-2"])


def counted(**changes: Any) -> measures.Audit:
    tally = Tally(
        interactions=["a", "b", "silent"],
        control_interactions=["ca", "cb"],
        replies={"r-a": "a", "r-b": "b"},
    )
    arguments: dict[str, Any] = {
        "tally": tally,
        "experiences": [experience("a", 0), experience("b", 1)],
        "replay": {"a": 1, "b": 1},
        "logged": EVERYTHING,
        "drained": True,
        "replay_capacity": 100,
        "learned": 2,
    }
    return measures.audit(**arguments | changes)


def test_nothing_is_lost_where_everything_is_there() -> None:
    audit = counted()
    assert (audit.joined, audit.lost, audit.duplicates, audit.redelivered) == (2, frozenset(), 0, 0)


def test_an_interaction_missing_in_experiences_in_replay_or_in_its_topic_is_lost() -> None:
    missing = counted(experiences=[experience("a", 0)], learned=1)
    assert (missing.joined, missing.lost) == (1, frozenset({"b"}))
    assert counted(replay={"a": 1}).lost == {"b"}
    assert counted(logged=EVERYTHING - {"silent"}).lost == {"silent"}
    assert counted(logged=EVERYTHING - {"cb"}).lost == {"cb"}
    assert counted(logged=EVERYTHING - {"r-a"}).lost == {"r-a"}


def test_what_a_run_cut_short_left_in_its_topic_is_pending_and_what_is_not_there_is_lost() -> None:
    short = {"drained": False, "experiences": [experience("a", 0)], "learned": 1}
    assert (counted(**short).lost, counted(**short).pending) == (frozenset(), frozenset({"b"}))
    gone = counted(**short, logged=EVERYTHING - {"b"})
    assert (gone.lost, gone.pending) == (frozenset({"b"}), frozenset())


def test_a_second_reply_that_no_experience_names_is_lost() -> None:
    tally = Tally(interactions=["a"], replies={"r-a": "a", "r-2": "a"})
    one = [experience("a", 0)]
    both = [*one, experience("a", 1, version=2, revision=2, reply_ids=("r-a", "r-2"), digest="a-2")]
    assert counted(tally=tally, experiences=one, replay={"a": 1}).lost == {"r-2"}
    assert counted(tally=tally, experiences=both, replay={"a": 2}).lost == frozenset()
    assert counted(tally=tally, experiences=both, replay={"a": 1}).lost == {"a"}  # replay kept the old reward


def test_what_a_full_replay_buffer_let_go_is_not_lost() -> None:
    assert counted(replay={"b": 1}, replay_capacity=1).lost == frozenset()


def test_one_interaction_told_in_two_ways_or_learned_twice_is_a_duplicate() -> None:
    again = experience("a", 2)
    other = experience("a", 2, digest="another reward")
    base = [experience("a", 0), experience("b", 1)]
    assert (
        counted(experiences=[*base, again]).duplicates,
        counted(experiences=[*base, again]).redelivered,
    ) == (0, 1)
    assert counted(experiences=[*base, other]).duplicates == 1
    assert counted(learned=3).duplicates == 1


def test_rounding_reaches_nested_values_and_leaves_no_nan() -> None:
    value = {"a": 0.123456, "b": {"c": float("nan")}, "d": 3, "e": None}
    assert measures.round_floats(value) == {"a": 0.1235, "b": {"c": None}, "d": 3, "e": None}
