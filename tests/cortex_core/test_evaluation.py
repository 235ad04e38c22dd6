"""Progressive validation, the measures of a decision, and off-policy estimates."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex_core import evaluation as ev
from cortex_core.errors import ConfigError, DimensionError, InputError, NonFiniteError
from cortex_core.off_policy import LoggedDecisions, compare, cross_fitted_rewards, evaluate


@dataclass
class Diary:
    """A learner that writes down what it is asked and told, and in which order."""

    events: list[tuple[str, int]] = field(default_factory=list)

    def decide(self, request: int) -> int:
        self.events.append(("decide", request))
        return request * 10

    def learn(self, request: int, answer: int, feedback: str) -> None:
        assert answer == request * 10
        assert feedback == f"reply {request}"
        self.events.append(("learn", request))


def say(request: int, answer: int) -> str | None:
    return None if request == 1 else f"reply {request}"


def test_the_decision_comes_first_and_silence_teaches_nothing() -> None:
    diary = Diary()
    steps = list(ev.progressive_validation(range(3), diary, say))
    assert diary.events == [("decide", 0), ("learn", 0), ("decide", 1), ("decide", 2), ("learn", 2)]
    assert [(s.step, s.answer, s.feedback) for s in steps] == [
        (0, 0, "reply 0"),
        (1, 10, None),
        (2, 20, "reply 2"),
    ]


def test_a_reply_arrives_after_as_many_decisions_as_it_is_late() -> None:
    diary = Diary()
    list(ev.progressive_validation([0, 2, 3, 4], diary, say, delay=2))
    assert [e for e in diary.events if e[0] == "learn"] == [("learn", r) for r in (0, 2, 3, 4)]
    assert diary.events[:4] == [("decide", 0), ("decide", 2), ("decide", 3), ("learn", 0)]


def test_replies_may_overtake_each_other() -> None:
    diary = Diary()
    delays = {0: 3, 1: 0, 2: 0, 3: 5}
    list(ev.progressive_validation([0, 2, 3, 4], diary, say, delay=delays.__getitem__))
    assert [r for what, r in diary.events if what == "learn"] == [2, 3, 0, 4]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=20))
def test_every_reply_is_learned_once_and_none_too_early(delays: list[int]) -> None:
    diary = Diary()
    requests = [i for i in range(len(delays) + 1) if i != 1][: len(delays)]
    list(ev.progressive_validation(requests, diary, say, delay=delays.__getitem__))
    assert sorted(r for what, r in diary.events if what == "learn") == requests
    for step, request in enumerate(requests):
        before = diary.events[: diary.events.index(("learn", request))]
        decided = sum(what == "decide" for what, _ in before)
        assert decided == min(step + delays[step] + 1, len(requests))


def test_a_negative_delay_is_refused() -> None:
    with pytest.raises(ConfigError, match="delay at step 0 is -1"):
        list(ev.progressive_validation([0], Diary(), say, delay=-1))


def test_precision_counts_an_empty_slot_as_a_miss() -> None:
    assert ev.precision_at_k([4, 7, 9], {4, 9}) == pytest.approx(2 / 3)
    assert ev.precision_at_k([4], {4, 9}) == pytest.approx(1 / 3)
    assert ev.precision_at_k([1, 2, 3, 4, 9], {4, 9}) == 0.0
    with pytest.raises(InputError, match="twice"):
        ev.precision_at_k([4, 4, 9], {4})
    with pytest.raises(ConfigError):
        ev.precision_at_k([4], {4}, k=0)


def test_ece_by_hand() -> None:
    # Half of the samples in [0.8, 0.866…): mean confidence 0.82, mean outcome 0.5. Half lower: 0.22 and 0.
    confidence = [0.81, 0.83, 0.21, 0.23]
    assert ev.expected_calibration_error(confidence, [1, 0, 0, 0]) == pytest.approx(0.5 * 0.32 + 0.5 * 0.22)


def test_ece_keeps_a_confidence_of_one_in_the_last_bin() -> None:
    assert ev.expected_calibration_error([1.0, 1.0], [1, 1]) == 0.0
    assert ev.expected_calibration_error([1.0, 1.0], [1, 0]) == pytest.approx(0.5)


def test_a_constant_at_the_base_rate_is_calibrated_and_tells_nothing_apart() -> None:
    outcome = np.array([1, 1, 1, 0])
    constant = np.full(4, 0.75)
    assert ev.expected_calibration_error(constant, outcome) == pytest.approx(0.0)
    assert ev.auroc(constant, outcome) == 0.5
    assert ev.brier_score(constant, outcome) == pytest.approx(0.1875)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=40).filter(
        lambda rows: len({y for _, y in rows}) == 2
    )
)
def test_auroc_is_the_share_of_pairs_in_the_right_order(rows: list[tuple[int, bool]]) -> None:
    p = np.array([x / 5 for x, _ in rows])
    y = np.array([float(v) for _, v in rows])
    good, bad = p[y == 1][:, None], p[y == 0][None, :]
    pairs = (good > bad).mean() + 0.5 * (good == bad).mean()
    assert ev.auroc(p, y) == pytest.approx(pairs)


def test_auroc_of_one_kind_of_outcome_is_unknown() -> None:
    assert ev.auroc([0.3, 0.4], [1, 1]) is None
    with pytest.raises(InputError, match="0 or 1"):
        ev.auroc([0.3, 0.4], [1, 0.5])


@pytest.mark.parametrize("measure", [ev.expected_calibration_error, ev.brier_score, ev.auroc])
def test_unusable_confidences_are_refused(
    measure: Callable[[Sequence[float], Sequence[int]], float | None],
) -> None:
    with pytest.raises(DimensionError):
        measure([0.5], [1, 0])
    with pytest.raises(InputError, match="nothing to evaluate"):
        measure([], [])
    with pytest.raises(NonFiniteError):
        measure([float("nan"), 0.5], [1, 0])
    with pytest.raises(InputError, match="expected numbers in"):
        measure([1.2, 0.5], [1, 0])


def test_windows() -> None:
    values = [0.0, 0.0, 1.0, 1.0]
    assert ev.window_mean(values, 4, 2) == 1.0
    assert ev.window_mean(values, 3, 2) == 0.5
    assert ev.window_mean(values, 1, 200) == 0.0
    assert ev.moving_mean(values, 2).tolist() == [0.0, 0.0, 0.5, 1.0]
    with pytest.raises(InputError):
        ev.window_mean(values, 5, 2)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.integers(1, 50))
def test_the_moving_mean_is_the_mean_of_the_last_values(values: list[float], window: int) -> None:
    expected = [np.mean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]
    assert ev.moving_mean(values, window) == pytest.approx(expected)


def test_recovery_is_counted_from_the_change() -> None:
    values = [1.0] * 20 + [0.0] * 6 + [1.0] * 20
    assert ev.steps_to_recover(values, 20, share=0.9, window=10, before=20) == 15
    assert ev.steps_to_recover([1.0] * 20 + [0.0] * 20, 20, window=10) is None
    assert ev.steps_to_recover([1.0] * 40, 20, window=10) == 10
    with pytest.raises(InputError):
        ev.steps_to_recover(values, 40, window=10)


def bandit(n: int, seed: int) -> tuple[LoggedDecisions, np.ndarray, np.ndarray, float]:
    """A log of a softmax policy over three actions; (log, situations, a better policy, its true value)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 4))
    theta = np.array([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0]])
    means = 1 / (1 + np.exp(-x @ theta.T))
    logging = np.exp(0.5 * x @ theta.T)
    logging /= logging.sum(1, keepdims=True)
    actions = np.array([rng.choice(3, p=p) for p in logging])
    rewards = (rng.random(n) < means[np.arange(n), actions]).astype(float)
    target = np.full((n, 3), 0.05)
    target[np.arange(n), means.argmax(1)] = 0.9
    log = LoggedDecisions(actions, rewards, logging[np.arange(n), actions])
    return log, x, target, float((target * means).sum(1).mean())


