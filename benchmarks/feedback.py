"""Accuracy of feedback extraction: this project's extractors against VADER and a logistic regression.

    python -m benchmarks.feedback [--json FILE] [--errors]

Evaluates on the held-out replies of `data/feedback_test.txt` (hard cases also separately) and of
`data/feedback_dialogue.txt`. A prediction is the sign of the reward if there is an explicit signal, else 0.
The logistic regression uses the same embeddings and training replies as the semantic head. Needs the extras
`bench` and `embedded`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, precision_recall_fscore_support, roc_auc_score

from benchmarks.feedback_data import CLASSES, POLARITY, Reply, load
from cortex_core.arrays import DoubleArray, FloatArray
from cortex_core.feedback_collector import Feedback, FeedbackCollector
from cortex_core.text_encoder import load_encoder

Ints = npt.NDArray[np.int64]


class Readings:
    """Predictions of one reader for n replies."""

    def __init__(self, signs: Sequence[int], scores: Sequence[float], classes: Sequence[str] | None) -> None:
        self.signs: Ints = np.asarray(signs, dtype=np.int64)
        """(n,) -1, 0, 1"""
        self.scores: DoubleArray = np.asarray(scores, dtype=np.float64)
        """(n,) larger for more positive replies"""
        self.classes = classes
        """(n,) of `CLASSES`; None for readers without classes"""


def sign_of(feedback: Feedback) -> int:
    """Sign of the reward; 0 without an explicit signal."""
    return int(np.sign(feedback.reward)) if feedback.explicit else 0


def class_of(feedback: Feedback) -> str:
    """Class of the strongest explicit signal."""
    explicit = [s for s in feedback.signals if s.type.value in CLASSES]
    return max(explicit, key=lambda s: abs(s.reward)).type.value if explicit else "neutral"


def collected(name: str, replies: Sequence[Reply], embeddings: FloatArray | None) -> Readings:
    """Predictions of `FeedbackCollector`; the score is reward times confidence."""
    collector = FeedbackCollector(name)
    read = [
        collector.extract(r.text, embedding=None if embeddings is None else embeddings[i])
        for i, r in enumerate(replies)
    ]
    return Readings(
        [sign_of(f) for f in read], [f.reward * f.confidence for f in read], [class_of(f) for f in read]
    )


def vader(replies: Sequence[Reply]) -> Readings:
    """Hutto & Gilbert (2014), with the authors' thresholds: compound ≥ 0.05 or ≤ −0.05."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # noqa: PLC0415

    analyzer = SentimentIntensityAnalyzer()
    scores = [analyzer.polarity_scores(r.text)["compound"] for r in replies]
    return Readings([1 if s >= 0.05 else -1 if s <= -0.05 else 0 for s in scores], scores, None)


def regression(train: Sequence[Reply], x: FloatArray) -> Callable[[FloatArray], Readings]:
    """Multinomial logistic regression on the embeddings of the training replies."""
    model = LogisticRegression(C=10, max_iter=2000).fit(x, [r.label for r in train])
    signs = np.array([POLARITY[c] for c in model.classes_])

    def read(embeddings: FloatArray) -> Readings:
        p = model.predict_proba(embeddings)
        classes = [str(model.classes_[i]) for i in p.argmax(1)]
        return Readings([POLARITY[c] for c in classes], (p @ signs).tolist(), classes)

    return read


def scored(replies: Sequence[Reply], readings: Readings) -> dict[str, Any]:
    """All metrics of one reader on one part."""
    y = np.array([r.polarity for r in replies])
    hard = np.array([r.hard for r in replies])
    p = readings.signs
    precision, recall, f1, _ = precision_recall_fscore_support(y, p, labels=[1, -1, 0], zero_division=0.0)
    said = y != 0
    out: dict[str, Any] = {
        "replies": len(replies),
        "macro_f1": float(f1_score(y, p, average="macro")),
        "macro_f1_hard": float(f1_score(y[hard], p[hard], average="macro")),
        "macro_f1_plain": float(f1_score(y[~hard], p[~hard], average="macro")),
        "opposite": float(np.mean(y * p < 0)),
        "sign_right_when_read": float(np.mean(y[p != 0] == p[p != 0])) if (p != 0).any() else 0.0,
        "auc": float(roc_auc_score(y[said] > 0, readings.scores[said])),
        "polarity": {
            name: {"precision": float(a), "recall": float(b), "f1": float(c)}
            for name, a, b, c in zip(("positive", "negative", "none"), precision, recall, f1, strict=True)
        },
    }
    if readings.classes is not None:
        truth = [r.label for r in replies]
        a, b, c, _ = precision_recall_fscore_support(
            truth, readings.classes, labels=CLASSES, zero_division=0.0
        )
        out["classes"] = {
            name: {"precision": float(x), "recall": float(y), "f1": float(z)}
            for name, x, y, z in zip(CLASSES, a, b, c, strict=True)
        }
    return out


def microseconds(work: Callable[[], object], items: int, rounds: int = 9) -> float:
    """CPU time per item, the best of `rounds`."""
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best / items * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write all metrics to this file")
    parser.add_argument("--errors", action="store_true", help="list the errors of the default extractor")
    args = parser.parse_args()

    encoder = load_encoder("minilm")
    train = load("train")
    read_by_regression = regression(train, encoder.encode_many([r.text for r in train]))
    report: dict[str, Any] = {}
    print(
        f"{'':10} {'reader':22} {'macro-F1':>8} {'plain':>6} {'hard':>6} {'opposite':>8} {'AUC':>6} {'us':>6}"
    )
    for part in ("test", "dialogue"):
        replies = load(part)
        x = encoder.encode_many([r.text for r in replies])
        readers: dict[str, Callable[[], Readings]] = {
            "patterns-1": partial(collected, "patterns-1", replies, None),
            "semantic-2": partial(collected, "semantic-2", replies, x),
            "VADER": partial(vader, replies),
            "logistic regression": partial(read_by_regression, x),
        }
        report[part] = {}
        for name, reader in readers.items():
            figures = scored(replies, reader())
            figures["us_per_reply"] = microseconds(reader, len(replies))
            report[part][name] = figures
            print(
                f"{part:10} {name:22} {figures['macro_f1']:8.3f} {figures['macro_f1_plain']:6.3f} "
                f"{figures['macro_f1_hard']:6.3f} {figures['opposite']:8.3f} {figures['auc']:6.3f} "
                f"{figures['us_per_reply']:6.0f}"
            )
        for name in ("patterns-1", "semantic-2"):
            for group in ("polarity", "classes"):
                line = "  ".join(
                    f"{k} {v['precision']:.2f}/{v['recall']:.2f}/{v['f1']:.2f}"
                    for k, v in report[part][name][group].items()
                )
                print(f"           {name} precision/recall/F1 by {group}: {line}")
        if args.errors:
            collector = FeedbackCollector()
            for reply, embedding in zip(replies, x, strict=True):
                feedback = collector.extract(reply.text, embedding=embedding)
                if sign_of(feedback) != reply.polarity:
                    print(
                        f"  {reply.label:10} {feedback.reward:+.2f} {feedback.confidence:.2f} {reply.text!r}"
                    )
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
