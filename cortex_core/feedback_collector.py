"""From a user's reply to a reward: what the reply says about the answer before it.

    collector = FeedbackCollector()
    feedback = collector.extract("Thanks, that worked!")
    feedback.reward, feedback.confidence      # 0.85, 0.97
    [(s.type, s.evidence) for s in feedback.signals]

It reads the reply alone, with the message before it where that is given. It loads no torch, keeps no state
between replies, and may be shared by threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cortex_core.arrays import FloatArray, as_float32
from cortex_core.errors import ConfigError, DimensionError, InputError, NonFiniteError
from cortex_core.feedback.patterns import POSITIVE_KINDS, read
from cortex_core.feedback.scope import Hit
from cortex_core.feedback.semantic import CLASSES, Head, Meaning, load_head, pattern_features
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
    "aggregate_rewards",
]

SIGNAL_OF_KIND = {
    "P": SignalType.POSITIVE, "S": SignalType.POSITIVE, "T": SignalType.POSITIVE, "Z": SignalType.POSITIVE,
    "N": SignalType.NEGATIVE, "F": SignalType.NEGATIVE, "I": SignalType.NEGATIVE,
    "X": SignalType.CORRECTION, "x": SignalType.CORRECTION,
    "Q": SignalType.CONFUSION, "q": SignalType.CONFUSION,
}  # fmt: skip

SURENESS = {
    "P": 0.85, "S": 0.9, "T": 0.85, "Z": 0.6, "N": 0.85, "F": 0.8, "I": 0.8,
    "X": 0.75, "x": 0.4, "Q": 0.8, "q": 0.5,
}  # fmt: skip
"""How often one phrase of a kind, alone, gives the right sign."""

UNSURE = 0.1
"""Confidence of a reply that says nothing of the answer: going on, or not, is weak evidence."""
SAME_REQUEST = 0.8
"""Share of words in common from which a message asks the one before it again."""
SAME_MEANING = 0.97
"""Cosine of two consecutive messages from which the second asks the first again."""
OTHER_TOPIC = 0.05
"""Cosine of two consecutive messages below which the topic has switched."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What an extractor makes of one reply: explicit signals alone, and how sure it is of their sign."""

    signals: list[FeedbackSignal]
    confidence: float


class Extractor(Protocol):
    """Reads explicit signals out of one reply. `embedding` is the reply's, where it is at hand."""

    def __call__(self, text: str, embedding: FloatArray | None) -> Reading: ...


def signals_of(hits: list[Hit]) -> list[FeedbackSignal]:
    """One signal for each type among `hits`, in order; more matches make it stronger, up to three."""
    grouped: dict[SignalType, list[Hit]] = {}
    for hit in hits:
        grouped.setdefault(SIGNAL_OF_KIND[hit.kind], []).append(hit)
    signals = []
    for type_, members in grouped.items():
        matches = sum(hit.weight for hit in members)
        evidence = " … ".join(dict.fromkeys(hit.evidence for hit in members))
        signals.append(FeedbackSignal.of(type_, (min(matches, 3) - 1) / 2, evidence))
    return signals


def sureness_of(hits: list[Hit], conceded: bool) -> float:
    """Confidence of patterns: each agreeing match adds to it, contradiction takes most of it away."""
    if not hits:
        return UNSURE
    doubt = {True: 1.0, False: 1.0}
    for hit in hits:
        sureness = SURENESS[hit.kind] * (0.85 if hit.flipped else 1.0)
        doubt[hit.kind in POSITIVE_KINDS] *= 1.0 - sureness
    confidence = abs(doubt[True] - doubt[False])
    if doubt[True] < 1.0 and doubt[False] < 1.0:
        confidence *= 0.5
    return max(confidence * (0.9 if conceded else 1.0), UNSURE)


def patterns(text: str, embedding: FloatArray | None = None) -> Reading:
    """The transparent reader: phrases and the words around them. Needs no embedding."""
    hits, cues = read(text)
    return Reading(signals_of(hits), sureness_of(hits, bool(cues.conceded)))


