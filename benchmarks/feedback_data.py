"""Labelled replies: what each says about the preceding answer.

The semantic head is trained on `train`; `test` and `dialogue` are used only for evaluation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Part = Literal["train", "test", "dialogue"]

CLASSES = ("positive", "negative", "correction", "confusion", "neutral")
"""The four explicit signals, and "neutral" for replies that do not concern the answer."""
POLARITY = {"positive": 1, "negative": -1, "correction": -1, "confusion": -1, "neutral": 0}

_DATA = Path(__file__).parent / "data"


@dataclass(frozen=True, slots=True)
class Reply:
    text: str
    label: str
    """One of `CLASSES`."""
    hard: bool = False

    @property
    def polarity(self) -> int:
        return POLARITY[self.label]


WRITERS = 6
"""Number of writers of `train`, one file each; holding one out measures generalisation to new writers."""


def load(part: Part) -> list[Reply]:
    """The replies of one part, in file order."""
    if part == "train":
        return [reply for writer in range(1, WRITERS + 1) for reply in written_by(writer)]
    return _parsed(f"feedback_{part}.txt", starred=True)


def written_by(writer: int) -> list[Reply]:
    """The training replies of one writer, from 1."""
    return _parsed(f"feedback_train_{writer}.txt", starred=False)


def _parsed(file: str, starred: bool) -> list[Reply]:
    replies = []
    label = ""
    for line in (_DATA / file).read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("# "):
            continue
        heading = re.fullmatch(r"\[(\w+)\]", line)
        if heading:
            label = heading[1]
            if label not in CLASSES:
                raise ValueError(f"{file} has a section {label!r}, expected one of {CLASSES}")
            continue
        hard = starred and line.startswith("*")
        replies.append(Reply(line.removeprefix("*" if hard else "").replace("\\n", "\n"), label, hard))
    return replies


def normal(text: str) -> str:
    """Normalised text, without case and most punctuation, to find duplicates."""
    return " ".join(re.findall(r"\w+|[^\w\s.,;!\"'-]", text.lower())) or text.strip()
