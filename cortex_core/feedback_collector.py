"""From a user's reply to a reward: what the reply says about the answer before it.

    >>> collector = FeedbackCollector()
    >>> feedback = collector.extract("Thanks, that worked!")
    >>> round(feedback.reward, 2), round(feedback.confidence, 2)
    (0.85, 0.98)
    >>> [(signal.type.value, signal.evidence) for signal in feedback.signals]
    [('positive', 'Thanks … that worked'), ('engagement', '[the conversation went on]')]

    readings = collector.read(texts, embeddings)      # many at once, each read by itself
    readings[0].feedback(turn_between(message, embeddings[0]))

It reads the reply alone, with the message before it where that is given. It loads no torch, keeps no state
between replies, and may be shared by threads.
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
    SIGNAL_REWARDS,
    Aggregation,
    Feedback,
    FeedbackSignal,
    SignalType,
    aggregate_rewards,
)

__all__ = [
    "DEFAULT_EXTRACTOR",
    "EXTRACTORS",
    "SIGNAL_REWARDS",
    "Aggregation",
    "Feedback",
    "FeedbackCollector",
    "FeedbackSignal",
    "SignalType",
    "TextReading",
    "Turn",
    "aggregate_rewards",
    "turn_between",
]

_WORD = re.compile(r"[^\W_]+")

SAME_REQUEST = 0.8
"""Share of words in common from which a message asks the one before it again."""
SAME_MEANING = 0.97
"""Cosine of two consecutive messages from which the second asks the first again."""
OTHER_TOPIC = 0.05
"""Cosine of two consecutive messages below which the topic has switched."""


class Turn(StrEnum):
    """How a reply stands to the user's message before it, which the answer was to."""

    CONTINUED = "continued"
    SWITCHED = "switched"
    """It is about something else."""
    REPEATED = "repeated"
    """It asks the same again."""


def turn_between(message: FloatArray, reply: FloatArray) -> Turn:
    """How a reply stands to the message before it, by the two sentence embeddings, each (D,) of any length.

    Embeddings of different dimensions, and one of length 0, say nothing: `CONTINUED`.
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
    """What a reply says by itself, read once; `feedback` adds what its turn makes of it."""

    signals: tuple[FeedbackSignal, ...]
    """The explicit ones."""
    confidence: float
    """[0, 1]: how sure the extractor is of their sign."""
    extractor: str
    can_repeat: bool = False
    """Whether it is long enough for asking the same again to mean anything."""
    can_switch: bool = False
    """Whether it is long enough to switch the topic."""

    @property
    def explicit(self) -> bool:
        """Whether it says anything about the answer; then it says so whatever came before."""
        return bool(self.signals)

    def feedback(
        self,
        turn: Turn = Turn.CONTINUED,
        *,
        conversation_continued: bool = True,
        topic_switched: bool | None = None,
    ) -> Feedback:
        """The feedback where the reply stands so to the message before it.

        Args:
            conversation_continued: whether the user went on after the answer.
            topic_switched: whether the reply is about something else; None: as `turn` says, where the reply
                says nothing explicit.
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
    """Extracts feedback signals from replies and adds them up to a reward.

    | signal | example | reward |
    |---|---|---|
    | positive | "Thanks!", "Perfect", "That's right" | +0.5 … +1.0 |
    | negative | "That's wrong", "Not right" | -0.5 … -1.0 |
    | correction | "No, I meant …", "Actually …" | -0.2 … -0.5 |
    | confusion | "What?", "I don't understand" | -0.1 … -0.3 |
    | engagement | the conversation goes on | +0.1 |
    | disengagement | the topic switched | -0.1 |

    One match gives the mildest reward of its kind, three or more the strongest. Signals of different kinds
    add up and the sum is clamped to [-1, 1]. Engagement counts where nothing complains: a complaint goes on
    with the conversation too, and that is no praise.
    """

    def __init__(self, extractor: str = DEFAULT_EXTRACTOR, *, evidence: bool = True) -> None:
        """
        Args:
            extractor: a key of `EXTRACTORS`.
            evidence: whether signals name the words of the reply that carried them, which takes time to find.

        Raises:
            ConfigError: no such extractor.
        """
        if extractor not in EXTRACTORS:
            raise ConfigError(f"extractor is {extractor!r}, wanted one of {', '.join(sorted(EXTRACTORS))}")
        self.extractor = extractor
        self._evidence = evidence
        self._extract = EXTRACTORS[extractor]()

    def read(
        self, texts: Sequence[str], embeddings: Sequence[npt.NDArray[Any] | None] | None = None
    ) -> list[TextReading]:
        """Reads n replies, each once and by itself: it is read alike whatever stands beside it.

        Args:
            texts: n user's messages that each followed an answer.
            embeddings: n (D,) sentence embeddings of `texts`, None where none is at hand.

        Raises:
            InputError: a text is no string.
            DimensionError, NonFiniteError: an unusable embedding.
        """
        for text in texts:
            if not isinstance(text, str):
                raise InputError(f"the reply is {type(text).__name__}, wanted a string")
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
            text: the user's message that followed the answer; "" when nobody replied.
            conversation_continued: whether the user went on after the answer.
            topic_switched: whether the reply is about something else; None judges by the two embeddings where
                both are given, and else takes it that it is not.
            previous_text: the user's message before, which the answer was to: asking the same again is a
                correction.
            embedding: (D,) sentence embedding of `text`, where it is at hand; none is computed here.
            previous_embedding: (D,) that of the message before.

        Raises:
            InputError: `text` is no string.
            DimensionError, NonFiniteError: an unusable embedding.
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
        if _shares_words(text, previous_text or ""):
            turn = Turn.REPEATED
        return reading.feedback(
            turn, conversation_continued=conversation_continued, topic_switched=topic_switched
        )

    def from_rating(self, value: float) -> Feedback:
        """An explicit rating or a delayed outcome in [-1, 1], taken at its word with confidence 1.

        A rating of 0 is feedback of reward 0, which is not the same as no feedback.

        Raises:
            InputError: outside [-1, 1], or no number.
        """
        if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
            raise InputError(f"the rating is {value!r}, wanted a number in [-1, 1]")
        rating = float(value)
        if not np.isfinite(rating):
            raise NonFiniteError("the rating")
        if not -1.0 <= rating <= 1.0:
            raise InputError(f"the rating is {rating}, wanted a number in [-1, 1]")
        signals = []
        if rating:
            type_ = SignalType.POSITIVE if rating > 0 else SignalType.NEGATIVE
            signals.append(FeedbackSignal(type_, abs(rating), rating, f"[rating {rating:g}]"))
        return Feedback(tuple(signals), rating, 1.0, "rating-1")


def _engagement() -> FeedbackSignal:
    return FeedbackSignal.of(SignalType.ENGAGEMENT, 1.0, "[the conversation went on]")


def _shares_words(text: str, previous: str) -> bool:
    now, before = _words(text), _words(previous)
    return len(before) >= 3 and len(now & before) >= SAME_REQUEST * len(now | before)


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower()))
