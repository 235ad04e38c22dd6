"""The worlds a learner is judged in: requests, hidden preferences, and users who reply in words.

A `Task` is one seed of one world. What a learner sees is in `Request` and `Feedback`; everything else here
is the users' own. All chance is drawn before the run, so that every learner meets the same requests, and the
same silence, noise and choice of words at the same step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from benchmarks.replies import BANKS, ReplyBank
from benchmarks.sentences import Ints, Sentences, embed, some_kinds
from cortex_core.evaluation import precision_at_k
from cortex_core.feedback_collector import Feedback, FeedbackCollector, FeedbackSignal, SignalType
from cortex_core.replay_buffer import FloatArray

World = Literal["strategy", "memory", "combined"]

MEMORY_CHANCE = (0.05, 0.35, 0.7, 0.95)
"""memory: P(content) with 0, 1, 2, 3 helpful memories among the three"""
COMBINED_CHANCE = (0.4, 0.75, 0.9, 0.97)
"""combined: the same where the strategy is the preferred one"""
WRONG_STRATEGY_CHANCE = 0.05
"""combined: P(content) where it is not"""
NO_REPLY = 2 / 3
"""Share of the users silent about the answer who send nothing; the others go on about something else."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a learner is shown."""

    step: int
    text: str
    message: FloatArray
    """(D,)"""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a learner decided."""

    strategy: int
    memories: tuple[int, ...] = ()
    """rows of `Task.memories`, best first"""
    confidence: float | None = None
    """[0, 1] predicted probability of a content user; None where the learner predicts none"""
    extra: object = None
    """whatever the learner wants back with the feedback"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How good an answer was, as only the user knows."""

    right: bool
    """the preferred strategy"""
    precision: float
    """share of helpful memories among the first three; 0 without memories"""
    chance: float
    """probability that this user is content"""
    content: bool


@dataclass(frozen=True, slots=True)
class Settings:
    """What makes a world; see the flags of `benchmarks.learning`."""

    steps: int = 3000
    kinds: int = 50
    """kinds of request, drawn anew in each seed"""
    strategies: int = 7
    silence: float = 0.3
    noise: float = 0.1
    replies: str = "plain"
    oracle: bool = False
    memories: int = 200
    groups: int | None = None
    """kinds of request that share their helpful memories: None, one group an area"""
    switch: float = 0.0
    """share of the kinds whose users change their mind at half time"""
    delay: int = 0


@dataclass(slots=True)
class Task:
    """One seed of one world."""

    world: World
    settings: Settings
    seed: int
    requests: list[Request]
    kinds: Ints
    """(steps,) hidden kind of each request"""
    preferred: Ints
    """(2, kinds) preferred strategy before and after half time"""
    memories: FloatArray | None
    """(M, D), or None"""
    helpful: tuple[frozenset[int], ...] = ()
    """for each kind"""
    bank: ReplyBank = field(default_factory=lambda: BANKS["plain"])
    _chance: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 5)))
    _reader: Reader | None = None

    def best(self, step: int) -> int:
        """The strategy that this request's user prefers."""
        half = step >= len(self.requests) // 2
        return int(self.preferred[int(half), self.kinds[step]])

    @property
    def changed(self) -> npt.NDArray[np.bool_]:
        """(steps,) whether the request's kind changes its preference at half time."""
        moved: npt.NDArray[np.bool_] = (self.preferred[0] != self.preferred[1])[self.kinds]
        return moved

    def outcome(self, request: Request, answer: Answer) -> Outcome:
        """How good the answer is."""
        right = answer.strategy == self.best(request.step)
        precision = 0.0
        if self.memories is not None:
            precision = precision_at_k(answer.memories, self.helpful[int(self.kinds[request.step])], 3)
        hits = round(precision * 3)
        if self.world == "strategy":
            chance = float(right)
        elif self.world == "memory":
            chance = MEMORY_CHANCE[hits]
        else:
            chance = COMBINED_CHANCE[hits] if right else WRONG_STRATEGY_CHANCE
        return Outcome(right, precision, chance, bool(self._chance[request.step, 0] < chance))

    def reply(self, request: Request, answer: Answer) -> Feedback | None:
        """What the user types, read. None: nothing came."""
        _, silent, kind_of_silence, noisy, word = self._chance[request.step]
        bank = self.bank
        meant: Literal[-1, 0, 1]
        if silent < self.settings.silence:
            if kind_of_silence < NO_REPLY:
                return None
            texts, meant = bank.neutral, 0
        else:
            good = self.outcome(request, answer).content != (noisy < self.settings.noise)
            texts, meant = (bank.content, 1) if good else (bank.discontent, -1)
        if self.settings.oracle:
            return read_perfectly(meant)
        if self._reader is None:
            self._reader = Reader(bank)
        return self._reader(texts[int(word * len(texts))], request)