def test_the_logging_policy_is_worth_what_it_earned() -> None:
    log, _, _, _ = bandit(200, 0)
    same = np.zeros((200, 3))
    same[np.arange(200), log.actions] = log.propensities
    same[np.arange(200), (log.actions + 1) % 3] = 1.0 - log.propensities
    report = evaluate(log, same)
    assert report["ips"].value == pytest.approx(log.rewards.mean())
    assert report["snips"].value == pytest.approx(log.rewards.mean())
    assert report["ips"].effective_n == pytest.approx(200)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    held = {"ips": 0, "snips": 0, "dr": 0}
    width = {"ips": 0.0, "snips": 0.0, "dr": 0.0}
    for seed in range(60):
        log, x, target, truth = bandit(600, seed)
        q = cross_fitted_rewards(log, x, 3)
        for method, estimate in evaluate(log, target, reward_model=q, level=0.9).items():
            held[method] += estimate.low <= truth <= estimate.high
            width[method] += estimate.high - estimate.low
    assert all(45 <= count <= 60 for count in held.values()), held
    assert width["dr"] < width["ips"]


def test_a_better_policy_is_found_better() -> None:
    log, x, target, truth = bandit(2000, 7)
    uniform = np.full((2000, 3), 1 / 3)
    report = compare(log, uniform, target, reward_model=cross_fitted_rewards(log, x, 3))
    for method in ("ips", "snips", "dr"):
        difference = report.difference[method]
        assert difference.low > 0
        assert difference.value == pytest.approx(report.second[method].value - report.first[method].value)
        assert report.second[method].value == pytest.approx(truth, abs=0.06)
    # Paired: the same decisions judge both, so the difference is surer than two separate estimates.
    apart = np.hypot(report.first["dr"].standard_error, report.second["dr"].standard_error)
    assert report.difference["dr"].standard_error < apart


