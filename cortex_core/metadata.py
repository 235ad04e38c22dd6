"""Metadata of a request as a feature vector. Does not import torch, which the joiner must not load.

Only the keys listed in `metadata_features` are read; agents may pass others. An invalid value is an error,
not a default: a wrong feature would train wrong weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cortex_core.arrays import FloatArray
from cortex_core.errors import InputError, NonFiniteError, shown

METADATA_KEYS: tuple[str, ...] = (
    "hour_sin",
    "hour_cos",
    "weekday_sin",
    "weekday_cos",
    "conversation_length",
    "idle_time",
    "message_words",
    "message_is_question",
    "message_has_code",
    "history_turns",
)
"""Names of the F features, in order; every feature is in [-1, 1], and 0 if unknown."""

_CODE_MARKS = ("```", "def ", "class ", "();", "{", "};", "</", "SELECT ", "Traceback", "#include")


def metadata_features(
    metadata: Mapping[str, Any] | None, message: str = "", history: Sequence[str] = ()
) -> FloatArray:
    """The features of one request.

    Args:
        metadata: the optional keys are `hour_of_day` [0, 24), `day_of_week` [0, 7) with 0 = Monday,
            `conversation_length` in turns (≥ 0), and `idle_s`, seconds since the user's last message (≥ 0).
        message: the user's text, for its length and form; may be empty if only its embedding is available.
        history: earlier turns, oldest first; only their number is used.

    Returns:
        (F,) float32 in the order of `METADATA_KEYS`.

    Raises:
        InputError: a value is not a number or out of range.
        NonFiniteError: NaN or infinity.
    """
    data = metadata or {}
    hour = _number(data, "hour_of_day", 0.0, 24.0)
    day = _number(data, "day_of_week", 0.0, 7.0)
    turns = _number(data, "conversation_length", 0.0, None)
    idle_s = _number(data, "idle_s", 0.0, None)
    words = len(message.split())
    return np.array(
        [
            *_on_circle(hour, 24.0),
            *_on_circle(day, 7.0),
            _saturating(turns, 10.0),
            _saturating(idle_s, 600.0),
            _saturating(words or None, 20.0),
            float("?" in message),
            float(any(mark in message for mark in _CODE_MARKS)),
            _saturating(len(history) or None, 10.0),
        ],
        dtype=np.float32,
    )


def _number(data: Mapping[str, Any], key: str, low: float, high: float | None) -> float | None:
    value = data.get(key)
    if value is None:
        return None
    expected = f"a number ≥ {low:g}" + (f" and < {high:g}" if high is not None else "")
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # a whole number may have any number of digits
        raise InputError(f"metadata[{key!r}] is {shown(value)}, expected {expected}") from None
    if not math.isfinite(number):
        raise NonFiniteError(f"metadata[{key!r}]")
    if number < low or (high is not None and number >= high):
        raise InputError(f"metadata[{key!r}] is {number:g}, expected {expected}")
    return number


def _on_circle(value: float | None, period: float) -> tuple[float, float]:
    """(sin, cos) of a periodic value: 23:00 and 1:00 are two hours apart; (0, 0) if unknown."""
    if value is None:
        return 0.0, 0.0
    angle = 2.0 * math.pi * value / period
    return math.sin(angle), math.cos(angle)


def _saturating(value: float | None, half: float) -> float:
    """Maps [0, ∞) to [0, 1): 0 → 0, `half` → 0.5."""
    return 0.0 if value is None else value / (value + half)
