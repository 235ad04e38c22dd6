"""Feedback extraction by meaning: a small calibrated classifier (the head) on the sentence embedding of a
reply.

The inputs are the embedding, the words and the pattern features; the outputs are the probabilities of five
classes: the four explicit signals, and "neutral". Words are vectors of a shipped table; a convolution over
three neighbouring words with max pooling (Kim 2014, "Convolutional Neural Networks for Sentence
Classification") keeps information that the embedding, an average, loses. Trained by
`benchmarks/train_feedback_head.py` on sentences written for it; the weights are in `data/`. Uses only numpy.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from cortex_core.arrays import DoubleArray, FloatArray
from cortex_core.errors import WeightsError
from cortex_core.feedback.scope import Cues, Hit
from cortex_core.feedback.tokens import PADDING, Vocabulary, tokens, words

CLASSES = ("positive", "negative", "correction", "confusion", "neutral")
"""Classes of the head; a "neutral" reply does not concern the answer."""
HEAD = Path(__file__).parent / "data" / "head.safetensors"
ENCODER = "all-MiniLM-L6-v2"
"""The sentence encoder that the head was trained with."""

WEIGHT_GRID = 2.0**-24
"""Every float16 is a multiple of it."""
INPUT_GRID, WINDOW_GRID, UNIT_GRID = 2.0**-20, 2.0**-19, 2.0**-16
"""Rounding steps of inputs, of window weights, and of channels and hidden units."""
MOST_ACTIVE = 256.0
"""Maximum of a hidden unit, far above the values that occur."""
MOST_FEATURE = 3.0

_KINDS = "PSTZNFIXxQq"
_PLACE = {kind: place for place, kind in enumerate(_KINDS)}
FEATURES = 3 * len(_KINDS) + 14


def pattern_features(hits: Sequence[Hit], cues: Cues) -> list[float]:
    """(FEATURES,) pattern features: numbers of counted, cancelled and conceded matches by kind; and cues."""
    n = len(_KINDS)
    kinds = [0.0] * (3 * n)
    for hit in hits:
        place = _PLACE[hit.kind]
        kinds[place] = min(kinds[place] + min(hit.weight, 2) * (0.7 if hit.flipped else 1.0), MOST_FEATURE)
    for first, seen in ((n, cues.cancelled), (2 * n, cues.conceded)):
        for kind in seen:
            kinds[first + _PLACE[kind]] = min(kinds[first + _PLACE[kind]] + 1.0, MOST_FEATURE)
    return [
        *kinds,
        min(cues.words, 30) / 10,
        float(cues.words <= 3),
        min(cues.sentences, 4) / 2,
        min(cues.questions, 2),
        min(cues.exclamations, 2),
        min(cues.negators, 3),
        min(cues.requests, 2),
        float(cues.contrast),
        float(cues.leading_no),
        float(cues.leading_yes),
        float(cues.code),
        float(cues.quoted),
        float(cues.possessive),
        float(not hits),
    ]


@dataclass(frozen=True, slots=True)
class Meaning:
    """The result of the head for one reply."""

    probabilities: tuple[float, ...]
    """(C,) calibrated probabilities of `CLASSES`"""
    share: float
    """Fraction of the embedding's squared norm within the basis, in [0, 1]."""
    evidence: tuple[str, str] = ("", "")
    """The words that contributed most to a positive and to a negative result; "" for none."""


class WordWindows:
    """What each word adds to the three windows that it is in, computed when a word first comes.

    W: components of a word, C: channels.
    """

    CAPACITY = 4096
    """Words kept, in 19 MB; beyond it all are computed anew as they come."""

    def __init__(self, word_vectors: npt.NDArray[np.int8], window_weight: FloatArray) -> None:
        """Takes (V, W) vectors, and (3 * W, C) weights of the previous word, the word and the next word."""
        self._vectors = word_vectors
        size = word_vectors.shape[1]
        self._weight = np.hstack([window_weight[k * size : (k + 1) * size] for k in range(3)])
        self._slot = np.full(len(word_vectors), -1)
        self._added = np.zeros((0, 3, window_weight.shape[1]), np.float32)
        self._used = 0
        self._lock = threading.Lock()

    def sums(
        self, before: npt.NDArray[np.intp], word: npt.NDArray[np.intp], after: npt.NDArray[np.intp]
    ) -> FloatArray:
        """(n, C) sums over n windows, given the rows of their (n,) words.

        The products are exact (see `Head`), and so is their sum in any order.
        """
        with self._lock:
            self._require(np.unique(np.concatenate((before[:1], word))))
            out: FloatArray = self._added[self._slot[before], 0]
            out += self._added[self._slot[word], 1]
            out += self._added[self._slot[after], 2]
        return out

    def _require(self, rows: npt.NDArray[np.intp]) -> None:
        """Fills in what is missing of these words; forgets all others where there is no room."""
        missing = rows[self._slot[rows] < 0]
        if not len(missing):
            return
        if self._used + len(missing) > len(self._added):
            self._slot.fill(-1)
            self._used, missing = 0, rows
            if len(rows) > len(self._added):
                self._added = np.zeros((max(len(rows), self.CAPACITY), *self._added.shape[1:]), np.float32)
        end = self._used + len(missing)
        products = self._vectors[missing].astype(np.float32) @ self._weight
        self._added[self._used : end] = products.reshape(len(missing), 3, -1)
        self._slot[missing] = np.arange(self._used, end)
        self._used = end


