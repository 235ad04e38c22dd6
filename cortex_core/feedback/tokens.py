"""The words of a reply as the semantic head sees them, and the vocabulary that gives each a row of its table.

    >>> tokens("Didn't work!")  # and where each stands in the reply
    (['did', 'not', 'work', '!'], [(0, 6), (0, 6), (7, 11), (11, 12)])
    >>> Vocabulary(["did", "not"]).rows(["did", "nots"])  # an unknown word by its stem
    [2, 3]

Standard library alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from cortex_core.feedback import words as table

MOST = 40
"""Tokens that are looked at; of a longer reply its beginning and its end."""
PADDING, UNKNOWN = 0, 1
"""The first two rows of the table."""

_TOKEN = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+|[!?]+|[.,;:()…\"-]|[^\w\s]|\n")
_MARKS = str.maketrans({"’": "'", "‘": "'", "´": "'", "“": '"', "”": '"', "İ": "i"})
_DRAWN_OUT = re.compile(r"([a-z])\1{2,}")
_ENDINGS = (
    ("s", ""), ("es", ""), ("ed", ""), ("ed", "e"), ("d", ""), ("ing", ""), ("ing", "e"),
    ("ly", ""), ("er", ""), ("est", ""), ("ies", "y"), ("y", ""),
)  # fmt: skip
"""Endings that an unknown word may lose, and what takes their place."""
_LONGEST = 2000
_HALF = MOST // 2

Span = tuple[int, int]


def words(text: str) -> list[str]:
    """Words and marks, lower case, contractions and chat spelling opened; at most `MOST`."""
    if len(text) > _LONGEST:
        return tokens(text)[0]
    found = [word for token in _TOKEN.findall(text.translate(_MARKS).lower()) for word in _opened(token)]
    return found if len(found) <= MOST else found[:_HALF] + found[-_HALF:]


def tokens(text: str) -> tuple[list[str], list[Span]]:
    """`words`, and the span of each in `text`; several may share one span ("didn't" is two words)."""
    if len(text) > _LONGEST:  # what lies between is pasted material, as in `feedback.scope`
        head, head_spans = tokens(text[: _LONGEST // 2])
        shift = len(text) - _LONGEST // 2
        tail, tail_spans = tokens(text[shift:])
        tail_spans = [(a + shift, b + shift) for a, b in tail_spans]
        return _ends(head + tail, head_spans + tail_spans)
    out: list[str] = []
    spans: list[Span] = []
    for match in _TOKEN.finditer(text.translate(_MARKS).lower()):
        opened = _opened(match.group())
        out += opened
        spans += [match.span()] * len(opened)
    return _ends(out, spans)


def _ends(words: list[str], spans: list[Span]) -> tuple[list[str], list[Span]]:
    if len(words) <= MOST:
        return words, spans
    return words[:_HALF] + words[-_HALF:], spans[:_HALF] + spans[-_HALF:]


@lru_cache(10_000)
def _opened(token: str) -> tuple[str, ...]:
    first = token[0]
    opened = table.EXPANSIONS.get(token)
    if opened is None:
        opened = (token,)
        if first.isdigit():
            opened = (token if len(token) <= 2 else "0",)
        elif token.endswith("n't"):
            opened = (token[:-3], "not")
        elif first.isalpha() and "'" in token:
            at = token.rfind("'")
            verb = table.SUFFIXES.get(token[at:])
            opened = (token[:at], verb) if verb else (token[:at],)
        elif first.isalpha():
            opened = (_DRAWN_OUT.sub(r"\1\1", token),)
        elif first in "!?":
            opened = ("?!" if "?" in token and "!" in token else first,)
        elif token == "\n":
            opened = (".",)
    return opened


class Vocabulary:
    """Rows of words in a table of vectors; rows 0 and 1 are padding and the unknown word."""

    def __init__(self, words: Sequence[str]) -> None:
        self._row = {word: row for row, word in enumerate(words, start=2)}

    def rows(self, words: Sequence[str]) -> list[int]:
        """The row of each word, else of what is left of it without its ending, else `UNKNOWN`."""
        known = self._row.get
        return [known(word) or self._stemmed(word) for word in words]

    def _stemmed(self, word: str) -> int:
        for ending, instead in _ENDINGS:
            if word.endswith(ending) and len(word) - len(ending) >= 3:
                row = self._row.get(word[: len(word) - len(ending)] + instead)
                if row is not None:
                    return row
        return UNKNOWN