def test_doubly_robust_survives_a_wrong_model_or_wrong_propensities() -> None:
    log, x, target, truth = bandit(4000, 3)
    nonsense = np.random.default_rng(0).random((4000, 3))
    assert evaluate(log, target, reward_model=nonsense)["dr"].value == pytest.approx(truth, abs=0.05)
    right = 1 / (1 + np.exp(-x[:, :3]))
    wrong = LoggedDecisions(log.actions, log.rewards, np.full(4000, 0.6))
    report = evaluate(wrong, target, reward_model=right)
    assert report["dr"].value == pytest.approx(truth, abs=0.05)
    assert report["ips"].value < truth - 0.1


def test_clipping_bounds_the_weights() -> None:
    log = LoggedDecisions([0, 1], [1.0, 1.0], [0.01, 0.5])
    always = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert evaluate(log, always)["ips"].value == pytest.approx((100 + 2) / 2)
    assert evaluate(log, always, clip=5.0)["ips"].value == pytest.approx((5 + 2) / 2)
    assert evaluate(log, always)["snips"].value == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("actions", "rewards", "propensities", "error"),
    [
        ([0], [1.0], [0.5], "at least two"),
        ([0, 1], [1.0, 0.0], [0.5, 0.0], "propensities range from"),
        ([0, -1], [1.0, 0.0], [0.5, 0.5], "index of 0"),
        ([0.5, 1.0], [1.0, 0.0], [0.5, 0.5], "integers"),
        ([0, 1], [1.0], [0.5, 0.5], "rewards has shape"),
        ([0, 1], [1.0, float("nan")], [0.5, 0.5], "NaN"),
    ],
)
def test_unusable_logs_are_refused(
    actions: list[float], rewards: list[float], propensities: list[float], error: str
) -> None:
    with pytest.raises(InputError, match=error):
        LoggedDecisions(actions, rewards, propensities)


def test_unusable_policies_are_refused() -> None:
    log = LoggedDecisions([0, 1], [1.0, 0.0], [0.5, 0.5])
    with pytest.raises(InputError, match="sum to 1"):
        evaluate(log, [[0.5, 0.6], [0.5, 0.5]])
    with pytest.raises(DimensionError):
        evaluate(log, [[1.0], [1.0]])
    with pytest.raises(InputError, match="never takes a logged action"):
        evaluate(log, [[0.0, 1.0], [1.0, 0.0]])
    with pytest.raises(ConfigError):
        evaluate(log, [[0.5, 0.5], [0.5, 0.5]], level=95)
    with pytest.raises(ConfigError):
        cross_fitted_rewards(log, [[1.0], [2.0]], 2, ridge=0)


def test_judging_loads_no_torch() -> None:
    code = "import sys, cortex_core.evaluation, cortex_core.off_policy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
