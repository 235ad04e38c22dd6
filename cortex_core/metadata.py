"""Metadata of a request as a short vector of features. Torch-free: the joiner's side reads it too.

Only the keys named in `metadata_features` are read; others are ignored, because agents pass along what they
have. A value that is present but unusable is an error: taking "noon" for midnight would teach nonsense.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cortex_core.arrays import FloatArray
from cortex_core.errors import InputError, NonFiniteError

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
"""Names of the F features, in their order; every feature lies in [-1, 1] and is 0 when unknown."""

_CODE_MARKS = ("```", "def ", "class ", "();", "{", "};", "</", "SELECT ", "Traceback", "#include")


def metadata_features(
    metadata: Mapping[str, Any] | None, message: str = "", history: Sequence[str] = ()
) -> FloatArray:
    """The features of one request.

    Args:
        metadata: read from it, where present: `hour_of_day` [0, 24), `day_of_week` [0, 7) with 0 = Monday,
            `conversation_length` in turns (≥ 0), `idle_s` seconds since the user's last message (≥ 0).
        message: the user's text, for its length and form; may be empty when only its embedding is at hand.
        history: earlier turns, oldest first; only their number is used.

    Returns:
        (F,) float32 in the order of `METADATA_KEYS`.

    Raises:
        InputError: a value is no number or outside its range.
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
    wanted = f"a number ≥ {low:g}" + (f" and < {high:g}" if high is not None else "")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"metadata[{key!r}] is {value!r}, wanted {wanted}") from None
    if not math.isfinite(number):
        raise NonFiniteError(f"metadata[{key!r}]")
    if number < low or (high is not None and number >= high):
        raise InputError(f"metadata[{key!r}] is {number:g}, wanted {wanted}")
    return number


def _on_circle(value: float | None, period: float) -> tuple[float, float]:
    """23:00 and 1:00 are two hours apart, not twenty-two."""
    if value is None:
        return 0.0, 0.0
    angle = 2.0 * math.pi * value / period
    return math.sin(angle), math.cos(angle)


def _saturating(value: float | None, half: float) -> float:
    """0 → 0, `half` → 0.5, ∞ → 1: a count without an upper end inside [0, 1]."""
    return 0.0 if value is None else value / (value + half)