def read_perfectly(meant: Literal[-1, 0, 1]) -> Feedback:
    """The reading of someone who knows what the user meant (not whether it is true: noise stays noise)."""
    if meant == 0:
        return Feedback.of([FeedbackSignal.of(SignalType.ENGAGEMENT, 1.0, "[meant]")], 0.1, "oracle-1")
    kind = SignalType.POSITIVE if meant > 0 else SignalType.NEGATIVE
    return Feedback.of([FeedbackSignal.of(kind, 0.5, "[meant]")], 1.0, "oracle-1")


class Reader:
    """The one FeedbackCollector for all learners, given what the joiner gives it."""

    def __init__(self, bank: ReplyBank) -> None:
        self._collector = FeedbackCollector()
        self._embeddings = dict(zip(bank.texts, embed(bank.texts), strict=True))
        self._known: dict[str, Feedback] = {}

    def __call__(self, text: str, request: Request) -> Feedback:
        feedback = self._known.get(text)
        if feedback is None:
            feedback = self._collector.extract(text, embedding=self._embeddings[text])
            self._known[text] = feedback
        return feedback


def make(world: World, sentences: Sentences, settings: Settings, seed: int) -> Task:
    """The world of one seed.

    Raises:
        SystemExit: there are too few sentences for it.
    """
    rng = np.random.default_rng([seed, {"strategy": 1, "memory": 2, "combined": 3}[world]])
    sentences = some_kinds(sentences, settings.kinds, rng)
    order = rng.permutation(len(sentences.texts))
    memories: FloatArray | None = None
    helpful: tuple[frozenset[int], ...] = ()
    used: Ints = np.empty(0, dtype=np.int64)
    if world != "strategy":
        memories, helpful, used = _memory_bank(sentences, settings, order, rng)
    stream = order[~np.isin(order, used)]
    if len(stream) < settings.steps:
        raise SystemExit(
            f"{len(stream)} sentences are too few for {settings.steps} steps: a sentence is asked once"
        )
    stream = stream[: settings.steps]
    before = rng.integers(settings.strategies, size=sentences.kinds)
    after = before.copy()
    if settings.switch and settings.strategies > 1:
        changing = rng.permutation(sentences.kinds)[: round(settings.switch * sentences.kinds)]
        shift = rng.integers(1, settings.strategies, size=len(changing))
        after[changing] = (before[changing] + shift) % settings.strategies
    return Task(
        world=world,
        settings=settings,
        seed=seed,
        requests=[
            Request(step, sentences.texts[i], sentences.embeddings[i])
            for step, i in enumerate(stream.tolist())
        ],
        kinds=sentences.kind[stream],
        preferred=np.stack([before, after]),
        memories=memories,
        helpful=helpful,
        bank=BANKS[settings.replies],
        _chance=rng.random((settings.steps, 5)),
    )


def _memory_bank(
    sentences: Sentences, settings: Settings, order: Ints, rng: np.random.Generator
) -> tuple[FloatArray, tuple[frozenset[int], ...], Ints]:
    """Memories are sentences that are never asked. For a group of kinds, of n = memories / groups:

    - n/5 close by cosine and helpful: sentences of the group's own kinds;
    - 2n/5 close and useless: sentences of the group's own kinds;
    - n/5, at least 2, far and helpful: sentences of another area, close to requests they are useless for;
    - the rest far and useless.
    """
    groups = settings.groups or sentences.areas
    group_of = sentences.area if settings.groups is None else rng.permutation(sentences.kinds) % groups
    n = settings.memories // groups
    close_good, close_bad = max(1, n // 5), max(1, 2 * n // 5)
    far_good = max(2, n // 5)
    kind_of = sentences.kind
    taken: dict[int, None] = {}
    good: list[set[int]] = [set() for _ in range(groups)]
    rows: list[int] = []
    for group in range(groups):
        own = [i for i in order if group_of[kind_of[i]] == group and i not in taken]
        area = set(sentences.area[group_of == group].tolist())
        close = own[: close_good + close_bad]
        taken.update(dict.fromkeys(close))
        other = [i for i in order if int(sentences.area[kind_of[i]]) not in area and i not in taken]
        far = other[: max(n - len(close), far_good)]
        taken.update(dict.fromkeys(far))
        start = len(rows)
        rows.extend([*close, *far])
        good[group].update(range(start, start + close_good))
        good[group].update(range(start + len(close), start + len(close) + far_good))
    used = np.array(rows, dtype=np.int64)
    helpful = tuple(frozenset(good[int(group_of[kind])]) for kind in range(sentences.kinds))
    return sentences.embeddings[used], helpful, used