@dataclass(frozen=True, slots=True)
class Head:
    """An ensemble of networks whose logits are averaged; the first M of them use words.

    D: embedding, F: features, V: words of W components, K: channels, H: hidden units of each of the M
    networks, T: hidden units of all networks, C: classes, B: directions of the basis.

    The results do not depend on the batch, on the summation order of BLAS or on the machine: the inputs of
    each product are fixed-point numbers with so few digits that every partial sum is exact in its float type.
    The shipped weights are float16 and thus multiples of 2**-24; other inputs are rounded to `INPUT_GRID` and
    similar steps, which are finer than float16.
    """

    input_weight: DoubleArray
    """(D + F + 1, T + B): weights of the embedding, the features and a constant 1; then the basis: (D, B)
    orthonormal directions that contain most of any sentence embedding of `ENCODER`, above zeros"""
    window_weight: FloatArray
    """(3 * W, M * K) weights of the previous word, the word and the next word"""
    window_bias: FloatArray
    """(M * K,)"""
    channel_weight: DoubleArray
    """(M, K, H)"""
    output_weight: DoubleArray
    """(T, C), divided by the number of networks and the temperature"""
    output_bias: DoubleArray
    """(C,)"""
    word_vectors: npt.NDArray[np.int8]
    """(V + 2, W): padding, the unknown word and the vocabulary; the scale is in `window_weight`"""
    vocabulary: Vocabulary
    dim: int
    """D"""
    least_share: float
    """minimum `Meaning.share`; smaller for embeddings of a different encoder or language"""
    word_windows: WordWindows = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "word_windows", WordWindows(self.word_vectors, self.window_weight))

    def read(
        self, texts: Sequence[str], embeddings: FloatArray, features: FloatArray, *, evidence: bool = True
    ) -> list[Meaning]:
        """Classifies n replies by their words, (n, D) embeddings of any norm and (n, F) pattern features."""
        rows = [self.vocabulary.rows(words(text)) for text in texts]
        channels, strongest = self._channels(rows, locate=evidence)
        inputs = np.ones((len(texts), len(self.input_weight)))
        inputs[:, : self.dim] = embeddings
        norms = [math.sqrt(row @ row) for row in inputs[:, : self.dim]]
        inputs[:, : self.dim] /= np.array([norm if norm > 0 else 1.0 for norm in norms])[:, None]
        inputs[:, self.dim : -1] = features
        summed = _rounded(inputs, INPUT_GRID) @ self.input_weight
        members, _, width = self.channel_weight.shape
        of_words = np.matmul(channels.reshape(len(texts), members, -1).swapaxes(0, 1), self.channel_weight)
        for member in range(members):
            summed[:, member * width : (member + 1) * width] += of_words[member]
        units = len(self.output_weight)
        active = _rounded(summed[:, :units].clip(0.0, MOST_ACTIVE), UNIT_GRID)
        logits = active @ self.output_weight + self.output_bias
        inside = _rounded(summed[:, units:], INPUT_GRID)
        shares = (inside * inside).sum(1).tolist()
        meanings = []
        for i, (row, share) in enumerate(zip(logits.tolist(), shares, strict=True)):
            most = max(row)
            odds = [math.exp(logit - most) for logit in row]
            total = math.fsum(odds)
            found = ("", "")
            if evidence:
                found = self._evidence(texts[i], strongest[i], channels[i], active[i] > 0)
            meanings.append(Meaning(tuple([p / total for p in odds]), share, found))
        return meanings

    def _channels(
        self, rows: Sequence[Sequence[int]], locate: bool
    ) -> tuple[DoubleArray, list[npt.NDArray[np.intp]]]:
        """(n, M * K) maximum of each channel over a reply's windows; with `locate` also its position."""
        out = np.zeros((len(rows), len(self.window_bias)))
        where = [np.zeros(0, dtype=np.intp)] * len(rows)
        filled = [i for i, row in enumerate(rows) if row]
        if filled:
            # All replies in one sequence, each between two paddings, where no window is.
            padded = np.array([row for i in filled for row in (PADDING, *rows[i], PADDING)])
            lengths = np.array([len(rows[i]) for i in filled])
            starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
            middle = np.arange(lengths.sum()) + np.repeat(2 * np.arange(len(filled)) + 1, lengths)
            windows = self.word_windows.sums(padded[middle - 1], padded[middle], padded[middle + 1])
            out[filled] = np.maximum.reduceat(windows, starts) + self.window_bias.astype(np.float64)
            if locate:
                for i, start in zip(filled, starts, strict=True):
                    where[i] = windows[start : start + len(rows[i])].argmax(0)
        return _rounded(out.clip(0.0), UNIT_GRID), where

    def _evidence(
        self,
        text: str,
        where: npt.NDArray[np.intp],
        channels: DoubleArray,
        active: npt.NDArray[np.bool_],
    ) -> tuple[str, str]:
        """The words of the windows that contributed most to the positive and to the negative logits."""
        _, spans = tokens(text)
        if not spans:
            return "", ""
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

    def is_exact(self) -> bool:
        """Whether every partial sum fits into its float type: 53 bits, 24 bits in the convolution."""
        embedding = np.sqrt((self.input_weight[: self.dim] ** 2).sum(0))  # of a vector of length 1
        others = np.abs(self.input_weight[self.dim :]).sum(0) * MOST_FEATURE
        word = float(np.sqrt((self.word_vectors.astype(np.float64) ** 2).sum(1).max()))
        window = 3**0.5 * word * np.sqrt((self.window_weight.astype(np.float64) ** 2).sum(0))
        channel = np.maximum(window + self.window_bias, 0.0).reshape(len(self.channel_weight), -1, 1)
        of_words = (channel * np.abs(self.channel_weight)).sum(1)
        output = MOST_ACTIVE * np.abs(self.output_weight).sum(0)
        return bool(
            (1.01 * embedding + others).max() < 2**53 * INPUT_GRID * WEIGHT_GRID
            and window.max() < 2**24 * WINDOW_GRID
            and of_words.max() < 2**53 * UNIT_GRID * WEIGHT_GRID
            and output.max() < 2**53 * UNIT_GRID * WEIGHT_GRID
        )


