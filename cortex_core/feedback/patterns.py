"""Feedback extraction by patterns: phrases, and the words around them that negate, weaken or cancel them.

    >>> hits, cues = read("Thanks, but that isn't right")
    >>> [(KINDS[hit.kind], hit.evidence) for hit in hits]  # the thanks before "but" is politeness
    [('complaint or failure', "isn't right")]

Uses only the standard library. A complaint without any phrase of the lists is left to `semantic`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from cortex_core.feedback import words as table
from cortex_core.feedback.scope import Cues, Hit, Scope

KINDS = {
    "I": "irony",
    "0": "no feedback, despite similar words",
    "F": "complaint or failure",
    "Q": "confusion",
    "X": "correction",
    "Z": "closing",
    "S": "success",
    "T": "thanks",
    "P": "praise",
    "N": "criticism",
    "x": "soft correction",
    "q": "doubt",
}
"""Kinds of phrases: the sections of `data/english.txt`."""

POSITIVE_KINDS = frozenset("PSTZ")

_RATING = re.compile(
    r"(?<![\d./-])(\d{1,3}(?:[.,]\d)?)\s?(?:/|out of)\s?(5|10|100)(?![\d/])"
    r"|(?<![\d.])([0-5])\s?(?:-\s?)?stars?\b"
)
_DIGIT = re.compile(r"\d")
_GRADE = re.compile(r"^\W*(?:grade:?\s*)?([a-df])([+-]?)(?: (?:work|job|answer|grade work))?\W*$")
_STARS = {"one star": 1, "two stars": 2, "three stars": 3, "four stars": 4, "five stars": 5}
_KIND = ""
"""Key of an index node for the kind of the phrase that ends there."""

_DATA = Path(__file__).parent / "data"
_SPACELESS = "spaceless "
_FOREIGN = "~"
"""Prefix of the kind of a phrase in another language than English."""


def _wordings(phrase: str) -> list[tuple[str, ...]]:
    """All wordings of a phrase in the notation of `data/english.txt`."""
    done: list[tuple[str, ...]] = [()]
    i = 0
    while i < len(phrase):
        if phrase[i] == "(":
            depth, i = 1, i + 1
            start = i
            choices: list[tuple[str, ...]] = []
            while depth:
                depth += {"(": 1, ")": -1}.get(phrase[i], 0)
                if depth == 0 or (depth == 1 and phrase[i] == "|"):
                    choices += _wordings(phrase[start:i])
                    start = i + 1
                i += 1
            done = [before + choice for before in done for choice in choices]
        else:
            end = phrase.find("(", i)
            end = len(phrase) if end < 0 else end
            words = tuple(phrase[i:end].split())
            done = [before + words for before in done]
            i = end
    return done


def phrases(text: str) -> Iterator[tuple[str, ...]]:
    """All wordings of a list of phrases in the notation of these files, as words."""
    for phrase in re.split(r"[;\n]", text):
        if phrase.strip():
            yield from _wordings(phrase.strip())


def sections(file: str) -> dict[str, str]:
    """The phrase lists of a file in `data/`, by section."""
    out: dict[str, list[str]] = {}
    name = ""
    for line in (_DATA / file).read_text(encoding="utf-8").splitlines():
        heading = re.fullmatch(r"\[([\w ]+)\]", line)
        if heading:
            name = heading[1]
        elif line and not line.startswith("#"):
            out.setdefault(name, []).append(line)
    return {name: "\n".join(lines) for name, lines in out.items()}


@cache
def _index() -> dict[str, Any]:
    """The phrases as a trie of words. Built for the first reply, in about 0.1 s."""
    root: dict[str, Any] = {}
    foreign = {
        _FOREIGN + kind: text
        for kind, text in sections("languages.txt").items()
        if not kind.startswith(_SPACELESS)
    }
    for kind, text in (sections("english.txt") | foreign).items():
        for wording in phrases(text):
            node = root
            for word in wording:
                node = node.setdefault(word, {})
            node.setdefault(_KIND, kind)
    return root


@cache
def _spaceless() -> tuple[re.Pattern[str], dict[str, str]]:
    kinds = {
        word: kind.removeprefix(_SPACELESS)
        for kind, text in sections("languages.txt").items()
        if kind.startswith(_SPACELESS)
        for word in text.split()
    }
    return re.compile("|".join(sorted(map(re.escape, kinds), key=len, reverse=True))), kinds


def read(text: str, *, evidence: bool = True) -> tuple[list[Hit], Cues]:
    """The phrases that count in `text`, in order, and other cues.

    Without `evidence` the hits do not include the words of the reply.

    Rules: a negator reverses praise and criticism ("not perfect", "not bad"); questions, wishes and fears do
    not count ("is that right?", "if it works"); nor do quotations, code, and statements about others; after
    "but" the later part decides; a complaint overrides thanks; a failure after bare praise makes it irony.
    """
    scope = Scope(text, _index())
    rating = _rating(scope)
    if rating is not None:
        return [rating], scope.cues
    kept = list(scope.emoji)
    if not text.isascii():
        kept += _find_spaceless(scope)
    whole = table.WHOLE.get(" ".join(scope.words)) if 0 < len(scope.words) <= 4 else None
    if whole is not None:
        kept.append(Hit(whole, 1, 0, len(scope.words), 0, 0))
    else:
        found = list(_find(scope))
        for hit in found:
            if hit.kind[0] == _FOREIGN:
                hit.kind = hit.kind[1:]
                scope.cues.foreign = True
            kind = _kind_in_context(scope, hit)
            if kind:
                hit.kind = kind
                kept.append(hit)
            elif hit.kind != "0":
                scope.cues.cancelled.append(hit.kind)
        kept += _contradictions(scope, found)
    kept.sort(key=lambda hit: hit.start)
    if len(kept) > 1:
        kept = _relate(scope, kept)
    if evidence:
        for hit in kept:
            hit.evidence = scope.evidence(hit)
    return kept, scope.cues


def _find_spaceless(scope: Scope) -> Iterator[Hit]:
    pattern, kinds = _spaceless()
    at = len(scope.words)
    for match in pattern.finditer(scope.plain):
        kind = kinds[match.group()]
        scope.cues.foreign = True
        if kind != "0":
            yield Hit(kind, 1, at, at, 0, 0, match.group())


def _find(scope: Scope) -> Iterator[Hit]:
    """Finds phrases from left to right, the longest at each position, within sentences."""
    index, words, sentences = _index(), scope.words, scope.sentence
    n = len(words)
    i = 0
    while i < n:
        node = index.get(words[i])
        j, end, kind = i + 1, 0, ""
        while node is not None:
            found = node.get(_KIND)
            if found is not None:
                end, kind = j, found
            if j >= n or sentences[j] != sentences[i]:
                break
            node = node.get(words[j])
            j += 1
        if end:
            yield Hit(kind, 1, i, end, sentences[i], scope.clause[i])
        i = end or i + 1


def _kind_in_context(scope: Scope, hit: Hit) -> str:
    """The kind of `hit` in its context; empty if it does not count there."""
    kind = hit.kind
    before = scope.before(hit)
    if before and before[-1] in table.INTENSIFIERS:
        hit.weight = 2
    if kind in "PS":
        kind = _praise(scope, hit, before)
    elif kind in "NF":
        kind = _blame(scope, hit, before)
    elif kind == "T":
        kind = "" if _is_mere_politeness(scope, hit) else "T"
    elif kind == "Q":
        if not table.FEARED.isdisjoint(before):
            kind = ""
        elif scope.words[hit.start] != "not" and scope.negated(hit):
            hit.flipped = True
            kind = "P"
    elif kind == "X" and scope.words[hit.start] in ("i", "we"):
        kind = "X" if all(word in _MAY_OPEN_CORRECTION for word in before) else ""
    elif kind == "x":
        kind = "x" if all(word in table.OPENERS for word in before) else ""
    return "" if kind == "0" else kind


_MAY_OPEN_CORRECTION = table.OPENERS | table.words(
    "sorry because like as oops wait but actually what whereas"
)


def _praise(scope: Scope, hit: Hit, before: list[str]) -> str:
    words = scope.words
    if scope.negated(hit):
        imagined = scope.asks(hit) or not table.FEARED.isdisjoint(before)
        hit.flipped = not imagined
        return "" if imagined else "N"
    imagined = not table.IRREALIS.isdisjoint(before) or not table.NEGATORS.isdisjoint(before)
    over = "until" in words[hit.end : hit.end + 2]
    if imagined or over or (scope.asks(hit) and (before or hit.sentence in scope.asked)):
        return ""
    if hit.kind == "P":
        same_clause = hit.end < len(words) and scope.clause[hit.end] == hit.clause
        predicate = bool(before) and before[-1] in table.COPULAS
        of_a_noun = same_clause and not predicate and words[hit.end] not in table.AFTER_PRAISE
        if of_a_noun or scope.requests(hit) or scope.about_others(hit):
            return ""
    return hit.kind


def _blame(scope: Scope, hit: Hit, before: list[str]) -> str:
    start = scope.clause_start[hit.clause]
    chosen = scope.words[start] == "not" and start > 0 and scope.sentence[start - 1] == hit.sentence
    unreal = not table.FEARED.isdisjoint(before) or not table.SOLVED.isdisjoint(before)
    if unreal or chosen or scope.about_others(hit):  # chosen: "net, not gross" is a choice, not a criticism
        return ""
    asked = scope.asks(hit)
    holds_negator = not table.NEGATORS.isdisjoint(scope.words[hit.start : hit.end])
    if not holds_negator and scope.negated(hit):
        hit.flipped = not asked
        return "" if asked else "P"
    if asked:
        inside = {w for w, c in zip(scope.words, scope.clause, strict=True) if c == hit.clause}
        again = not inside.isdisjoint(("still", "again", "keeps", "keep", "even", "you"))
        return hit.kind if hit.kind == "F" and again else ""
    return "" if scope.requests(hit) else hit.kind


def _is_mere_politeness(scope: Scope, hit: Hit) -> bool:
    """Whether thanks are part of a request, or end one: "Could you book it? Thanks"."""
    start = scope.clause_start[hit.clause]
    if hit.start > start and (scope.asks(hit) or scope.requests(hit)):
        return True
    if hit.start == 0 or hit.end < len(scope.words) - 1:
        return False
    earlier = range(scope.clause[hit.start - 1] + 1)
    asked = any(sentence < hit.sentence for sentence in scope.asked)
    return asked or any(scope.clause_requests(c) or scope.clause_asks(c) for c in earlier)


def _contradictions(scope: Scope, found: list[Hit]) -> list[Hit]:
    """Corrections such as "not Italian, something Asian", and irony by a final "Not."."""
    hits = []
    words = scope.words
    taken = {i for hit in found for i in range(hit.start, hit.end)}
    for clause, start in enumerate(scope.clause_start):
        end = scope.clause_end(clause)
        if words[start : start + 1] != ["not"] or start in taken:
            continue
        sentence = scope.sentence[start]
        if end - start == 1:
            if start > 0 and end == len(words):
                hits.append(Hit("I", 1, start, end, sentence, clause))
        elif end - start <= 5 and scope.sentence.count(sentence) > end - start and not scope.cues.leading_no:
            hits.append(Hit("x", 1, start, end, sentence, clause))
    return hits


def _rating(scope: Scope) -> Hit | None:
    """A rating or a grade, if the reply is short enough."""
    plain = scope.plain
    stars = plain.count("⭐") + plain.count("★")
    if stars > 1:
        return _rated(min(stars, 5) / 5, "⭐" * stars)
    told = not table.REPORTED.isdisjoint(scope.words)  # "the hotel has 4 stars"
    if told or len(scope.words) > 10 or scope.asked or (scope.cues.requests and "give" not in scope.words):
        return None
    named = next((n for n in _STARS if n in plain), None) if "star" in plain else None
    if named:
        return _rated(_STARS[named] / 5, named)
    found = list(_RATING.finditer(plain)) if _DIGIT.search(plain) else []
    if found:
        first = found[-1]  # "10/10 for style, 0/10 for truth": the last one counts
        value, scale = (first[1], float(first[2])) if first[1] else (first[3], 5.0)
        share = float(value.replace(",", ".")) / scale
        return _rated(share, first.group()) if share <= 1 else None
    grade = _GRADE.match(plain) if len(plain) <= 30 else None
    if grade and (grade[2] or "grade" in plain or grade[1] in "df"):
        return _rated({"a": 1.0, "b": 0.75, "c": 0.5, "d": 0.3, "f": 0.0}[grade[1]], plain.strip())
    return None


def _rated(share: float, evidence: str) -> Hit | None:
    """Praise from 70%, criticism up to 50%, otherwise neither."""
    if share >= 0.7:
        return Hit("P", 1 + int(share >= 0.8) + int(share >= 0.95), 0, 0, 0, 0, evidence)
    if share <= 0.5:
        return Hit("N", 1 + int(share <= 0.4) + int(share <= 0.2), 0, 0, 0, 0, evidence)
    return None


def _relate(scope: Scope, hits: list[Hit]) -> list[Hit]:
    """The hits that are not overridden by others."""
    dropped: set[int] = set()

    def drop(those: list[Hit]) -> None:
        dropped.update(id(hit) for hit in those)

    def alive(kinds: str) -> list[Hit]:
        return [hit for hit in hits if hit.kind in kinds and id(hit) not in dropped]

    if alive("I"):
        drop(alive("PSTZ"))
    for at in reversed(scope.contrast_at):
        conceded, ruling = _sides(scope, alive("PSTZNFQXxq"), at)
        if conceded and not ruling and len(scope.words) > at + 2 and scope.words[at] == "but":
            kept = [hit for hit in conceded if hit.kind not in "PSTZ"]
            if not kept:  # "Nice, but in blue": praise that introduces a correction
                drop(conceded)
                hits.append(Hit("x", 1, at, at + 1, scope.sentence[at], scope.clause[at]))
        praises = any(hit.kind in "PS" for hit in ruling)
        blames = any(hit.kind in "NFQXx" for hit in ruling)
        if blames and not praises:
            drop([hit for hit in conceded if hit.kind in "PSTZ"])
        elif praises and not blames:
            drop([hit for hit in conceded if hit.kind in "NFQXxq"])
    if alive("NFQX"):
        drop(alive("TZ"))
        for praise in alive("PS"):
            around = alive("NFQX")
            later = any(hit.start > praise.start for hit in around)
            bare = scope.clause.count(praise.clause) - (praise.end - praise.start) <= 1
            if later and bare and praise.kind == "P":
                drop([praise])
            elif not later and praise.kind == "S":
                drop([hit for hit in around if hit.kind in "NFQ"])
    elif alive("PSZ"):
        drop(alive("xq"))
    elif alive("q"):
        drop(alive("T"))
    scope.cues.conceded = [hit.kind for hit in hits if id(hit) in dropped]
    return [hit for hit in hits if id(hit) not in dropped]


def _sides(scope: Scope, hits: list[Hit], at: int) -> tuple[list[Hit], list[Hit]]:
    """(conceded, decisive) hits of the contrast word at `at`."""
    word, sentence, clause = scope.words[at], scope.sentence[at], scope.clause[at]
    closes = at + 1 >= len(scope.words) or scope.sentence[at + 1] != sentence
    opens = at == 0 or scope.sentence[at - 1] != sentence
    if word in ("though", "tho") and closes:  # "wrong date, nice layout though"
        conceded = [h for h in hits if h.sentence == sentence and h.clause >= clause - 1 and h.start < at]
        return conceded, [h for h in hits if h.start < at and h not in conceded]
    if word in ("although", "though") and opens:
        return [h for h in hits if h.clause == clause], [h for h in hits if h.clause > clause]
    return [h for h in hits if h.start < at], [h for h in hits if h.start >= at]
