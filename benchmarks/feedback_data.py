"""The labelled replies: what each says about the answer before it.

`train` is what the semantic head learns from; `test` and `dialogue` are written in other words and are only
ever measured.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CLASSES = ("positive", "negative", "correction", "confusion", "neutral")
"""The four explicit signals, and "neutral": nothing said of the answer."""
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


def load(part: Literal["train", "test", "dialogue"]) -> list[Reply]:
    """The replies of one part, in the order of its file."""
    replies = []
    label = ""
    for line in (_DATA / f"feedback_{part}.txt").read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("# "):
            continue
        heading = re.fullmatch(r"\[(\w+)\]", line)
        if heading:
            label = heading[1]
            if label not in CLASSES:
                raise ValueError(f"feedback_{part}.txt has a section {label!r}, wanted one of {CLASSES}")
            continue
        replies.append(Reply(line.lstrip("*").replace("\\n", "\n"), label, line.startswith("*")))
    return replies


def normal(text: str) -> str:
    """Without case and most punctuation: two replies with the same are the same reply."""
    return " ".join(re.findall(r"\w+|[^\w\s.,;!\"'-]", text.lower())) or text.strip()
