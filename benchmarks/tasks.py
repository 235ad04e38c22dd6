"""Simulated environments: requests, hidden preferences, and users who reply in words.

A `Task` is one seed of one environment (`World`). A learner sees `Request` and `Feedback`; everything else is
hidden. All random numbers are drawn before the run, so that every learner gets the same requests, and the
same silence, noise and choice of words at the same step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from benchmarks.replies import BANKS, ReplyBank
from benchmarks.sentences import Ints, Sentences, embed, some_kinds
from cortex_core.arrays import DoubleArray, FloatArray
from cortex_core.evaluation import precision_at_k
from cortex_core.feedback_collector import (
    DEFAULT_EXTRACTOR,
    Feedback,
    FeedbackCollector,
    FeedbackSignal,
    SignalType,
)

World = Literal["strategy", "memory", "combined"]

MEMORY_CHANCE = (0.05, 0.35, 0.7, 0.95)
"""memory: P(satisfied user) with 0, 1, 2, 3 helpful memories among the three"""
COMBINED_CHANCE = (0.6, 0.85, 0.95, 0.98)
"""combined: the same with the preferred strategy"""
WRONG_STRATEGY_CHANCE = 0.03
"""combined: P(satisfied user) with a different strategy"""
NO_REPLY = 2 / 3
"""Fraction of the users silent about the answer who send no reply; the others change the subject."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request, as the learner sees it."""

    step: int
    text: str
    message: FloatArray
    """(D,)"""


@dataclass(frozen=True, slots=True)
class Answer:
    """A learner's decision."""

    strategy: int
    memories: tuple[int, ...] = ()
    """rows of `Task.memories`, best first"""
    confidence: float | None = None
    """predicted probability of a satisfied user, in [0, 1]; None if the learner does not predict it"""
    extra: object = None
    """data that the learner gets back with the feedback"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The true quality of an answer, hidden from the learner."""

    right: bool
    """whether the strategy is the preferred one"""
    precision: float
    """fraction of helpful memories among the first three; 0 without memories"""
    chance: float
    """true probability of a satisfied user"""
    satisfied: bool


@dataclass(frozen=True, slots=True)
class Settings:
    """Parameters of an environment; see the flags of `benchmarks.learning`."""

    steps: int = 3000
    kinds: int = 50
    """kinds of request, drawn for each seed"""
    strategies: int = 7
    silence: float = 0.3
    noise: float = 0.1
    replies: str = "plain"
    extractor: str = DEFAULT_EXTRACTOR
    """extractor that reads the replies"""
    oracle: bool = False
    memories: int = 200
    groups: int | None = None
    """number of groups of kinds that share their helpful memories; None: one group per area"""
    switch: float = 0.0
    """fraction of the kinds whose preference changes at half time"""
    delay: int = 0


@dataclass(slots=True)
class Task:
    """One seed of one environment."""

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
    """rows of the helpful memories of each kind"""
    encoder: str = "minilm"
    """text encoder of requests and memories"""
    _chance: DoubleArray = field(default_factory=lambda: np.zeros((0, 5)))
    """(steps, 5) uniform random numbers for: satisfied, silent, kind of silence, noise, choice of words"""
    _reader: Reader | None = None

    def best(self, step: int) -> int:
        """The preferred strategy at a step."""
        half = step >= len(self.requests) // 2
        return int(self.preferred[int(half), self.kinds[step]])

    @property
    def changed(self) -> npt.NDArray[np.bool_]:
        """(steps,) whether the preference of the request's kind changes at half time."""
        moved: npt.NDArray[np.bool_] = (self.preferred[0] != self.preferred[1])[self.kinds]
        return moved

    def outcome(self, request: Request, answer: Answer) -> Outcome:
        """The true quality of an answer."""
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
        """The feedback extracted from the user's reply; None without a reply."""
        _, silent, kind_of_silence, noisy, word = self._chance[request.step]
        bank = BANKS[self.settings.replies]
        meant: Literal[-1, 0, 1]
        if silent < self.settings.silence:
            if kind_of_silence < NO_REPLY:
                return None
            texts, meant = bank.neutral, 0
        else:
            good = self.outcome(request, answer).satisfied != (noisy < self.settings.noise)
            texts, meant = (bank.satisfied, 1) if good else (bank.dissatisfied, -1)
        if self.settings.oracle:
            return read_perfectly(meant)
        if self._reader is None:
            self._reader = Reader(bank, self.encoder, self.settings.extractor)
        return self._reader(texts[int(word * len(texts))])


