"""The words of a reply and their context: sentences, clauses, negation, questions, requests.

`patterns` finds the phrases and uses this context to interpret them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from cortex_core.feedback import words as table

_TOKEN = re.compile(
    r"[^\W\d_]+(?:['-][^\W\d_]+)*"  # words
    r"|\d+(?:[.,]\d+)*(?:\s?/\s?\d+)?"  # numbers, 4/5
    r"|[.!?]+|\n+|[,;…()\"–—]|\s-+\s|:(?=\s)"  # boundaries
    r"|[:;=]['-]?(?:[()\[\]|/\\]+|[dpscx](?!\w))|<3|-_-|:'\(|\^\^"  # emoticons
    r"|[^\w\s]"
)
_PLAIN_MARKS = str.maketrans(
    {"’": "'", "‘": "'", "´": "'", "“": '"', "”": '"', "İ": "i", "！": "!", "？": "?", "，": ",", "。": "."}
)
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|^\s*>.*$|https?://\S+|www\.\S+", re.DOTALL | re.MULTILINE)
_QUOTED = re.compile(r'"[^"\n]{1,200}"')
_ELONGATED = re.compile(r"([a-z])\1{2,}")
_ENDS = frozenset(".!?…\n;")
_PAUSES = frozenset(',:()-–—"')
_MAX_CHARS = 2000
"""Of longer replies the beginning and the end are read: the middle is pasted material."""


@dataclass(slots=True)
class Hit:
    """A matched phrase."""

    kind: str
    """A key of `patterns.KINDS`."""
    weight: int
    """Number of matches that it counts for: 2 if it is intensified."""
    start: int
    """Index of the first word; `start == end` for emoji and ratings."""
    end: int
    sentence: int
    clause: int
    evidence: str = ""
    flipped: bool = False
    """Whether a negation reversed it."""


@dataclass(slots=True)
class Cues:
    """Other features of a reply, for the semantic head."""

    words: int = 0
    sentences: int = 0
    questions: int = 0
    exclamations: int = 0
    negators: int = 0
    requests: int = 0
    contrast: bool = False
    leading_no: bool = False
    leading_yes: bool = False
    code: bool = False
    quoted: bool = False
    possessive: bool = False
    """Whether it contains "my" or "our"."""
    foreign: bool = False
    """Whether a phrase in another language than English matched."""
    cancelled: list[str] = field(default_factory=list)
    """Kinds of the matched phrases that do not count in their context."""
    conceded: list[str] = field(default_factory=list)
    """Kinds of the phrases that others override."""


def _blank(match: re.Match[str]) -> str:
    return " " * len(match.group())  # keeps positions, so that evidence can be cut from the reply


class Scope:
    """A tokenized reply."""

    def __init__(self, text: str, vocabulary: dict[str, object]) -> None:
        """`vocabulary`: first words of known phrases, to which elongated words ("sooo") are shortened."""
        self.cues = cues = Cues()
        if len(text) > _MAX_CHARS:
            text = text[: _MAX_CHARS // 2] + "\n" + text[-_MAX_CHARS // 2 :]
        plain = lowered = text.translate(_PLAIN_MARKS).lower()
        if "`" in plain or ">" in plain or "://" in plain or "www." in plain:
            plain = _CODE.sub(_blank, plain)
            cues.code = plain != lowered
        if plain.count('"') > 1:
            unquoted = _QUOTED.sub(_blank, plain)
            if unquoted.strip(" .!?\n"):  # a reply that is a quotation as a whole is not removed
                cues.quoted = True
                plain = unquoted
        self.text, self.plain = text, plain
        self.words: list[str] = []
        self.token: list[int] = []
        """Index of each word's token in the reply."""
        self.sentence: list[int] = []
        self.clause: list[int] = []
        self.clause_start: list[int] = [0]
        self.asked: set[int] = set()
        """Indices of the sentences that end with a question mark."""
        self.exclaimed: set[int] = set()
        self.contrast_at: list[int] = []
        """Indices of words such as "but"."""
        self.emoji: list[Hit] = []
        """Emoji and emoticons."""
        self._vocabulary = vocabulary
        self._has_elongated = _ELONGATED.search(plain) is not None
        self._tokenize()
        words = self.words
        cues.words, cues.sentences = len(words), self.sentence[-1] + 1 if words else 0
        cues.questions, cues.exclamations = len(self.asked), len(self.exclaimed)
        cues.contrast = bool(self.contrast_at)
        if words:
            cues.leading_no = words[0] in ("no", "nope", "nah")
            cues.leading_yes = words[0] in ("yes", "yeah", "ok", "okay", "sure")
            cues.possessive = "my" in words or "our" in words
            cues.negators = sum(word in table.NEGATORS for word in words)
            cues.requests = sum(self.clause_requests(c) for c in range(len(self.clause_start)))

    def _tokenize(self) -> None:
        words, sentences, clauses = self.words, self.sentence, self.clause
        sentence = clause = 0
        for number, token in enumerate(_TOKEN.findall(self.plain)):
            expanded = table.EXPANSIONS.get(token)
            if expanded is None:
                if not token[0].isalnum():
                    sentence, clause = self._mark(token, sentence, clause)
                    continue
                expanded = (token,) if len(token) < 4 or token[0].isdigit() else self._expand(token)
            for word in expanded:
                if word in table.CONTRAST and words and sentences[-1] == sentence and self._contrasts(word):
                    self.contrast_at.append(len(words))
                    clause = self._break(clause)
                elif word in ("although", "though") and (not words or sentences[-1] != sentence):
                    self.contrast_at.append(len(words))
                words.append(word)
                self.token.append(number)
                sentences.append(sentence)
                clauses.append(clause)
        if self.clause_start[-1] == len(words):
            self.clause_start.pop()

    def _mark(self, token: str, sentence: int, clause: int) -> tuple[int, int]:
        """Handles punctuation or an emoji; returns the sentence and the clause that follow it."""
        mark = token.strip()[:1] or "\n"
        before = sentence
        if mark in _ENDS:
            if "?" in token:
                self.asked.add(sentence)
            if "!" in token:
                self.exclaimed.add(sentence)
            sentence += bool(self.words) and self.sentence[-1] == sentence
        if mark in _ENDS or mark in _PAUSES:
            clause = self._break(clause)
        kind = table.EMOJI.get(token) or table.EMOTICONS.get(token)
        if kind:
            at = len(self.words)
            self.emoji.append(Hit(kind, 1, at, at, max(before - (not self.words), 0), clause, token))
        return sentence, clause

    def _break(self, clause: int) -> int:
        """Begins a new clause unless the current one is empty."""
        if self.words and self.clause[-1] == clause:
            self.clause_start.append(len(self.words))
            return clause + 1
        return clause

    def _contrasts(self, word: str) -> bool:
        """Whether `word` is a contrast: not in "if only", "not only" and the like."""
        return word != "only" or self.words[-1] not in ("if", "not", "the", "is", "it", "i", "just")

    def _expand(self, token: str) -> tuple[str, ...]:
        """The words of a token, with contractions expanded and elongated letters shortened."""
        if "'" in token:
            if token.endswith("n't"):
                return (token[:-3], "not")
            at = token.rfind("'")
            word = table.SUFFIXES.get(token[at:])
            return (token[:at], word) if word is not None and token[:at] in table.SUBJECTS else (token,)
        short = _ELONGATED.sub(r"\1", token) if self._has_elongated else token
        if short == token:
            return (token,)
        for word in (_ELONGATED.sub(r"\1\1", token), short):
            if word in table.EXPANSIONS:
                return table.EXPANSIONS[word]
            if word in self._vocabulary:
                return (word,)
        return (short,)

    def before(self, hit: Hit, most: int = 6) -> list[str]:
        """Up to `most` words before `hit` in its clause."""
        return self.words[max(self.clause_start[hit.clause], hit.start - most) : hit.start]

    def clause_end(self, clause: int) -> int:
        """End index of the clause: one past its last word."""
        return self.clause_start[clause + 1] if clause + 1 < len(self.clause_start) else len(self.words)

    def _opening(self, clause: int) -> tuple[int, list[str]]:
        """Start index of the clause after words like "so" and "ok", and its next three words."""
        words = self.words
        start = self.clause_start[clause]
        end = self.clause_end(clause)
        while start < end - 1 and words[start] in table.OPENERS:
            start += 1
        return start, [*words[start : min(start + 3, end)], "", "", ""][:3]

    def clause_asks(self, clause: int) -> bool:
        """Whether a clause has the form of a question, unlike "Does not work" and "which works"."""
        _, (first, second, _) = self._opening(clause)
        if first in table.WH:
            return second in table.AUXILIARY or (first == "how" and second in ("to", "many", "much", "long"))
        return first in table.AUXILIARY and second in table.SUBJECT_AFTER

    def clause_requests(self, clause: int) -> bool:
        """Whether a clause is a request: "find me …", "I need …"."""
        _, (first, second, third) = self._opening(clause)
        if first in table.REQUEST:
            return second not in ("not", "")
        if first in ("i", "we"):
            return second in ("need", "want", "would", "wonder", "wish") or third in ("looking", "wondering")
        return False

    def asks(self, hit: Hit) -> bool:
        """Whether `hit` is in a question."""
        if hit.sentence in self.asked:
            inside = [c for c, s in zip(self.clause, self.sentence, strict=True) if s == hit.sentence]
            last = inside[-1] if inside else hit.clause
            is_tag = inside.count(last) <= 2  # "that's right, isn't it?"
            if hit.clause == last or (is_tag and hit.clause == last - 1):
                return True
        return self.clause_asks(hit.clause)

    def requests(self, hit: Hit) -> bool:
        """Whether `hit` is part of a request, but not praise before it."""
        return self._opening(hit.clause)[0] < hit.start and self.clause_requests(hit.clause)

    def negated(self, hit: Hit) -> bool:
        """Whether a negator before `hit` applies to it."""
        before = self.before(hit)
        for i in range(len(before) - 1, -1, -1):
            word = before[i]
            if word in table.NEGATORS:
                if word == "no" and before[i + 1 : i + 2] and before[i + 1] in table.ANSWERED:
                    return False  # "no that is so wrong": an answer, not a negation
                return before[i + 1 : i + 2] not in (["only"], ["just"], ["to"])
            if word not in table.TRANSPARENT:
                return False
        return False

    def about_others(self, hit: Hit) -> bool:
        """Whether the clause is not about the answer: "my boss is horrible"."""
        start = self.clause_start[hit.clause]
        before = self.words[start : hit.start]
        if not before:
            return False
        if before[0] in table.OTHERS or (
            len(before) > 1 and before[0] in table.OPENERS and before[1] in table.OTHERS
        ):
            return table.ANAPHORS.isdisjoint(self.words[start : self.clause_end(hit.clause)])
        return before[:2] in (
            ["i", "had"],
            ["i", "have"],
            ["i", "got"],
            ["i", "saw"],
            ["i", "love"],
            ["i", "hate"],
        )

    def evidence(self, hit: Hit) -> str:
        """The original text of `hit`."""
        if hit.evidence or hit.start == hit.end:
            return hit.evidence
        spans = [m.span() for m in _TOKEN.finditer(self.plain)]
        first, last = spans[self.token[hit.start]][0], spans[self.token[hit.end - 1]][1]
        return (self.text if len(self.text) == len(self.plain) else self.plain)[first:last]
