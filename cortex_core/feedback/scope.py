"""The words of one reply, and where they stand: sentences, clauses, what negates, asks or imagines them.

Knows no phrases; `feedback_patterns` finds those and asks here what they mean in their place.
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
"""Longer replies are read at their beginning and their end: what lies between is pasted material."""


@dataclass(slots=True)
class Hit:
    """One phrase found, as it is read in its place."""

    kind: str
    """A key of `feedback_patterns.KINDS`."""
    weight: int
    """How many matches it counts for: 2 where it is intensified."""
    start: int
    """First word; `start == end` for what is no word, such as an emoji."""
    end: int
    sentence: int
    clause: int
    evidence: str = ""
    flipped: bool = False
    """Whether a negation turned it round."""


@dataclass(slots=True)
class Cues:
    """What else was seen; features for the semantic head."""

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
    """Whether it speaks of the user's own things: "my", "our"."""
    foreign: bool = False
    """Whether a phrase of another language than English was found."""
    cancelled: list[str] = field(default_factory=list)
    """Kinds of the phrases that were found and, in their place, say nothing."""
    conceded: list[str] = field(default_factory=list)
    """Kinds of the phrases that gave way to others."""


def _blank(match: re.Match[str]) -> str:
    return " " * len(match.group())  # the rest keeps its place, so that evidence can be cut from the reply


class Scope:
    """One reply, tokenized."""

    def __init__(self, text: str, vocabulary: dict[str, object]) -> None:
        """`vocabulary`: words that begin a known phrase; drawn-out words are shortened to one of them."""
        self.cues = cues = Cues()
        if len(text) > _MAX_CHARS:
            text = text[: _MAX_CHARS // 2] + "\n" + text[-_MAX_CHARS // 2 :]
        plain = lowered = text.translate(_PLAIN_MARKS).lower()
        if "`" in plain or ">" in plain or "://" in plain or "www." in plain:
            plain = _CODE.sub(_blank, plain)
            cues.code = plain != lowered
        if plain.count('"') > 1:
            unquoted = _QUOTED.sub(_blank, plain)
            if unquoted.strip(" .!?\n"):  # a reply that is all quotation is its own words
                cues.quoted = True
                plain = unquoted
        self.text, self.plain = text, plain
        self.words: list[str] = []
        self.token: list[int] = []
        """Which token of the reply each word came from."""
        self.sentence: list[int] = []
        self.clause: list[int] = []
        self.clause_start: list[int] = [0]
        self.asked: set[int] = set()
        """Sentences that end with a question mark."""
        self.exclaimed: set[int] = set()
        self.contrast_at: list[int] = []
        """Words such as "but"."""
        self.pictures: list[Hit] = []
        """Emoji and emoticons."""
        self._vocabulary = vocabulary
        self._drawn_out = _ELONGATED.search(plain) is not None
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
            opened = table.EXPANSIONS.get(token)
            if opened is None:
                if not token[0].isalnum():
                    sentence, clause = self._mark(token, sentence, clause)
                    continue
                opened = (token,) if len(token) < 4 or token[0].isdigit() else self._open(token)
            for word in opened:
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
        """Punctuation or a picture: the sentence and the clause that go on after it."""
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
            self.pictures.append(Hit(kind, 1, at, at, max(before - (not self.words), 0), clause, token))
        return sentence, clause

    def _break(self, clause: int) -> int:
        """Begins a new clause, unless the present one is empty."""
        if self.words and self.clause[-1] == clause:
            self.clause_start.append(len(self.words))
            return clause + 1
        return clause

    def _contrasts(self, word: str) -> bool:
        """ "if only", "not only" and the like set nothing against anything."""
        return word != "only" or self.words[-1] not in ("if", "not", "the", "is", "it", "i", "just")

    def _open(self, token: str) -> tuple[str, ...]:
        """Words of one token: contractions opened, drawn-out letters shortened."""
        if "'" in token:
            if token.endswith("n't"):
                return (token[:-3], "not")
            at = token.rfind("'")
            word = table.SUFFIXES.get(token[at:])
            return (token[:at], word) if word is not None and token[:at] in table.SUBJECTS else (token,)
        short = _ELONGATED.sub(r"\1", token) if self._drawn_out else token
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
        """Where the clause ends, one past its last word."""
        return self.clause_start[clause + 1] if clause + 1 < len(self.clause_start) else len(self.words)

    def _opening(self, clause: int) -> tuple[int, list[str]]:
        """Where the clause begins after words like "so" and "ok", and its next three words."""
        words = self.words
        start = self.clause_start[clause]
        end = self.clause_end(clause)
        while start < end - 1 and words[start] in table.OPENERS:
            start += 1
        return start, [*words[start : min(start + 3, end)], "", "", ""][:3]

    def clause_asks(self, clause: int) -> bool:
        """Whether a clause is a question by its form. "Does not work" and "which works" are none."""
        _, (first, second, _) = self._opening(clause)
        if first in table.WH:
            return second in table.AUXILIARY or (first == "how" and second in ("to", "many", "much", "long"))
        return first in table.AUXILIARY and second in table.SUBJECT_AFTER

    def clause_requests(self, clause: int) -> bool:
        """Whether a clause asks for something to be done: "find me …", "I need …"."""
        _, (first, second, third) = self._opening(clause)
        if first in table.REQUEST:
            return second not in ("not", "")
        if first in ("i", "we"):
            return second in ("need", "want", "would", "wonder", "wish") or third in ("looking", "wondering")
        return False

    def asks(self, hit: Hit) -> bool:
        """Whether `hit` stands in a question."""
        if hit.sentence in self.asked:
            inside = [c for c, s in zip(self.clause, self.sentence, strict=True) if s == hit.sentence]
            last = inside[-1] if inside else hit.clause
            is_tag = inside.count(last) <= 2  # "that's right, isn't it?"
            if hit.clause == last or (is_tag and hit.clause == last - 1):
                return True
        return self.clause_asks(hit.clause)

    def requests(self, hit: Hit) -> bool:
        """Whether `hit` is part of a request, and not the praise that opens it."""
        return self._opening(hit.clause)[0] < hit.start and self.clause_requests(hit.clause)

    def negated(self, hit: Hit) -> bool:
        """Whether a negator stands before `hit` with nothing between that ends its reach."""
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
        """Whether the clause speaks of something else than the answer: "my boss is horrible"."""
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
        """The words of the reply, as it wrote them, behind `hit`."""
        if hit.evidence or hit.start == hit.end:
            return hit.evidence
        spans = [m.span() for m in _TOKEN.finditer(self.plain)]
        first, last = spans[self.token[hit.start]][0], spans[self.token[hit.end - 1]][1]
        return (self.text if len(self.text) == len(self.plain) else self.plain)[first:last]
