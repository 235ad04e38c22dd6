"""Reading a reply by its meaning: a small calibrated head on the sentence embedding that is already there.

The head sees the embedding, the words and what the patterns saw, and gives a probability to each of five
classes: the four explicit signals, and "nothing said of the answer". Words are vectors of a shipped table;
a convolution over three neighbours each and the maximum over the reply (Kim 2014, "Convolutional Neural
Networks for Sentence Classification") keep what the embedding, an average, loses.
`benchmarks/train_feedback_head.py` trained it on sentences written for it; its weights are in `data/`.
numpy alone: no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from cortex_core.arrays import FloatArray
from cortex_core.errors import WeightsError
from cortex_core.feedback.scope import Cues, Hit
from cortex_core.feedback.tokens import PADDING, Vocabulary, tokens

CLASSES = ("positive", "negative", "correction", "confusion", "neutral")
"""What the head tells apart; "neutral" says nothing of the answer."""
HEAD = Path(__file__).parent / "data" / "head.safetensors"
ENCODER = "all-MiniLM-L6-v2"
"""The sentence encoder whose embeddings the head knows."""

_KINDS = "PSTZNFIXxQq"
FEATURES = 3 * len(_KINDS) + 14


def pattern_features(hits: Sequence[Hit], cues: Cues) -> FloatArray:
    """(FEATURES,) what the patterns saw: matches by kind that count, were cancelled or gave way; and cues."""
    out = np.zeros(FEATURES, dtype=np.float32)
    n = len(_KINDS)
    for hit in hits:
        out[_KINDS.index(hit.kind)] += min(hit.weight, 2) * (0.7 if hit.flipped else 1.0)
    for kind in cues.cancelled:
        out[n + _KINDS.index(kind)] += 1.0
    for kind in cues.conceded:
        out[2 * n + _KINDS.index(kind)] += 1.0
    out[: 3 * n] = np.minimum(out[: 3 * n], 3.0)
    out[3 * n :] = (
        min(cues.words, 30) / 10,
        cues.words <= 3,
        min(cues.sentences, 4) / 2,
        min(cues.questions, 2),
        min(cues.exclamations, 2),
        min(cues.negators, 3),
        min(cues.requests, 2),
        cues.contrast,
        cues.leading_no,
        cues.leading_yes,
        cues.code,
        cues.quoted,
        cues.possessive,
        not hits,
    )
    return out


@dataclass(frozen=True, slots=True)
class Meaning:
    """What the head makes of one reply."""

    probabilities: npt.NDArray[np.float64]
    """(C,) calibrated, of `CLASSES`"""
    evidence: tuple[str, str]
    """The words of the reply that spoke most for praise, and those that spoke most against; "" for none."""


@dataclass(frozen=True, slots=True)
class Head:
    """An ensemble of networks, averaged in logits; the first M of them see words.

    D embedding, F features, V words of W components, K channels, H hidden units of each of the M, T of all,
    C classes.
    """

    embedding_weight: FloatArray
    """(D, T)"""
    feature_weight: FloatArray
    """(F, T)"""
    hidden_bias: FloatArray
    """(T,)"""
    window_weight: FloatArray
    """(3 * W, M * K), of a word and its neighbours, the earlier first"""
    window_bias: FloatArray
    """(M * K,)"""
    channel_weight: FloatArray
    """(M, K, H)"""
    output_weight: FloatArray
    """(T, C), divided by the number of networks and by the temperature"""
    output_bias: FloatArray
    """(C,)"""
    basis: FloatArray
    """(D, B) orthonormal directions that hold most of any sentence of the known encoder"""
    word_vectors: npt.NDArray[np.int8]
    """(V + 2, W): padding, the unknown word, and each of the vocabulary; their scale is in `window_weight`"""
    vocabulary: Vocabulary
    least_share: float
    """Share of a unit embedding within `basis` below which it is of another encoder, or another language."""

    @property
    def dim(self) -> int:
        return int(self.embedding_weight.shape[0])

    def knows(self, embedding: FloatArray) -> bool:
        """Whether `embedding` (D,), of length 1, looks like one of the encoder that the head knows."""
        if embedding.shape != (self.dim,):
            return False
        inside = embedding @ self.basis
        return float(inside @ inside) >= self.least_share

    def read(self, text: str, embedding: FloatArray, features: FloatArray) -> Meaning:
        """What a reply means, by its words, its (D,) embedding and the (F,) features of its patterns."""
        words, spans = tokens(text)
        rows = np.full(len(words) + 2, PADDING)
        rows[1:-1] = self.vocabulary.rows(words)
        vectors = self.word_vectors[rows].astype(np.float32)
        hidden = embedding @ self.embedding_weight + features @ self.feature_weight + self.hidden_bias
        where = None
        channels = np.zeros(self.window_bias.shape, dtype=np.float32)
        if words:
            windows = np.concatenate((vectors[:-2], vectors[1:-1], vectors[2:]), axis=1) @ self.window_weight
            where = windows.argmax(0)
            channels = np.maximum(windows.max(0) + self.window_bias, 0.0)
        of_words = np.matmul(channels.reshape(len(self.channel_weight), 1, -1), self.channel_weight).ravel()
        hidden[: len(of_words)] += of_words
        active = np.maximum(hidden, 0.0)
        logits = (active @ self.output_weight + self.output_bias).astype(np.float64)
        odds = np.exp(logits - logits.max())
        evidence = ("", "")
        if where is not None:
            evidence = self._evidence(text, spans, where, channels, hidden > 0)
        return Meaning(odds / odds.sum(), evidence)

    def _evidence(
        self,
        text: str,
        spans: Sequence[tuple[int, int]],
        where: npt.NDArray[np.intp],
        channels: FloatArray,
        active: npt.NDArray[np.bool_],
    ) -> tuple[str, str]:
        """The windows whose channels, through the hidden units, moved praise against complaint most."""
        tilt = self.output_weight[:, 0] - self.output_weight[:, 1:4].mean(1)
        members, _, units = self.channel_weight.shape
        through = (active * tilt)[: members * units].reshape(members, units, 1)
        moved = channels * np.matmul(self.channel_weight, through).ravel()
        of_word = np.bincount(where, weights=moved, minlength=len(spans))
        found = []
        for sign in (1.0, -1.0):
            best = int(np.argmax(sign * of_word))
            first, last = max(best - 1, 0), min(best + 1, len(spans) - 1)
            found.append(text[spans[first][0] : spans[last][1]] if sign * of_word[best] > 0 else "")
        return found[0], found[1]


@cache
def load_head(path: Path = HEAD) -> Head:
    """The shipped head.

    Raises:
        WeightsError: the file is missing, damaged, or of other features than this code computes.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        words = Vocabulary(arrays.pop("words").tobytes().decode().split(" "))
        vectors = arrays.pop("word_vectors")
        floats = {name: array.astype(np.float32) for name, array in arrays.items()}
        head = Head(
            least_share=float(metadata["least_share"]), vocabulary=words, word_vectors=vectors, **floats
        )
    except Exception as error:
        raise WeightsError(f"the feedback head {path} cannot be read: {error}") from error
    if metadata.get("classes") != ",".join(CLASSES) or head.feature_weight.shape[0] != FEATURES:
        raise WeightsError(
            f"the feedback head {path} has {head.feature_weight.shape[0]} features, wanted {FEATURES}; "
            "train it again with `python -m benchmarks.train_feedback_head`"
        )
    return head
