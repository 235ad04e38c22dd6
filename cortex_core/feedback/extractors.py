"""Extractors: what reads explicit feedback signals out of replies.

extract = EXTRACTORS["semantic-2"]()
[found] = extract(["Thanks, that worked!"], [embedding], evidence=True)
found.signals, found.confidence
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cortex_core.arrays import FloatArray
from cortex_core.feedback.patterns import POSITIVE_KINDS, read
from cortex_core.feedback.scope import Cues, Hit
from cortex_core.feedback.semantic import CLASSES, Head, Meaning, load_head, pattern_features
from cortex_core.feedback.signals import FeedbackSignal, SignalType

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


@dataclass(frozen=True, slots=True)
class Extraction:
    """What an extractor makes of one reply: explicit signals alone, and how sure it is of their sign."""

    signals: Sequence[FeedbackSignal]
    confidence: float


class Extractor(Protocol):
    """Reads explicit signals out of replies, each by itself: no reading depends on the others beside it.

    `embeddings` are the replies' own, None where none is at hand. Without `evidence` the signals need not
    name the words that carried them.
    """

    def __call__(
        self, texts: Sequence[str], embeddings: Sequence[FloatArray | None], *, evidence: bool
    ) -> list[Extraction]: ...


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


def patterns(
    texts: Sequence[str], embeddings: Sequence[FloatArray | None], *, evidence: bool
) -> list[Extraction]:
    """The transparent reader: phrases and the words around them. Needs no embedding."""
    return [_written(*read(text, evidence=evidence)) for text in texts]


def _written(hits: list[Hit], cues: Cues) -> Extraction:
    return Extraction(signals_of(hits), sureness_of(hits, bool(cues.conceded)))


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
    AT_ONCE = 128
    """Replies that go through the head together, at most: what they need lies in the processor's caches."""

    def __init__(self, head: Head | None = None) -> None:
        self.head = head or load_head()

    def __call__(
        self, texts: Sequence[str], embeddings: Sequence[FloatArray | None], *, evidence: bool
    ) -> list[Extraction]:
        seen = [read(text, evidence=evidence) for text in texts]
        out = [_written(*hits_and_cues) for hits_and_cues in seen]
        asked = [
            i
            for i, ((hits, cues), embedding) in enumerate(zip(seen, embeddings, strict=True))
            if embedding is not None
            and embedding.shape == (self.head.dim,)
            and not cues.foreign
            and not (len(hits) == 1 and hits[0].start == hits[0].end)  # a rating, or a picture
        ]
        for start in range(0, len(asked), self.AT_ONCE):
            chunk = asked[start : start + self.AT_ONCE]
            meanings = self.head.read(
                [texts[i] for i in chunk],
                np.stack([e for i in chunk if (e := embeddings[i]) is not None]),
                np.array([pattern_features(*seen[i]) for i in chunk]),
                evidence=evidence,
            )
            for i, meaning in zip(chunk, meanings, strict=True):
                if meaning.share >= self.head.least_share:
                    out[i] = self._judged(meaning, out[i].signals, bool(seen[i][0]))
        return out

    def _judged(self, meaning: Meaning, written: Sequence[FeedbackSignal], worded: bool) -> Extraction:
        p = meaning.probabilities
        positive, missed = p[0], p[1] + p[2] + p[3]
        sides = (
            (True, positive, missed, self.PRAISE_UNWORDED),
            (False, missed, positive, self.BLAME_UNWORDED),
        )
        for praise, sure, against, unworded in sides:
            if sure >= (self.SURE if worded else unworded) and against <= self.AGAINST:
                return Extraction(self._signals(meaning, praise, written), sure)
        return Extraction([], min(UNSURE, 1.0 - max(positive, missed)))

    def _signals(
        self, meaning: Meaning, praise: bool, written: Sequence[FeedbackSignal]
    ) -> list[FeedbackSignal]:
        """The patterns' signals of that sign, else one of the likeliest class, as strong as it is likely."""
        agreeing = [s for s in written if (s.reward > 0) == praise]
        if agreeing:
            return agreeing
        p = meaning.probabilities
        best = 0 if praise else max((1, 2, 3), key=p.__getitem__)
        evidence = meaning.evidence[0 if praise else 1] or f"[meaning, {p[best]:.0%} {CLASSES[best]}]"
        return [FeedbackSignal.of(SignalType(CLASSES[best]), max(p[best] - 0.5, 0.0), evidence)]


EXTRACTORS: dict[str, Callable[[], Extractor]] = {"patterns-1": lambda: patterns, "semantic-2": Semantic}
"""Name and version of every extractor, and what makes it. A changed reading gets a new version."""
DEFAULT_EXTRACTOR = "semantic-2"
"""The better one by `python -m benchmarks.feedback`; without an embedding it reads as "patterns-1" does."""
