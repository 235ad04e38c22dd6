"""FeedbackCollector: extracts feedback signals and a reward from a user's reply to an answer.

    >>> collector = FeedbackCollector()
    >>> feedback = collector.extract("Thanks, that worked!")
    >>> round(feedback.reward, 2), round(feedback.confidence, 2)
    (0.85, 0.98)
    >>> [(signal.type.value, signal.evidence) for signal in feedback.signals]
    [('positive', 'Thanks … that worked'), ('engagement', '[the conversation went on]')]

    readings = collector.read(texts, embeddings)      # a batch of independent replies
    readings[0].feedback(turn_between(message, embeddings[0]))

The input is the reply and, optionally, the message before it. Does not load torch; stateless and thread-safe.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from cortex_core.arrays import FloatArray, as_float32
from cortex_core.errors import ConfigError, DimensionError, InputError, NonFiniteError
from cortex_core.feedback.extractors import DEFAULT_EXTRACTOR, EXTRACTORS, UNSURE, Extraction
from cortex_core.feedback.signals import (
    IMPLICIT,
    SIGNAL_REWARDS,
    Aggregation,
    Feedback,
    FeedbackSignal,
    SignalType,
    aggregate,
    aggregate_rewards,
)

__all__ = [
    "DEFAULT_EXTRACTOR",
    "EXTRACTORS",
    "IMPLICIT",
    "SIGNAL_REWARDS",
    "Aggregation",
    "Feedback",
    "FeedbackCollector",
    "FeedbackSignal",
    "SignalType",
    "TextReading",
    "Turn",
    "aggregate",
    "aggregate_rewards",
    "turn_between",
]

_WORD = re.compile(r"[^\W_]+")

SAME_REQUEST = 0.8
"""Jaccard similarity of the words of two consecutive messages from which the second repeats the first."""
SAME_MEANING = 0.97
"""Cosine similarity of two consecutive messages from which the second repeats the first."""
OTHER_TOPIC = 0.05
"""Cosine similarity of two consecutive messages below which the topic has switched."""


class Turn(StrEnum):
    """Relation of a reply to the user's previous message."""

    CONTINUED = "continued"
    SWITCHED = "switched"
    """The reply is about a different topic."""
    REPEATED = "repeated"
    """The reply repeats the request."""


def turn_between(message: FloatArray, reply: FloatArray) -> Turn:
    """Relation of a reply to the previous message by their (D,) sentence embeddings, of any norm.

    `CONTINUED` for embeddings of different dimensions, and for zeros.
    """
    if message.shape != reply.shape:
        return Turn.CONTINUED
    norms = float(np.linalg.norm(message) * np.linalg.norm(reply))
    if norms == 0.0:
        return Turn.CONTINUED
    similarity = float(message @ reply) / norms
    if similarity >= SAME_MEANING:
        return Turn.REPEATED
    return Turn.SWITCHED if similarity < OTHER_TOPIC else Turn.CONTINUED


@dataclass(frozen=True, slots=True)
class TextReading:
    """The explicit signals of a reply; `feedback` adds those of its relation to the previous message."""

    signals: tuple[FeedbackSignal, ...]
    """Explicit signals."""
    confidence: float
    """[0, 1] confidence in the sign of the signals."""
    extractor: str
    can_repeat: bool = False
    """Whether the reply is long enough to count as a repeated request."""
    can_switch: bool = False
    """Whether the reply is long enough to count as a topic switch."""

    @property
    def explicit(self) -> bool:
        """Whether there are explicit signals; then the previous message has no effect."""
        return bool(self.signals)

    def feedback(
        self,
        turn: Turn = Turn.CONTINUED,
        *,
        conversation_continued: bool = True,
        topic_switched: bool | None = None,
    ) -> Feedback:
        """The feedback of the reply, given its relation to the previous message.

        Args:
            turn: the relation.
            conversation_continued: whether the user continued the conversation.
            topic_switched: whether the reply is about a different topic; None: decided by `turn`, for a reply
                without explicit signals.
        """
        signals, confidence = list(self.signals), self.confidence
        if not signals and turn is Turn.REPEATED and self.can_repeat:
            signals.append(FeedbackSignal.of(SignalType.CORRECTION, 0.5, "[the same request again]"))
            confidence = 0.7
        if topic_switched is None:
            topic_switched = not signals and turn is Turn.SWITCHED and self.can_switch
        if topic_switched:
            signals.append(FeedbackSignal.of(SignalType.DISENGAGEMENT, 1.0, "[the topic switched]"))
        elif conversation_continued and not any(signal.reward < 0 for signal in signals):
            signals.append(_engagement())
        return Feedback.of(signals, confidence, self.extractor)