class Semantic:
    """Patterns and meaning as one: a head decides that saw the embedding, words and patterns.

    It abstains where it is not sure, and then the reply counts as going on and no more. Where there is no
    embedding, or one that the head does not know (another encoder, another language), patterns alone decide.
    """

    SURE = 0.5
    """Probability from which a sign is taken."""
    PRAISE_UNWORDED, BLAME_UNWORDED = 0.75, 0.6
    """The same where no phrase was found: praise is guessed wrong oftener than blame."""
    AGAINST = 0.3
    """Probability of the opposite sign from which nothing is taken."""

    def __init__(self, head: Head | None = None) -> None:
        self.head = head or load_head()

    def __call__(self, text: str, embedding: FloatArray | None) -> Reading:
        hits, cues = read(text)
        written = Reading(signals_of(hits), sureness_of(hits, bool(cues.conceded)))
        is_rating = len(hits) == 1 and hits[0].start == hits[0].end
        if embedding is None or cues.foreign or is_rating or not self.head.knows(embedding):
            return written
        meaning = self.head.read(text, embedding, pattern_features(hits, cues))
        p = meaning.probabilities
        positive, missed = float(p[0]), float(p[1] + p[2] + p[3])
        sides = (
            (True, positive, missed, self.PRAISE_UNWORDED),
            (False, missed, positive, self.BLAME_UNWORDED),
        )
        for praise, sure, against, unworded in sides:
            if sure >= (self.SURE if hits else unworded) and against <= self.AGAINST:
                return Reading(self._signals(meaning, praise, written.signals), sure)
        return Reading([], min(UNSURE, 1.0 - max(positive, missed)))

    def _signals(self, meaning: Meaning, praise: bool, written: list[FeedbackSignal]) -> list[FeedbackSignal]:
        """The patterns' signals of that sign, else one of the likeliest class, as strong as it is likely."""
        agreeing = [s for s in written if (s.reward > 0) == praise]
        if agreeing:
            return agreeing
        p = meaning.probabilities
        best = 0 if praise else 1 + int(np.argmax(p[1:4]))
        evidence = meaning.evidence[0 if praise else 1] or f"[meaning, {p[best]:.0%} {CLASSES[best]}]"
        return [FeedbackSignal.of(SignalType(CLASSES[best]), max(float(p[best]) - 0.5, 0.0), evidence)]


EXTRACTORS: dict[str, Callable[[], Extractor]] = {"patterns-1": lambda: patterns, "semantic-2": Semantic}
"""Name and version of every extractor, and what makes it. A changed reading gets a new version."""
DEFAULT_EXTRACTOR = "semantic-2"
"""The better one by `python -m benchmarks.feedback`; without an embedding it reads as "patterns-1" does."""


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

    def __init__(self, extractor: str = DEFAULT_EXTRACTOR) -> None:
        """
        Args:
            extractor: a key of `EXTRACTORS`.

        Raises:
            ConfigError: no such extractor.
        """
        if extractor not in EXTRACTORS:
            raise ConfigError(f"extractor is {extractor!r}, wanted one of {', '.join(sorted(EXTRACTORS))}")
        self.extractor = extractor
        self._extract = EXTRACTORS[extractor]()

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
        if not isinstance(text, str):
            raise InputError(f"the reply is {type(text).__name__}, wanted a string")
        now = _unit(embedding, "embedding")
        before = _unit(previous_embedding, "previous_embedding")
        if now is not None and before is not None and now.shape != before.shape:
            raise DimensionError("previous_embedding", before.shape, now.shape)
        if not text.strip():
            signals = [_engagement()] if conversation_continued else []
            return Feedback.of(signals, UNSURE if signals else 0.0, self.extractor)

        reading = self._extract(text, now)
        signals = list(reading.signals)
        confidence = reading.confidence
        similarity = float(now @ before) if now is not None and before is not None else None
        if not signals and _asks_again(text, previous_text, similarity):
            signals.append(FeedbackSignal.of(SignalType.CORRECTION, 0.5, "[the same request again]"))
            confidence = 0.7
        if topic_switched is None:
            topic_switched = (
                not signals and similarity is not None and similarity < OTHER_TOPIC and len(text.split()) > 3
            )
        if topic_switched:
            signals.append(FeedbackSignal.of(SignalType.DISENGAGEMENT, 1.0, "[the topic switched]"))
        elif conversation_continued and not any(signal.reward < 0 for signal in signals):
            signals.append(_engagement())
        return Feedback.of(signals, confidence, self.extractor)

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


def _unit(embedding: FloatArray | None, what: str) -> FloatArray | None:
    if embedding is None:
        return None
    vector = as_float32(embedding, what, 1)
    norm = float(np.linalg.norm(vector))
    return vector / np.float32(norm) if norm > 0 else vector


def _asks_again(text: str, previous: str | None, similarity: float | None) -> bool:
    now = _words(text)
    if len(now) < 3:
        return False
    if similarity is not None and similarity >= SAME_MEANING:
        return True
    before = _words(previous or "")
    return len(before) >= 3 and len(now & before) >= SAME_REQUEST * len(now | before)


def _words(text: str) -> set[str]:
    return set("".join(c if c.isalnum() else " " for c in text.lower()).split())
