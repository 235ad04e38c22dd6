"""Extractors of explicit feedback signals from replies.

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

PRECISION = {
    "P": 0.85, "S": 0.9, "T": 0.85, "Z": 0.6, "N": 0.85, "F": 0.8, "I": 0.8,
    "X": 0.75, "x": 0.4, "Q": 0.8, "q": 0.5,
}  # fmt: skip
"""Precision of the sign of a single phrase, by kind."""

UNSURE = 0.1
"""Confidence without explicit signals: that the user continues, or not, is weak evidence."""


@dataclass(frozen=True, slots=True)
class Extraction:
    """The explicit signals of a reply, and the confidence in their sign."""

    signals: Sequence[FeedbackSignal]
    confidence: float


class Extractor(Protocol):
    """Extracts explicit signals from independent replies.

    `embeddings` are those of the replies, None where not available. Without `evidence` the signals need not
    include the words that caused them.
    """

    def __call__(
        self, texts: Sequence[str], embeddings: Sequence[FloatArray | None], *, evidence: bool
    ) -> list[Extraction]: ...


def signals_of(hits: list[Hit]) -> list[FeedbackSignal]:
    """One signal for each type among `hits`, in order; its strength grows with the matches, up to three."""
    grouped: dict[SignalType, list[Hit]] = {}
    for hit in hits:
        grouped.setdefault(SIGNAL_OF_KIND[hit.kind], []).append(hit)
    signals = []
    for type_, members in grouped.items():
        matches = sum(hit.weight for hit in members)
        evidence = " … ".join(dict.fromkeys(hit.evidence for hit in members))
        signals.append(FeedbackSignal.of(type_, (min(matches, 3) - 1) / 2, evidence))
    return signals


def pattern_confidence(hits: list[Hit], conceded: bool) -> float:
    """Confidence of the pattern extractor: agreeing matches increase it, contradictions reduce it."""
    if not hits:
        return UNSURE
    doubt = {True: 1.0, False: 1.0}
    for hit in hits:
        precision = PRECISION[hit.kind] * (0.85 if hit.flipped else 1.0)
        doubt[hit.kind in POSITIVE_KINDS] *= 1.0 - precision
    confidence = abs(doubt[True] - doubt[False])
    if doubt[True] < 1.0 and doubt[False] < 1.0:
        confidence *= 0.5
    return max(confidence * (0.9 if conceded else 1.0), UNSURE)


def patterns(
    texts: Sequence[str], embeddings: Sequence[FloatArray | None], *, evidence: bool
) -> list[Extraction]:
    """Extracts signals by phrases and the words around them. Ignores the embeddings."""
    return [_by_patterns(*read(text, evidence=evidence)) for text in texts]


def _by_patterns(hits: list[Hit], cues: Cues) -> Extraction:
    return Extraction(signals_of(hits), pattern_confidence(hits, bool(cues.conceded)))


class Semantic:
    """Extracts signals by a classifier (the head) on sentence embedding, words and pattern matches.

    Below its thresholds the head abstains, and there are no explicit signals. Without an embedding, or with
    one that is unlike those of the training (a different encoder or language), only the patterns decide.
    """

    THRESHOLD = 0.5
    """Minimum probability of a sign."""
    POSITIVE_WITHOUT_PHRASE, NEGATIVE_WITHOUT_PHRASE = 0.75, 0.6
    """The same if no phrase matched; positive predictions are then wrong more often than negative ones."""
    MAX_OPPOSITE = 0.3
    """Maximum probability of the opposite sign."""
    BATCH = 128
    """Maximum number of replies per call of the head, so that its arrays fit into the processor's caches."""

    def __init__(self, head: Head | None = None) -> None:
        self.head = head or load_head()

    def __call__(
        self, texts: Sequence[str], embeddings: Sequence[FloatArray | None], *, evidence: bool
    ) -> list[Extraction]:
        seen = [read(text, evidence=evidence) for text in texts]
        out = [_by_patterns(*hits_and_cues) for hits_and_cues in seen]
        usable = [
            i
            for i, ((hits, cues), embedding) in enumerate(zip(seen, embeddings, strict=True))
            if embedding is not None
            and embedding.shape == (self.head.dim,)
            and not cues.foreign
            and not (len(hits) == 1 and hits[0].start == hits[0].end)  # a rating or an emoji
        ]
        for start in range(0, len(usable), self.BATCH):
            chunk = usable[start : start + self.BATCH]
            meanings = self.head.read(
                [texts[i] for i in chunk],
                np.stack([e for i in chunk if (e := embeddings[i]) is not None]),
                np.array([pattern_features(*seen[i]) for i in chunk]),
                evidence=evidence,
            )
            for i, meaning in zip(chunk, meanings, strict=True):
                if meaning.share >= self.head.least_share:
                    out[i] = self._decide(meaning, out[i].signals, bool(seen[i][0]))
        return out

    def _decide(self, meaning: Meaning, matched: Sequence[FeedbackSignal], has_phrase: bool) -> Extraction:
        p = meaning.probabilities
        positive, negative = p[0], p[1] + p[2] + p[3]
        signs = (
            (True, positive, negative, self.POSITIVE_WITHOUT_PHRASE),
            (False, negative, positive, self.NEGATIVE_WITHOUT_PHRASE),
        )
        for is_positive, probability, opposite, without_phrase in signs:
            threshold = self.THRESHOLD if has_phrase else without_phrase
            if probability >= threshold and opposite <= self.MAX_OPPOSITE:
                return Extraction(self._signals(meaning, is_positive, matched), probability)
        return Extraction([], min(UNSURE, 1.0 - max(positive, negative)))

    def _signals(
        self, meaning: Meaning, is_positive: bool, matched: Sequence[FeedbackSignal]
    ) -> list[FeedbackSignal]:
        """The pattern signals of this sign, else one signal of the most probable class of this sign."""
        agreeing = [s for s in matched if (s.reward > 0) == is_positive]
        if agreeing:
            return agreeing
        p = meaning.probabilities
        best = 0 if is_positive else max((1, 2, 3), key=p.__getitem__)
        evidence = meaning.evidence[0 if is_positive else 1] or f"[meaning, {p[best]:.0%} {CLASSES[best]}]"
        return [FeedbackSignal.of(SignalType(CLASSES[best]), max(p[best] - 0.5, 0.0), evidence)]


EXTRACTORS: dict[str, Callable[[], Extractor]] = {"patterns-1": lambda: patterns, "semantic-2": Semantic}
"""Name and version of each extractor, and its factory. A change of the results gets a new version."""
DEFAULT_EXTRACTOR = "semantic-2"
"""The best one in `python -m benchmarks.feedback`; without embeddings its results are those of patterns-1."""