class FeedbackCollector:
    """Extracts feedback signals from replies, and adds up their rewards.

    | signal | example | reward |
    |---|---|---|
    | positive | "Thanks!", "Perfect", "That's right" | +0.5 … +1.0 |
    | negative | "That's wrong", "Not right" | -0.5 … -1.0 |
    | correction | "No, I meant …", "Actually …" | -0.2 … -0.5 |
    | confusion | "What?", "I don't understand" | -0.1 … -0.3 |
    | engagement | the conversation continues | +0.1 |
    | disengagement | the topic switched | -0.1 |

    One match gives the mildest reward of its type, three or more the strongest. The rewards of different
    types are added and clamped to [-1, 1]. Engagement counts only without negative signals, because a
    complaint continues the conversation as well.
    """

    def __init__(self, extractor: str = DEFAULT_EXTRACTOR, *, evidence: bool = True) -> None:
        """
        Args:
            extractor: a key of `EXTRACTORS`.
            evidence: whether signals include the words that caused them, which takes time to find.

        Raises:
            ConfigError: unknown extractor.
        """
        if extractor not in EXTRACTORS:
            raise ConfigError(f"extractor is {extractor!r}, expected one of {', '.join(sorted(EXTRACTORS))}")
        self.extractor = extractor
        self._evidence = evidence
        self._extract = EXTRACTORS[extractor]()

    def read(
        self, texts: Sequence[str], embeddings: Sequence[npt.NDArray[Any] | None] | None = None
    ) -> list[TextReading]:
        """Reads n independent replies: the result for a reply does not depend on the others.

        Args:
            texts: n messages of users, each the reply to an answer.
            embeddings: n (D,) sentence embeddings of `texts`, None where not available.

        Raises:
            InputError: a text is not a string.
            DimensionError, NonFiniteError: an invalid embedding.
        """
        for text in texts:
            if not isinstance(text, str):
                raise InputError(f"the reply is {type(text).__name__}, expected a string")
        vectors = [
            None if embedding is None else as_float32(embedding, "embedding", 1)
            for embedding in embeddings or [None] * len(texts)
        ]
        found = self._extract(texts, vectors, evidence=self._evidence)
        return [self._reading(text, it) for text, it in zip(texts, found, strict=True)]

    def _reading(self, text: str, found: Extraction) -> TextReading:
        if found.signals and text.strip():
            return TextReading(tuple(found.signals), found.confidence, self.extractor)
        return TextReading(
            (),
            found.confidence,
            self.extractor,
            can_repeat=len(_words(text)) >= 3,
            can_switch=len(text.split()) > 3,
        )

    def extract(
        self,
        text: str,
        *,
        conversation_continued: bool = True,
        topic_switched: bool | None = None,
        previous_text: str | None = None,
        embedding: FloatArray | None = None,
        previous_embedding: FloatArray | None = None,
    ) -> Feedback:
        """Reads one reply.

        Args:
            text: the user's message after the answer; "" without a reply.
            conversation_continued: whether the user continued the conversation.
            topic_switched: whether the reply is about a different topic; None: decided by the two embeddings
                if both are given, else False.
            previous_text: the user's previous message; a repeated request is a correction.
            embedding: (D,) sentence embedding of `text`, if available; it is not computed here.
            previous_embedding: (D,) sentence embedding of the previous message.

        Raises:
            InputError: `text` is not a string.
            DimensionError, NonFiniteError: an invalid embedding.
        """
        [reading] = self.read([text], [embedding])
        if not text.strip():
            signals = [_engagement()] if conversation_continued else []
            return Feedback.of(signals, UNSURE if signals else 0.0, self.extractor)
        turn = Turn.CONTINUED
        if embedding is not None and previous_embedding is not None:
            now = as_float32(embedding, "embedding", 1)
            before = as_float32(previous_embedding, "previous_embedding", 1)
            if now.shape != before.shape:
                raise DimensionError("previous_embedding", before.shape, now.shape)
            turn = turn_between(before, now)
        if _repeats_words(text, previous_text or ""):
            turn = Turn.REPEATED
        return reading.feedback(
            turn, conversation_continued=conversation_continued, topic_switched=topic_switched
        )

    def from_rating(self, value: float) -> Feedback:
        """The feedback of an explicit rating or a delayed outcome in [-1, 1], with confidence 1.

        A rating of 0 is feedback with reward 0, which differs from no feedback.

        Raises:
            InputError: not a number in [-1, 1].
        """
        if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
            raise InputError(f"the rating is {value!r}, expected a number in [-1, 1]")
        rating = float(value)
        if not np.isfinite(rating):
            raise NonFiniteError("the rating")
        if not -1.0 <= rating <= 1.0:
            raise InputError(f"the rating is {rating}, expected a number in [-1, 1]")
        signals = []
        if rating:
            type_ = SignalType.POSITIVE if rating > 0 else SignalType.NEGATIVE
            signals.append(FeedbackSignal(type_, abs(rating), rating, f"[rating {rating:g}]"))
        return Feedback(tuple(signals), rating, 1.0, "rating-1")


def _engagement() -> FeedbackSignal:
    return FeedbackSignal.of(SignalType.ENGAGEMENT, 1.0, "[the conversation went on]")


def _repeats_words(text: str, previous: str) -> bool:
    now, before = _words(text), _words(previous)
    return len(before) >= 3 and len(now & before) >= SAME_REQUEST * len(now | before)


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))