def _rounded(values: DoubleArray, grid: float) -> DoubleArray:
    """Rounds `values` to multiples of `grid`, a power of two."""
    # Adding a large number rounds away the digits below the grid: twice as fast as multiplying and `rint`.
    shift = 1.5 * 2.0**52 * grid
    rounded: DoubleArray = values + shift
    rounded -= shift
    return rounded


@cache
def load_head(path: Path = HEAD) -> Head:
    """Loads the shipped head.

    Raises:
        WeightsError: the file is missing, damaged, or has different features than this code computes.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        floats = {name: array.astype(np.float64) for name, array in arrays.items() if name != "words"}
        embedding, features, bias = (
            floats[name] for name in ("embedding_weight", "feature_weight", "hidden_bias")
        )
        head = Head(
            input_weight=np.hstack(
                (
                    np.vstack((embedding, features, bias)),
                    np.pad(floats["basis"], ((0, len(features) + 1), (0, 0))),
                )
            ),
            window_weight=_rounded(floats["window_weight"], WINDOW_GRID).astype(np.float32),
            window_bias=floats["window_bias"].astype(np.float32),
            channel_weight=floats["channel_weight"],
            output_weight=floats["output_weight"],
            output_bias=floats["output_bias"],
            word_vectors=arrays["word_vectors"],
            vocabulary=Vocabulary(arrays["words"].tobytes().decode().split(" ")),
            dim=len(embedding),
            least_share=float(metadata["least_share"]),
        )
        exact = head.is_exact()
    except Exception as error:
        raise WeightsError(f"the feedback head {path} cannot be read: {error}") from error
    if metadata.get("classes") != ",".join(CLASSES) or len(features) != FEATURES or not exact:
        raise WeightsError(
            f"the feedback head {path} has {len(features)} features, expected {FEATURES}, and weights that "
            f"are {'small enough' if exact else 'too large'} for exact sums; train it again with "
            "`python -m benchmarks.train_feedback_head`"
        )
    return head
