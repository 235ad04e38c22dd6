"""Feedback signals, their rewards, and the aggregation of several.

The reward ranges are those of the specification.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from cortex_core.errors import ConfigError, InputError, NonFiniteError


class SignalType(StrEnum):
    """The six types of feedback signals."""

    POSITIVE = "positive"
    """Praise, thanks or success: "Perfect", "that worked"."""
    NEGATIVE = "negative"
    """A complaint or a failure: "That's wrong", "it crashed"."""
    CORRECTION = "correction"
    """The request was misunderstood: "No, I meant …"."""
    CONFUSION = "confusion"
    """The answer was not understood: "What do you mean?"."""
    ENGAGEMENT = "engagement"
    """The conversation continues, without an explicit signal."""
    DISENGAGEMENT = "disengagement"
    """The conversation continues with a different topic."""


IMPLICIT = (SignalType.ENGAGEMENT, SignalType.DISENGAGEMENT)
"""Types of signals that the user did not state: only that the conversation continues, or how."""

SIGNAL_REWARDS: dict[SignalType, tuple[float, float]] = {
    SignalType.POSITIVE: (0.5, 1.0),
    SignalType.NEGATIVE: (-0.5, -1.0),
    SignalType.CORRECTION: (-0.2, -0.5),
    SignalType.CONFUSION: (-0.1, -0.3),
    SignalType.ENGAGEMENT: (0.1, 0.1),
    SignalType.DISENGAGEMENT: (-0.1, -0.1),
}
"""Reward of each type at strength 0 and at strength 1."""


@dataclass(frozen=True, slots=True)
class FeedbackSignal:
    """A feedback signal, with the words that caused it."""

    type: SignalType
    strength: float
    """[0, 1] from mildest to strongest."""
    reward: float
    """Contribution to the reward, within the range of its type."""
    evidence: str
    """The words of the reply that caused it, or another cause in square brackets."""

    @classmethod
    def of(cls, type_: SignalType, strength: float, evidence: str) -> FeedbackSignal:
        """A signal whose reward is interpolated by `strength` in the range of its type."""
        strength = min(max(strength, 0.0), 1.0)
        mildest, strongest = SIGNAL_REWARDS[type_]
        return cls(type_, strength, round(mildest + strength * (strongest - mildest), 6), evidence)


@dataclass(frozen=True, slots=True)
class Feedback:
    """The feedback of a reply or an explicit rating."""

    signals: tuple[FeedbackSignal, ...]
    reward: float
    """[-1, 1]: sum of the signals' rewards, clamped."""
    confidence: float
    """[0, 1]: probability that `reward` has the right sign; low without explicit signals."""
    extractor: str
    """Name and version of the extractor, e.g. "patterns-1"."""

    @property
    def explicit(self) -> bool:
        """Whether there are signals other than engagement and disengagement."""
        return any(signal.type not in IMPLICIT for signal in self.signals)

    @classmethod
    def of(cls, signals: Sequence[FeedbackSignal], confidence: float, extractor: str) -> Feedback:
        """Adds up the rewards of the signals, and clamps the sum to [-1, 1]."""
        total = sum(signal.reward for signal in signals)
        reward = round(min(max(total, -1.0), 1.0), 6)
        return cls(tuple(signals), reward, round(min(max(confidence, 0.0), 1.0), 6), extractor)


Aggregation = Literal["first", "last", "mean", "min", "max", "sum"]


def aggregate_rewards(rewards: Sequence[float], how: Aggregation = "last") -> float:
    """Aggregates the rewards of several replies about one answer, in time order, to one reward in [-1, 1].

    "sum" is clamped. With "last" a thumbs-down replaces an earlier thanks; with "min" a later thanks does not
    replace a thumbs-down.

    Raises:
        InputError: no rewards, or one outside [-1, 1].
        ConfigError: an unknown aggregation.
    """
    return aggregate(rewards, how)[0]


def aggregate(rewards: Sequence[float], how: Aggregation = "last") -> tuple[float, Sequence[int]]:
    """`aggregate_rewards`, and the indices of the rewards that determine it: one, or all of them.

    Raises:
        InputError: no rewards, or one outside [-1, 1].
        ConfigError: an unknown aggregation.
    """
    if not rewards:
        raise InputError("there are no rewards to aggregate, expected at least one")
    for reward in rewards:
        if not math.isfinite(reward):
            raise NonFiniteError("rewards")
        if not -1.0 <= reward <= 1.0:
            raise InputError(f"a reward is {reward}, expected a number in [-1, 1]")
    if how not in _AGGREGATIONS:
        raise ConfigError(f"aggregation is {how!r}, expected one of {', '.join(_AGGREGATIONS)}")
    if how == "mean":
        return math.fsum(rewards) / len(rewards), range(len(rewards))
    if how == "sum":
        return min(max(math.fsum(rewards), -1.0), 1.0), range(len(rewards))
    index = _INDEX[how](rewards)
    return rewards[index], (index,)


_INDEX: dict[str, Callable[[Sequence[float]], int]] = {
    "first": lambda rewards: 0,
    "last": lambda rewards: len(rewards) - 1,
    "min": lambda rewards: rewards.index(min(rewards)),
    "max": lambda rewards: rewards.index(max(rewards)),
}
_AGGREGATIONS = (*_INDEX, "mean", "sum")
