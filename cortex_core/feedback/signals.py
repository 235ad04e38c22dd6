"""What a reply says about the answer before it: signals, their rewards, and how several combine.

The ranges are the specification's table. Nothing here reads text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from cortex_core.errors import ConfigError, InputError, NonFiniteError


class SignalType(StrEnum):
    """The six kinds of feedback signal."""

    POSITIVE = "positive"
    """Praise, thanks, a success: "Perfect", "that worked"."""
    NEGATIVE = "negative"
    """A complaint or a failure: "That's wrong", "it crashed"."""
    CORRECTION = "correction"
    """The answer missed what was meant: "No, I meant …"."""
    CONFUSION = "confusion"
    """The answer was not understood: "What do you mean?"."""
    ENGAGEMENT = "engagement"
    """The conversation goes on, and the reply says nothing more about the answer."""
    DISENGAGEMENT = "disengagement"
    """The conversation goes on about something else."""


SIGNAL_REWARDS: dict[SignalType, tuple[float, float]] = {
    SignalType.POSITIVE: (0.5, 1.0),
    SignalType.NEGATIVE: (-0.5, -1.0),
    SignalType.CORRECTION: (-0.2, -0.5),
    SignalType.CONFUSION: (-0.1, -0.3),
    SignalType.ENGAGEMENT: (0.1, 0.1),
    SignalType.DISENGAGEMENT: (-0.1, -0.1),
}
"""Reward of each signal at its mildest and at its strongest."""


@dataclass(frozen=True, slots=True)
class FeedbackSignal:
    """One signal, with the words that carried it."""

    type: SignalType
    strength: float
    """[0, 1]: 0 the mildest of its kind, 1 the strongest."""
    reward: float
    """Its share of the reward, within the range of its kind."""
    evidence: str
    """The span or spans of the reply that caused it, or what else did, in square brackets."""

    @classmethod
    def of(cls, type_: SignalType, strength: float, evidence: str) -> FeedbackSignal:
        """The signal whose reward lies `strength` of the way between the ends of its kind's range."""
        strength = min(max(strength, 0.0), 1.0)
        mildest, strongest = SIGNAL_REWARDS[type_]
        return cls(type_, strength, round(mildest + strength * (strongest - mildest), 6), evidence)


@dataclass(frozen=True, slots=True)
class Feedback:
    """What one reply, or one explicit rating, says."""

    signals: tuple[FeedbackSignal, ...]
    reward: float
    """[-1, 1]: the signals' rewards added up and clamped."""
    confidence: float
    """[0, 1]: probability that `reward` has the right sign; low where nothing is said of the answer."""
    extractor: str
    """Name and version of what read it, such as "patterns-1"."""

    @property
    def explicit(self) -> bool:
        """Whether the user said anything about the answer, beyond going on or not."""
        silent = (SignalType.ENGAGEMENT, SignalType.DISENGAGEMENT)
        return any(signal.type not in silent for signal in self.signals)

    @classmethod
    def of(cls, signals: Sequence[FeedbackSignal], confidence: float, extractor: str) -> Feedback:
        """Adds the signals' rewards up and clamps the sum to [-1, 1]."""
        total = sum(signal.reward for signal in signals)
        reward = round(min(max(total, -1.0), 1.0), 6)
        return cls(tuple(signals), reward, round(min(max(confidence, 0.0), 1.0), 6), extractor)


Aggregation = Literal["first", "last", "mean", "min", "max", "sum"]


def aggregate_rewards(rewards: Sequence[float], how: Aggregation = "last") -> float:
    """One reward in [-1, 1] out of those of several replies about the same answer, in order of time.

    "sum" is clamped. "last" lets a thumbs-down take back a thanks; "min" lets no later thanks hide one.

    Raises:
        InputError: no rewards, or one outside [-1, 1].
        ConfigError: an unknown way.
    """
    if not rewards:
        raise InputError("there are no rewards to aggregate; wanted at least one")
    for reward in rewards:
        if not math.isfinite(reward):
            raise NonFiniteError("rewards")
        if not -1.0 <= reward <= 1.0:
            raise InputError(f"a reward is {reward}, wanted a number in [-1, 1]")
    if how not in _AGGREGATIONS:
        raise ConfigError(f"aggregation is {how!r}, wanted one of {', '.join(_AGGREGATIONS)}")
    return min(max(_AGGREGATIONS[how](rewards), -1.0), 1.0)


_AGGREGATIONS: dict[str, Callable[[Sequence[float]], float]] = {
    "first": lambda rewards: rewards[0],
    "last": lambda rewards: rewards[-1],
    "mean": lambda rewards: math.fsum(rewards) / len(rewards),
    "min": min,
    "max": max,
    "sum": math.fsum,
}
