"""Reading a reply by patterns: phrases, and the words around them that turn, soften or cancel what they say.

    hits, cues = read("Thanks, but that isn't right")
    # hits: [Hit(kind="N", weight=1, evidence="isn't right", ...)]; the thanks is politeness before "but"

Standard library only. A reply of ordinary length costs about 20 microseconds. It reads words, not meaning:
a complaint without any word of the lists is left to `feedback_semantic`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from cortex_core import feedback_languages, feedback_lexicon

KINDS = {
    "I": feedback_lexicon.IRONY,
    "0": feedback_lexicon.NEUTRAL,
    "F": feedback_lexicon.COMPLAINT,
    "Q": feedback_lexicon.CONFUSION,
    "X": feedback_lexicon.CORRECTION,
    "Z": feedback_lexicon.CLOSING,
    "S": feedback_lexicon.SUCCESS,
    "T": feedback_lexicon.THANKS,
    "P": feedback_lexicon.PRAISE,
    "N": feedback_lexicon.CRITICISM,
    "x": feedback_lexicon.SOFT_CORRECTION,
    "q": feedback_lexicon.SOFT_CONFUSION,
}
"""Kinds of phrase; where two lists hold the same words the earlier kind here wins."""

POSITIVE_KINDS = frozenset("PSTZ")
NEGATIVE_KINDS = frozenset("NFIXxQq")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_NEGATORS = _words(
    "not never no hardly barely scarcely neither nor none without nothing nowhere isnt dont doesnt"
)
_TRANSPARENT = _words(  # may stand between a negator and what it negates
    "really very so quite that a an the all exactly particularly entirely completely totally super too as even what i "
    "would call it this is be been look looks looking seem seems seeming sound sounds feel get got getting have had "
    "being of much at find think my your actually any working in way terribly especially for you do did does them are "
    "was these those answer one answers code single"
)
_IRREALIS = _words(
    "if would could should might may wish hope hoping whether until unless want wants need needs looking find recommend "
    "suggest prefer some make makes making wanting supposed how where whose be try trying to "
    "can must will whichever whatever wherever something somewhere anything anywhere someone"
)
_AUXILIARY = _words("is are was were does do did can could would will should has have had may might shall am")
_SUBJECT_AFTER = _words(
    "it this that there the you i we they he she a an my your any these those anyone someone u one"
)
_WH = _words("what who when where which why how whose whom")
_SOLVED = _words(
    "fixed solved resolved removed cleared rid sorted handles handled caught eliminated fixes solves"
)
_FEARED = _words(
    "if would could might may whether unless avoid prevent handle case when causes cause catch possible"
)
_INTENSIFIERS = _words(
    "absolutely totally completely utterly very so really extremely incredibly super insanely fucking freaking damn "
    "truly exceptionally remarkably entirely such always still"
)
_CONTRAST = _words(
    "but however though although yet except nevertheless nonetheless only unfortunately sadly tho"
)
_CONCESSIVE = _words("although though while despite whereas even")
_QUESTION = _words(
    "what who when where which why how whose whom is are was were does do did can could would will should has have had "
    "may might shall am any"
)
_REQUEST = _words(
    "please pls find show give book make write add change tell list create send search look help explain let lets "
    "recommend suggest generate translate summarize compare calculate convert check order play set remind schedule "
    "reserve update remove delete fix implement refactor draft compose describe define get need want try use run "
    "open turn put read buy call cancel move"
)
_COPULAS = _words(
    "is are was were looks look sounds seems feels been be being am looking sounding works tastes reads"
)
_AFTER_PRAISE = _words(
    "job work answer answers idea point explanation help stuff suggestion suggestions catch one thing solution response "
    "choice call summary start for and thanks thank now as on in with so that this it i you to too man mate dude "
    "example examples effort tip tips advice info information insight reply fix bot find much again all exactly just "
    "the your my then yes ok okay very really how what because since if of today here there work! write writeup "
    "enough already indeed except but every both we cheers lol haha sir buddy bro ! breakdown overview list result "
    "results detail details approach analysis service results resource guide tool walkthrough"
)
_OPENERS = _words(
    "and so but then ok okay also well now oh um hmm hey hi yes yeah yep no nope great thanks perfect cool"
)
_PRONOUNS = _words(
    "it this that these those you your they them still again everything nothing same now answer"
)
_ADDRESSED = _words("i it this that you they there he she we")

_EXPANSIONS: dict[str, tuple[str, ...]] = {
    "can't": ("can", "not"), "cant": ("can", "not"), "cannot": ("can", "not"), "won't": ("will", "not"),
    "wont": ("will", "not"), "shan't": ("shall", "not"), "ain't": ("is", "not"), "aint": ("is", "not"),
    "let's": ("let", "us"), "y'all": ("you", "all"), "i'm": ("i", "am"), "im": ("i", "am"),
    "thx": ("thanks",), "thanx": ("thanks",), "tnx": ("thanks",), "tks": ("thanks",), "ty": ("thank", "you"),
    "tysm": ("thank", "you"), "tyvm": ("thank", "you"), "thnx": ("thanks",), "thankss": ("thanks",),
    "thank's": ("thanks",), "thans": ("thanks",), "thnks": ("thanks",), "ta": ("thanks",),
    "u": ("you",), "ur": ("your",), "r": ("are",), "pls": ("please",), "plz": ("please",), "k": ("ok",),
    "gr8": ("great",), "grate": ("great",), "gud": ("good",), "gj": ("good", "job"), "np": ("no", "problem"),
    "idk": ("i", "do", "not", "know"), "dunno": ("do", "not", "know"), "gonna": ("going", "to"), "wanna": ("want", "to"),
    "nvm": ("never", "mind"), "nevermind": ("never", "mind"), "yea": ("yes",), "yeah": ("yeah",), "ya": ("yes",),
    "yup": ("yes",), "yep": ("yes",), "lgtm": ("looks", "good"), "ftw": ("great",), "thankyou": ("thank", "you"),
    "incorect": ("incorrect",), "wrogn": ("wrong",), "worng": ("wrong",), "wrng": ("wrong",), "prefect": ("perfect",),
    "pefect": ("perfect",), "awsome": ("awesome",), "perfecto": ("perfect",), "realy": ("really",),
    "definately": ("definitely",), "exaclty": ("exactly",), "didnt": ("did", "not"), "doesnt": ("does", "not"),
    "dont": ("do", "not"), "isnt": ("is", "not"), "wasnt": ("was", "not"), "arent": ("are", "not"),
    "havent": ("have", "not"), "hasnt": ("has", "not"), "couldnt": ("could", "not"), "wouldnt": ("would", "not"),
    "shouldnt": ("should", "not"), "thats": ("that", "is"), "its": ("it", "is"), "whats": ("what", "is"),
    "youre": ("you", "are"), "ive": ("i", "have"), "theres": ("there", "is"), "theyre": ("they", "are"),
    "hes": ("he", "is"), "id": ("i", "would"), "amazeballs": ("amazing",), "appriciate": ("appreciate",),
    "apreciate": ("appreciate",), "brill": ("brilliant",), "fab": ("fabulous",), "cheerz": ("cheers",),
    "alright": ("okay",), "kk": ("ok",), "okey": ("ok",), "yess": ("yess",), "nope": ("nope",),
}  # fmt: skip
_SUBJECTS = _words(
    "that it what he she there where who how let here everything this i you we they one nothing something when why "
    "code answer link page"
)
_SUFFIXES = {"'s": "is", "'re": "are", "'m": "am", "'ve": "have", "'ll": "will", "'d": "would"}

EMOJI: dict[str, str] = {
    **dict.fromkeys("👍❤😊😀😃😄😁🎉🙌👏🔥💯✅😍🥰🤩👌💪🚀🥳😻💖💕💙💚💛🧡💜🤗😎⭐🌟✨🏆🤝😌☺🫶🤌", "P"),
    "🙏": "T",
    **dict.fromkeys("👎😡😠🤬😤😞😒💩❌😩😫😣😖😔☹🙁🤮🤢💔🤡😾🚫😑🖕", "N"),
    **dict.fromkeys("🙄🤦", "I"),
    **dict.fromkeys("🤔❓😕🤨🤷😵🧐😐", "Q"),
}
_EMOTICONS = {
    **dict.fromkeys([":)", ":-)", ":D", ":-D", ":))", ":]", "=)", ";)", ";-)", "<3", "^^", ":p", ":-p", "xd", ":d"], "P"),
    **dict.fromkeys([":(", ":-(", ":((", ":'(", ">:(", "=(", ":[", "-_-", "d:", ":c"], "N"),
    **dict.fromkeys([":/", ":-/", ":\\", ":|", ":-|", "o_o", ":s"], "q"),
}  # fmt: skip
_WHOLE: dict[str, str] = {
    **dict.fromkeys(["what", "wat", "eh", "sorry", "pardon", "pardon me", "excuse me", "explain", "meaning", "say again"], "Q"),
    **dict.fromkeys(["really", "are you sure", "hmm", "hm", "umm", "hmmm", "um", "and", "so", "you sure", "sure"], "q"),
    **dict.fromkeys(["no", "nope", "nah", "noo", "nooo", "no no", "no no no", "negative", "not that", "other one"], "x"),
    **dict.fromkeys(["good", "right", "exactly", "yes exactly", "indeed", "true", "agreed", "bingo", "love it", "nice one",
                     "very good", "so good", "good good", "all good", "yes perfect", "precisely", "yay", "finally",
                     "works", "fixed", "solved", "done thanks", "better", "right on", "ace", "well done", "fine thanks"], "P"),
    **dict.fromkeys(["not really", "not quite", "not exactly", "not this", "not it", "nothing", "still nothing", "same",
                     "same here still", "still no", "no change", "still", "empty", "blank", "stop", "whatever", "bruh",
                     "come on", "oh come on", "seriously", "for god is sake", "not good", "boring", "cringe", "smh"], "N"),
}  # fmt: skip

_MARKS = frozenset('.!?,;:()-–—…\n"*')
_TOKEN = re.compile(
    r"[^\W\d_]+(?:['][^\W\d_]+)*"  # words
    r"|\d+(?:[.,]\d+)*(?:\s?/\s?\d+)?"  # numbers, 4/5
    r"|[.!?]+|\n+|[,;…()\"–—]|\s-+\s|:(?=\s)"  # boundaries
    r"|[:;=]['-]?(?:[()\[\]|/\\]+|[dpscx](?!\w))|<3|-_-|:'\(|\^\^"  # emoticons
    r"|[^\w\s]"
)
_TABLE = str.maketrans(
    {
        "’": "'",
        "‘": "'",
        "“": '"',
        "”": '"',
        "`": "`",
        "İ": "i",
        "´": "'",
        "！": "!",
        "？": "?",
        "，": ",",
        "。": ".",
    }
)
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|^\s*>.*$|https?://\S+|www\.\S+", re.DOTALL | re.MULTILINE)
_QUOTED = re.compile(r'"[^"\n]{1,200}"')
_ELONGATED = re.compile(r"([a-z])\1{2,}")
_RATING = re.compile(
    r"(?<![\d./-])(\d{1,3}(?:[.,]\d)?)\s?(?:/|out of)\s?(5|10|100)(?![\d/])|(?<![\d.])([0-5])\s?(?:-\s?)?stars?\b"
)
_GRADE = re.compile(
    r"^\W*(?:grade:?\s*|i'd (?:say|give it) (?:an? )?)?([a-df])([+-]?)(?: (?:work|job|answer))?\W*$"
)
_MAX_CHARS = 2000
"""Longer replies are read at their beginning and their end: what lies between is pasted material."""


@dataclass(slots=True)
class Hit:
    """One phrase found, as it is read in its place."""

    kind: str
    """A key of `KINDS`: P praise, S success, T thanks, Z closing, N criticism, F complaint, I irony, X correction,
    x soft correction, Q confusion, q doubt."""
    weight: int
    """How many matches it counts for: 2 where it is intensified."""
    start: int
    end: int
    sentence: int
    clause: int
    evidence: str
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
    cancelled: list[str] = field(default_factory=list)
    """Kinds of the phrases that were found and, in their place, say nothing."""
    conceded: list[str] = field(default_factory=list)
    """Kinds of the phrases that gave way to others."""


def _wordings(phrase: str) -> list[tuple[str, ...]]:
    """Every wording of one phrase in the notation of `feedback_lexicon`."""
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
    """Every wording of every phrase of a list in the notation of `feedback_lexicon`, as words."""
    for phrase in re.split(r"[;\n]", text.replace("|\n", "|")):
        if phrase.strip():
            yield from _wordings(phrase.strip())


_KIND = ""
"""Key of a node in the index under which the kind of the phrase that ends there stands."""


@cache
def _index() -> dict[str, Any]:
    """The phrases as nested dictionaries by word. Built at the first reply, in about 50 ms."""
    root: dict[str, Any] = {}
    for kind, text in [*KINDS.items(), *feedback_languages.PHRASES.items()]:
        for wording in phrases(text):
            node = root
            for word in wording:
                node = node.setdefault(word, {})
            node.setdefault(_KIND, kind)
    return root


@cache
def _spaceless() -> tuple[re.Pattern[str], dict[str, str]]:
    kinds = {word: kind for kind, text in feedback_languages.SPACELESS.items() for word in text.split()}
    return re.compile("|".join(sorted(map(re.escape, kinds), key=len, reverse=True))), kinds


def _open(token: str) -> tuple[str, ...]:
    """Words of one token: contractions opened, misspellings mended, drawn-out letters shortened."""
    if "'" in token:
        if token.endswith("n't"):
            return (token[:-3], "not")
        at = token.rfind("'")
        word = _SUFFIXES.get(token[at:])
        if word is not None and token[:at] in _SUBJECTS:
            return (token[:at], word)
        return (token,)
    if len(token) > 3:
        short = _ELONGATED.sub(r"\1", token)
        if short != token:
            double = _ELONGATED.sub(r"\1\1", token)
            index = _index()
            return next(
                (_EXPANSIONS.get(w, (w,)) for w in (double, short) if w in index or w in _EXPANSIONS),
                (short,),
            )
    return (token,)


def _blank(match: re.Match[str]) -> str:
    return " " * len(
        match.group()
    )  # what is left keeps its place, so that evidence can be cut from the reply


class _Reader:
    """The words of one reply with their sentences and clauses, and the rules that look at them."""

    def __init__(self, text: str) -> None:
        self.cues = cues = Cues()
        if len(text) > _MAX_CHARS:
            text = text[: _MAX_CHARS // 2] + "\n" + text[-_MAX_CHARS // 2 :]
        lowered = text.translate(_TABLE).lower()
        plain = lowered
        if "`" in plain or ">" in plain or "://" in plain or "www." in plain:
            plain = _CODE.sub(_blank, plain)
            cues.code = plain != lowered
        if plain.count('"') > 1:
            unquoted = _QUOTED.sub(_blank, plain)
            cues.quoted = unquoted != plain
            if any(c.isalpha() for c in unquoted):  # a reply that is all quotation is its own words
                plain = unquoted
        self.text, self.plain = text, plain
        self.token: list[int] = []
        """Which token of the reply each word came from."""
        self.words: list[str] = []
        self.sentence: list[int] = []
        self.clause: list[int] = []
        self.clause_start: list[int] = [0]
        self.asked: set[int] = set()
        """Sentences that end with a question mark."""
        self.exclaimed: set[int] = set()
        self.contrast_at: list[int] = []
        self.hits: list[Hit] = []
        self._tokenize(plain)

    def _tokenize(self, plain: str) -> None:
        words, sentences, clauses, starts = self.words, self.sentence, self.clause, self.clause_start
        sentence = clause = 0
        for number, token in enumerate(_TOKEN.findall(plain)):
            opened = _EXPANSIONS.get(token)
            if opened is None:
                if token.isalpha() and len(token) < 4:
                    opened = (token,)
                elif token[0].isalpha():
                    opened = _open(token)
                elif token[0].isdigit():
                    opened = (token,)
                else:
                    mark = token.strip()[:1] or "\n"
                    if mark in ".!?…\n;":
                        if "?" in token:
                            self.asked.add(sentence)
                        if "!" in token:
                            self.exclaimed.add(sentence)
                        if words and sentences[-1] == sentence:
                            sentence += 1
                            clause += 1
                            starts.append(len(words))
                    elif mark in ',:()-–—"':
                        if words and clauses[-1] == clause:
                            clause += 1
                            starts.append(len(words))
                    if token in EMOJI or token in _EMOTICONS:
                        kind = EMOJI.get(token) or _EMOTICONS[token]
                        at = len(words)
                        self.hits.append(Hit(kind, 1, at, at, max(sentence - 1, 0), clause, token))
                    continue
            for word in opened:
                if word in _CONTRAST and words and sentences[-1] == sentence:
                    self.contrast_at.append(len(words))
                    if clauses[-1] == clause:
                        clause += 1
                        starts.append(len(words))
                words.append(word)
                self.token.append(number)
                sentences.append(sentence)
                clauses.append(clause)
        self.cues.words = len(words)
        self.cues.sentences = sentence + 1

    def find(self) -> None:
        """Longest phrases first, left to right."""
        index, words, sentences = _index(), self.words, self.sentence
        n = len(words)
        i = 0
        while i < n:
            node = index.get(words[i])
            if node is None:
                i += 1
                continue
            j, best, kind = i + 1, 0, ""
            while True:
                found = node.get(_KIND)
                if found is not None:
                    best, kind = j, found
                if j >= n or sentences[j] != sentences[i]:
                    break
                node = node.get(words[j])
                if node is None:
                    break
                j += 1
            if best:
                self.hits.append(Hit(kind, 1, i, best, sentences[i], self.clause[i], ""))
                i = best
            else:
                i += 1

    def is_question(self, hit: Hit) -> bool:
        """Whether the clause of `hit` asks. "Does not work" and "which works" do not."""
        words, start = self.words, self.clause_start[hit.clause]
        if hit.sentence in self.asked:
            after = [c for c, s in zip(self.clause, self.sentence, strict=True) if s == hit.sentence]
            last = after[-1] if after else hit.clause
            tag = after.count(last) <= 2
            if hit.clause == last or (tag and hit.clause == last - 1):
                return True
        end = len(words)
        while start < end - 1 and words[start] in _OPENERS and self.clause[start + 1] == hit.clause:
            start += 1
        first = words[start] if start < end else ""
        second = words[start + 1] if start + 1 < end else ""
        if first in _WH:
            return second in _AUXILIARY or (
                first == "how" and second in ("to", "many", "much", "long", "about")
            )
        return first in _AUXILIARY and second in _SUBJECT_AFTER

    def is_request(self, hit: Hit) -> bool:
        words, start, end = self.words, self.clause_start[hit.clause], len(self.words)
        while start < end - 1 and words[start] in _OPENERS and self.clause[start + 1] == hit.clause:
            start += 1
        if start >= hit.start:
            return False
        first, second = words[start], words[start + 1] if start + 1 < end else ""
        if first in _REQUEST:
            return True
        if first in ("i", "we"):
            third = words[start + 2] if start + 2 < end else ""
            return second in ("need", "want", "would", "wonder", "wish", "prefer") or third in (
                "looking",
                "wondering",
            )
        return False

    def before(self, hit: Hit, most: int = 6) -> list[str]:
        """Up to `most` words before `hit` in its clause."""
        return self.words[max(self.clause_start[hit.clause], hit.start - most) : hit.start]

    def negated(self, hit: Hit) -> bool:
        """A negator stands before `hit` with nothing between that ends its reach."""
        before = self.before(hit)
        for i in range(len(before) - 1, -1, -1):
            word = before[i]
            if word in _NEGATORS:
                return before[i + 1 : i + 2] not in (["only"], ["just"], ["to"])
            if word not in _TRANSPARENT:
                return False
        return False

    def judge(self, hit: Hit) -> str:
        """The kind that `hit` has in its place; empty where it says nothing there."""
        kind = hit.kind
        if hit.start == hit.end:  # an emoji
            return "N" if kind == "I" else kind
        before = self.before(hit)
        if before and before[-1] in _INTENSIFIERS:
            hit.weight = 2
        if kind == "0":
            return ""
        if kind == "I":
            return "I"
        if kind in "PS":
            return self._judge_praise(hit, kind, before)
        if kind in "NF":
            return self._judge_criticism(hit, kind, before)
        if kind == "T":
            return "" if self._is_mere_politeness(hit) else "T"
        if kind == "Q":
            if not _FEARED.isdisjoint(before):
                return ""
            if self.negated(hit) and self.words[hit.start] != "not":
                hit.flipped = True
                return "P"
            return "Q"
        if kind == "x" and self.words[hit.start] == "actually":
            at_front = all(w in _OPENERS for w in before)
            return "x" if at_front else ""
        return kind

    def _judge_praise(self, hit: Hit, kind: str, before: list[str]) -> str:
        words = self.words
        if self.negated(hit):
            if self.is_question(hit) or not _FEARED.isdisjoint(before):
                return ""
            hit.flipped = True
            return "N"
        if not _IRREALIS.isdisjoint(before) or not _NEGATORS.isdisjoint(before):
            return ""
        if self.is_question(hit) and (before or hit.sentence in self.asked):
            return ""
        if kind == "P":
            if self.is_request(hit):
                return ""
            following = words[hit.end] if hit.end < len(words) and self.clause[hit.end] == hit.clause else ""
            predicate = bool(before) and before[-1] in _COPULAS
            if following and following not in _AFTER_PRAISE and not predicate:
                return ""
        return kind

    def _judge_criticism(self, hit: Hit, kind: str, before: list[str]) -> str:
        words = self.words
        if not _FEARED.isdisjoint(before) or not _SOLVED.isdisjoint(before):
            return ""
        carries_negation = kind == "F" and not _NEGATORS.isdisjoint(words[hit.start : hit.end])
        if not carries_negation and self.negated(hit):
            if self.is_question(hit):
                return ""
            hit.flipped = True
            return "P"
        inside = [w for w, c in zip(words, self.clause, strict=True) if c == hit.clause]
        if self.is_question(hit):
            return kind if kind == "F" and not {"still", "again", "keeps", "keep"}.isdisjoint(inside) else ""
        if self.is_request(hit):
            return ""
        return kind

    def _is_mere_politeness(self, hit: Hit) -> bool:
        """ "Could you book it? Thanks": courtesy in advance, at the end of a request."""
        if hit.end < len(self.words) - 1 or hit.start == 0:
            return False
        probe = [h for h in (self._clause_probe(c) for c in set(self.clause[: hit.start])) if h is not None]
        return any(self.is_request(h) or self.is_question(h) for h in probe)

    def _clause_probe(self, clause: int) -> Hit | None:
        positions = [i for i, c in enumerate(self.clause) if c == clause]
        if not positions:
            return None
        return Hit("", 1, positions[-1] + 1, positions[-1] + 1, self.sentence[positions[0]], clause, "")

    def evidence(self, hit: Hit) -> str:
        """The words of the reply, as it wrote them, behind `hit`."""
        if hit.evidence:
            return hit.evidence
        spans = [m.span() for m in _TOKEN.finditer(self.plain)]
        a, b = spans[self.token[hit.start]][0], spans[self.token[hit.end - 1]][1]
        return self.text[a:b] if len(self.text) == len(self.plain) else self.plain[a:b]


def read(text: str) -> tuple[list[Hit], Cues]:
    """What `text` says by its words: the phrases that count, in order, and what else was seen.

    Rules: a negator turns praise and criticism round ("not perfect", "not bad"); what is asked, wished or
    feared is not said ("is that right?", "if it works"); quotation and code are not the user's words; after
    "but" the later part rules; courtesy yields to a complaint; a failure after bare praise makes it irony.
    """
    reader = _Reader(text)
    reader.find()
    if not text.isascii():
        pattern, kinds = _spaceless()
        for match in pattern.finditer(reader.plain):
            kind = kinds[match.group()]
            if kind != "0":
                at = len(reader.words)
                reader.hits.append(Hit(kind, 1, at, at, 0, 0, match.group()))
    rating = _rating(reader)
    if rating is not None:
        return [rating], reader.cues
    cues = reader.cues
    words = reader.words
    cues.questions, cues.exclamations = len(reader.asked), len(reader.exclaimed)
    cues.contrast = bool(reader.contrast_at)
    if words:
        cues.leading_no = words[0] in ("no", "nope", "nah")
        cues.leading_yes = words[0] in ("yes", "yeah", "ok", "okay", "sure")
        cues.negators = sum(w in _NEGATORS for w in words)
    if 0 < len(words) <= 4:
        kind = _WHOLE.get(" ".join(words))
        if kind is not None:
            reader.hits = [h for h in reader.hits if h.start == h.end]
            reader.hits.append(Hit(kind, 1, 0, len(words), 0, 0, ""))
            for hit in reader.hits:
                hit.evidence = reader.evidence(hit)
            return _relate(reader, reader.hits), cues
    kept: list[Hit] = []
    for hit in reader.hits:
        kind = reader.judge(hit)
        if kind:
            hit.kind = kind
            kept.append(hit)
        elif hit.kind != "0":
            cues.cancelled.append(hit.kind)
    kept.sort(key=lambda h: h.start)
    if len(kept) > 1:
        kept = _relate(reader, kept)
    for hit in kept:
        hit.evidence = reader.evidence(hit)
    return kept, cues


def _rating(reader: _Reader) -> Hit | None:
    plain = reader.plain
    stars = plain.count("⭐") + plain.count("★")
    if stars > 1:
        return _rated(min(stars, 5) / 5, "⭐" * stars)
    if len(reader.words) > 12:
        return None
    found = _RATING.search(plain) if any(c.isdigit() for c in plain) else None
    if found:
        value, scale = (found[1], float(found[2])) if found[1] else (found[3], 5.0)
        share = float(value.replace(",", ".")) / scale
        return _rated(share, found.group()) if share <= 1 else None
    if len(plain) <= 30:
        grade = _GRADE.match(plain)
        if grade and (grade[2] or "grade" in plain or "give" in plain):
            return _rated({"a": 1.0, "b": 0.75, "c": 0.5, "d": 0.3, "f": 0.0}[grade[1]], plain.strip())
    return None


def _rated(share: float, evidence: str) -> Hit | None:
    """At least 70 % is praise, at most 50 % criticism, and what lies between is neither."""
    if share >= 0.7:
        return Hit("P", 1 + int(share >= 0.8) + int(share >= 0.95), 0, 0, 0, 0, evidence)
    if share <= 0.5:
        return Hit("N", 1 + int(share <= 0.4) + int(share <= 0.2), 0, 0, 0, 0, evidence)
    return None


def _relate(reader: _Reader, hits: list[Hit]) -> list[Hit]:
    """Drops the hits that give way to others; `reader.cues.conceded` records their kinds."""
    dropped: set[int] = set()

    def drop(those: list[Hit]) -> None:
        dropped.update(id(h) for h in those)

    def alive(kinds: str) -> list[Hit]:
        return [h for h in hits if h.kind in kinds and id(h) not in dropped]

    if alive("I"):
        drop(alive("PSTZ"))
    for at in reversed(reader.contrast_at):
        left = [h for h in alive("PSTZNFQXxq") if h.start < at]
        right = [h for h in alive("PSTZNFQXxq") if h.start >= at]
        word = reader.words[at]
        if word in ("though", "tho") and (
            at + 1 >= len(reader.words) or reader.sentence[at + 1] != reader.sentence[at]
        ):
            # a closing "though" concedes its own clause
            own = [h for h in left if h.sentence == reader.sentence[at] and h.clause >= reader.clause[at] - 1]
            left, right = own, [h for h in left if h not in own]
        elif word in ("although", "though") and (at == 0 or reader.sentence[at - 1] != reader.sentence[at]):
            clause = reader.clause[at]
            left, right = [h for h in right if h.clause == clause], [h for h in right if h.clause > clause]
        if any(h.kind in "NFQXx" for h in right) and not any(h.kind in "PS" for h in right):
            drop([h for h in left if h.kind in "PSTZ"])
        elif any(h.kind in "PS" for h in right) and not any(h.kind in "NFQX" for h in right):
            drop([h for h in left if h.kind in "NFQXxq"])
    hard = alive("NFQX")
    if hard:
        drop(alive("TZ"))
        for praise in alive("PS"):
            later = [h for h in alive("NFQX") if h.start > praise.start]
            earlier = [h for h in alive("NFQX") if h.start < praise.start]
            own = [i for i, c in enumerate(reader.clause) if c == praise.clause]
            bare = praise.kind == "P" and len(own) - (praise.end - praise.start) <= 1
            if later and bare:
                drop([praise])
            elif earlier and not later and praise.kind == "S":
                drop([h for h in earlier if h.kind in "NFQ"])
    if alive("PSTZ") and not alive("NFQXI"):
        if alive("PSZ"):
            drop(alive("xq"))
        elif alive("q"):
            drop(alive("T"))
    reader.cues.conceded = [h.kind for h in hits if id(h) in dropped]
    return [h for h in hits if id(h) not in dropped]