def read_perfectly(meant: Literal[-1, 0, 1]) -> Feedback:
    """Feedback of an oracle that knows what the reply says; noisy replies stay noisy."""
    if meant == 0:
        return Feedback.of([FeedbackSignal.of(SignalType.ENGAGEMENT, 1.0, "[meant]")], 0.1, "oracle-1")
    kind = SignalType.POSITIVE if meant > 0 else SignalType.NEGATIVE
    return Feedback.of([FeedbackSignal.of(kind, 0.5, "[meant]")], 1.0, "oracle-1")


class Reader:
    """Extracts feedback as the joiner does, with the reply's embedding; cached, shared by all learners."""

    def __init__(self, bank: ReplyBank, encoder: str, extractor: str = DEFAULT_EXTRACTOR) -> None:
        self._collector = FeedbackCollector(extractor)
        self._embeddings = dict(zip(bank.texts, embed(bank.texts, encoder), strict=True))
        self._known: dict[str, Feedback] = {}

    def __call__(self, text: str) -> Feedback:
        feedback = self._known.get(text)
        if feedback is None:
            feedback = self._collector.extract(text, embedding=self._embeddings[text])
            self._known[text] = feedback
        return feedback


def make(world: World, sentences: Sentences, settings: Settings, seed: int) -> Task:
    """Creates the environment of one seed.

    Raises:
        SystemExit: there are too few sentences.
    """
    rng = np.random.default_rng([seed, {"strategy": 1, "memory": 2, "combined": 3}[world]])
    sentences, others = some_kinds(sentences, settings.kinds, rng)
    order = rng.permutation(len(sentences.texts))
    memories: FloatArray | None = None
    helpful: tuple[frozenset[int], ...] = ()
    used: Ints = np.empty(0, dtype=np.int64)
    if world != "strategy":
        memories, helpful, used = _memory_bank(sentences, others, settings, order, rng)
    stream = order[~np.isin(order, used)]
    if len(stream) < settings.steps:
        raise SystemExit(f"{len(stream)} sentences are too few for {settings.steps} steps: each is used once")
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
        encoder=sentences.encoder,
        _chance=rng.random((settings.steps, 5)),
    )


def _memory_bank(
    sentences: Sentences, others: FloatArray, settings: Settings, order: Ints, rng: np.random.Generator
) -> tuple[FloatArray, tuple[frozenset[int], ...], Ints]:
    """Memories are sentences that are not requests. A group of kinds has n = memories / groups of them:

    - 3n/10 close by cosine and helpful, 3n/10 close and useless: sentences of the group's kinds;
    - 2n/10, at least 2, far and helpful, the rest far and useless: sentences of unused kinds.
    """
    groups = settings.groups or sentences.areas
    group_of = sentences.area if settings.groups is None else rng.permutation(sentences.kinds) % groups
    n = settings.memories // groups
    close_good = close_bad = max(1, 3 * n // 10)
    far_good = max(2, n // 5)
    far_bad = max(0, n - close_good - close_bad - far_good)
    if len(others) < groups * (far_good + far_bad):
        raise SystemExit(
            f"--kinds {settings.kinds} leaves too few sentences of unused kinds for the memories; try fewer"
        )
    far = iter(rng.permutation(len(others)))
    good: list[frozenset[int]] = []
    used: list[int] = []
    rows: list[FloatArray] = []
    for group in range(groups):
        close = [i for i in order if group_of[sentences.kind[i]] == group][: close_good + close_bad]
        used.extend(close)
        start = len(rows)
        rows.extend(sentences.embeddings[i] for i in close)
        rows.extend(others[next(far)] for _ in range(far_good + far_bad))
        first_far = start + len(close)
        good.append(frozenset([*range(start, start + close_good), *range(first_far, first_far + far_good)]))
    helpful = tuple(good[int(group_of[kind])] for kind in range(sentences.kinds))
    return np.stack(rows), helpful, np.array(used, dtype=np.int64)
