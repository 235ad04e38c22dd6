"""Reading a reply by its meaning: a small calibrated head on the sentence embedding that is already there.

The head sees the embedding and what the patterns saw, and gives a probability to each of five classes: the
four explicit signals, and "nothing said of the answer". It was trained by
`benchmarks/train_feedback_head.py` on sentences written for it; its weights lie beside this module as
safetensors. numpy alone: no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import safe_open

from cortex_core.errors import WeightsError
from cortex_core.feedback_scope import Cues, Hit
from cortex_core.replay_buffer import FloatArray

CLASSES = ("positive", "negative", "correction", "confusion", "neutral")
"""What the head tells apart; "neutral" says nothing of the answer."""
HEAD = Path(__file__).parent / "data" / "feedback_head.safetensors"
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
class Head:
    """An ensemble of M two-layer networks, averaged in logits.

    D embedding, F features, H hidden, C classes.
    """

    embedding_weight: FloatArray
    """(D, M * H)"""
    feature_weight: FloatArray
    """(F, M * H)"""
    hidden_bias: FloatArray
    """(M * H,)"""
    output_weight: FloatArray
    """(M * H, C), divided by M and by the temperature."""
    output_bias: FloatArray
    """(C,)"""
    basis: FloatArray
    """(D, B) orthonormal directions that hold most of any sentence of the known encoder."""
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

    def probabilities(self, embedding: FloatArray, features: FloatArray) -> npt.NDArray[np.float64]:
        """(C,) calibrated probabilities of `CLASSES`."""
        hidden = np.maximum(
            embedding @ self.embedding_weight + features @ self.feature_weight + self.hidden_bias, 0.0
        )
        logits = (hidden @ self.output_weight + self.output_bias).astype(np.float64)
        odds = np.exp(logits - logits.max())
        result: npt.NDArray[np.float64] = odds / odds.sum()
        return result


@cache
def load_head(path: Path = HEAD) -> Head:
    """The shipped head.

    Raises:
        WeightsError: the file is missing, damaged, or of other features than this code computes.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118
        head = Head(least_share=float(metadata["least_share"]), **arrays)
    except Exception as error:
        raise WeightsError(f"the feedback head {path} cannot be read: {error}") from error
    if metadata.get("classes") != ",".join(CLASSES) or head.feature_weight.shape[0] != FEATURES:
        raise WeightsError(
            f"the feedback head {path} has {head.feature_weight.shape[0]} features, wanted {FEATURES}; "
            "train it again with `python -m benchmarks.train_feedback_head`"
        )
    return head
