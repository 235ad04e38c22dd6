"""Tokens of a reply for the semantic head, and the vocabulary that maps them to rows of its word vectors.

    >>> tokens("Didn't work!")  # tokens, and their spans in the reply
    (['did', 'not', 'work', '!'], [(0, 6), (0, 6), (7, 11), (11, 12)])
    >>> Vocabulary(["did", "not"]).rows(["did", "nots"])  # the second one by its stem
    [2, 3]

Uses only the standard library.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from cortex_core.feedback import words as table

MOST = 40
"""Maximum number of tokens; of a longer reply the beginning and the end are used."""
PADDING, UNKNOWN = 0, 1
"""The first two rows of the word vectors."""

_TOKEN = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+|[!?]+|[.,;:()…\"-]|[^\w\s]|\n")
_MARKS = str.maketrans({"’": "'", "‘": "'", "´": "'", "“": '"', "”": '"', "İ": "i"})
_DRAWN_OUT = re.compile(r"([a-z])\1{2,}")
_ENDINGS = (
    ("s", ""), ("es", ""), ("ed", ""), ("ed", "e"), ("d", ""), ("ing", ""), ("ing", "e"),
    ("ly", ""), ("er", ""), ("est", ""), ("ies", "y"), ("y", ""),
)  # fmt: skip
"""Endings that are removed from an unknown word, and their replacements."""
_LONGEST = 2000
_HALF = MOST // 2

Span = tuple[int, int]


def words(text: str) -> list[str]:
    """Words and punctuation in lower case, with contractions and chat spelling expanded; at most `MOST`."""
    if len(text) > _LONGEST:
        return tokens(text)[0]
    found = [word for token in _TOKEN.findall(text.translate(_MARKS).lower()) for word in _expanded(token)]
    return found if len(found) <= MOST else found[:_HALF] + found[-_HALF:]


def tokens(text: str) -> tuple[list[str], list[Span]]:
    """`words`, and the span of each in `text`; several may have the same span ("didn't" is two words)."""
    if len(text) > _LONGEST:  # the middle is pasted material, as in `feedback.scope`
        head, head_spans = tokens(text[: _LONGEST // 2])
        shift = len(text) - _LONGEST // 2
        tail, tail_spans = tokens(text[shift:])
        tail_spans = [(a + shift, b + shift) for a, b in tail_spans]
        return _ends(head + tail, head_spans + tail_spans)
    out: list[str] = []
    spans: list[Span] = []
    for match in _TOKEN.finditer(text.translate(_MARKS).lower()):
        expanded = _expanded(match.group())
        out += expanded
        spans += [match.span()] * len(expanded)
    return _ends(out, spans)


def _ends(words: list[str], spans: list[Span]) -> tuple[list[str], list[Span]]:
    if len(words) <= MOST:
        return words, spans
    return words[:_HALF] + words[-_HALF:], spans[:_HALF] + spans[-_HALF:]


@lru_cache(10_000)
def _expanded(token: str) -> tuple[str, ...]:
    first = token[0]
    expanded = table.EXPANSIONS.get(token)
    if expanded is None:
        expanded = (token,)
        if first.isdigit():
            expanded = (token if len(token) <= 2 else "0",)
        elif token.endswith("n't"):
            expanded = (token[:-3], "not")
        elif first.isalpha() and "'" in token:
            at = token.rfind("'")
            verb = table.SUFFIXES.get(token[at:])
            expanded = (token[:at], verb) if verb else (token[:at],)
        elif first.isalpha():
            expanded = (_DRAWN_OUT.sub(r"\1\1", token),)
        elif first in "!?":
            expanded = ("?!" if "?" in token and "!" in token else first,)
        elif token == "\n":
            expanded = (".",)
    return expanded


class Vocabulary:
    """Maps words to rows of the word vectors; rows 0 and 1 are padding and the unknown word."""

    def __init__(self, words: Sequence[str]) -> None:
        self._row = {word: row for row, word in enumerate(words, start=2)}

    def rows(self, words: Sequence[str]) -> list[int]:
        """The row of each word, else of its stem, else `UNKNOWN`."""
        known = self._row.get
        return [known(word) or self._stemmed(word) for word in words]

    def _stemmed(self, word: str) -> int:
        for ending, instead in _ENDINGS:
            if word.endswith(ending) and len(word) - len(ending) >= 3:
                row = self._row.get(word[: len(word) - len(ending)] + instead)
                if row is not None:
                    return row
        return UNKNOWN
