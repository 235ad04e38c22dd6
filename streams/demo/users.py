"""Simulated users: their requests, their satisfaction with an answer, and their replies.

    users = Users(seed=0)
    request = users.request(index)
    reaction = users.react(request, strategy_id, memory_ids)

Pure functions of a seed: no clock, no network, no state. Each random draw has its own named stream, so that
the same seed gives the same users and requests, whatever the answers and their order.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache

from streams.demo import replies, scenario
from streams.demo.replies import Tone
from streams.demo.scenario import KINDS, Kind

RIGHT_STRATEGY = 0.55
HELPFUL_MEMORIES = 0.45
FLOOR, CEILING = 0.05, 0.95
"""Bounds of the probability of a satisfied user."""

NOISE = 0.05
"""Fraction of replies with the wrong sign: irony, politeness, a slip."""
NEUTRAL = 0.08
"""Fraction of replies that do not concern the answer."""
SECOND_AFTER_BAD = 0.08
"""Fraction of dissatisfied users who first thank and later correct themselves."""
SECOND_AFTER_GOOD = 0.04
"""Fraction of satisfied users who first complain and later correct themselves."""

USERS = 48
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Style:
    """The writing style of a user."""

    lowercase: bool
    no_full_stop: bool
    typos: float
    """Probability of a typo in a message."""
    emoji: float
    """Probability of an emoji in a reply."""
    silence: float
    """Probability of not replying at all."""
    turns: int
    """Requests in a conversation."""


@dataclass(frozen=True)
class Request:
    """One message of one user."""

    index: int
    user: int
    conversation: str
    """Unique within a seed; a run adds its prefix."""
    kind: Kind
    text: str
    history: tuple[str, ...]
    """The user's earlier messages in this conversation, oldest first."""
    metadata: Mapping[str, float]


@dataclass(frozen=True)
class Reply:
    """A user's reply, `delay_s` seconds after the answer or the previous reply."""

    text: str
    tone: Tone
    delay_s: float


@dataclass(frozen=True)
class Reaction:
    """A user's reaction to an answer."""

    reward: float
    """True probability of a satisfied user, in [0, 1]. Hidden from the system."""
    satisfied: bool
    """Whether this user is satisfied: one draw with probability `reward`."""
    replies: tuple[Reply, ...]
    """None, one, or two replies; the second one revokes the first."""


def reward(kind: Kind, strategy_id: str, memory_ids: Collection[str]) -> float:
    """Probability of a satisfied user; the strategy counts slightly more than the memories."""
    share = len(set(kind.helpful) & set(memory_ids)) / len(kind.helpful)
    quality = RIGHT_STRATEGY * (strategy_id == kind.strategy) + HELPFUL_MEMORIES * share
    return FLOOR + (CEILING - FLOOR) * quality


def memory_precision(kind: Kind, memory_ids: Collection[str]) -> float:
    """Fraction of the retrieved memories that help; 0 without memories."""
    return len(set(kind.helpful) & set(memory_ids)) / len(memory_ids) if memory_ids else 0.0


class Users:
    """A population with one seed."""

    def __init__(self, seed: int = 0, count: int = USERS) -> None:
        self.seed = seed
        self.count = count
        self._order = lru_cache(maxsize=4)(self._shuffled)

    def style(self, user: int) -> Style:
        """The writing style of `user`."""
        rng = self._rng("style", user)
        return Style(
            lowercase=rng.random() < 0.35,
            no_full_stop=rng.random() < 0.4,
            typos=rng.choice((0.0, 0.02, 0.05, 0.15)),
            emoji=rng.choice((0.0, 0.05, 0.1, 0.35)),
            silence=rng.uniform(0.05, 0.3),
            turns=rng.randint(1, 4),
        )

    def request(self, index: int) -> Request:
        """The `index`-th request of this population (from 0). In each round every user makes one request."""
        round_, place = divmod(index, self.count)
        user = self._order(round_)[place]
        style = self.style(user)
        conversation, turn = divmod(round_, style.turns)
        asked = [self._ask(user, style, r) for r in range(round_ - turn, round_ + 1)]
        rng = self._rng("metadata", index)
        return Request(
            index=index,
            user=user,
            conversation=f"user-{user}-{conversation}",
            kind=asked[-1][0],
            text=asked[-1][1],
            history=tuple(text for _, text in asked[:-1]),
            metadata={
                "hour_of_day": float(rng.randint(7, 20)),
                "day_of_week": float(rng.randint(0, 6)),
                "conversation_length": float(turn),
            },
        )

    def react(self, request: Request, strategy_id: str, memory_ids: Collection[str]) -> Reaction:
        """The user's reaction to an answer with this strategy and these memories."""
        rng = self._rng("reaction", request.index)
        # The draws do not depend on the answer, so that two policies get the same random numbers.
        mood, silence, slip, late = (rng.random() for _ in range(4))
        value = reward(request.kind, strategy_id, memory_ids)
        satisfied = mood < value
        style = self.style(request.user)
        if silence < style.silence:
            return Reaction(value, satisfied, ())
        tones = _tones(satisfied, slip, late, rng.random())
        said = tuple(
            Reply(self._say(request, style, tone, place), tone, rng.uniform(0.3, 1.5) * (1 + place))
            for place, tone in enumerate(tones)
        )
        return Reaction(value, satisfied, said)

    def _rng(self, *stream: object) -> random.Random:
        return random.Random("/".join(map(str, (self.seed, *stream))))

    def _shuffled(self, round_: int) -> list[int]:
        order = list(range(self.count))
        self._rng("order", round_).shuffle(order)
        return order

    def _ask(self, user: int, style: Style, round_: int) -> tuple[Kind, str]:
        rng = self._rng("request", user, round_)
        kind = rng.choice(KINDS)
        text = _expand(rng.choice(kind.templates), scenario.SLOTS, rng)
        opener, closer = rng.choice(scenario.OPENERS), rng.choice(scenario.CLOSERS)
        return kind, _written(_joined(opener, text, closer), style, rng)

    def _say(self, request: Request, style: Style, tone: Tone, place: int) -> str:
        rng = self._rng("reply", request.index, place, tone)
        slots = {**scenario.SLOTS, **replies.SLOTS, "topic": request.kind.topic}
        text = _expand(rng.choice(replies.BANKS[tone]), slots, rng)
        text = _written(
            _joined(rng.choice(replies.OPENERS), text, rng.choice(replies.CLOSERS[tone])), style, rng
        )
        if rng.random() < style.emoji:
            mark = rng.choice(replies.EMOJI[tone])
            text = mark if rng.random() < 0.25 else f"{text} {mark}"
        return text


def _tones(satisfied: bool, slip: float, late: float, which: float) -> tuple[Tone, ...]:
    negative: Tone = "complaint" if which < 0.5 else "correction" if which < 0.8 else "confusion"
    if late < (SECOND_AFTER_GOOD if satisfied else SECOND_AFTER_BAD):
        return (negative, "works_after_all") if satisfied else ("praise", "broke_again")
    if slip < NOISE:
        return (negative,) if satisfied else ("praise",)
    if slip < NOISE + NEUTRAL:
        return ("neutral",)
    return ("praise",) if satisfied else (negative,)


def _expand(template: str, slots: Mapping[str, tuple[str, ...]], rng: random.Random) -> str:
    """Fills every {slot}, including slots in the values; uses no value twice in a sentence."""
    used: set[str] = set()

    def fill(match: re.Match[str]) -> str:
        value = rng.choice([v for v in slots[match.group(1)] if v not in used])
        used.add(value)
        return _PLACEHOLDER.sub(fill, value)

    return _PLACEHOLDER.sub(fill, template)


def _joined(opener: str, text: str, closer: str) -> str:
    if closer and text[-1] in ".!?…" and closer[0] in ".!":
        closer = ""
    if closer.startswith(" ") and closer[1].isupper() and text[-1] not in ".!?":
        text += "."
    if not opener or opener[-2] in ".!?":
        text = text[0].upper() + text[1:]
    elif not text.startswith(("I ", "I'")):
        text = text[0].lower() + text[1:]
    return opener + text + closer


def _written(text: str, style: Style, rng: random.Random) -> str:
    """The text in this user's style."""
    slip, where = rng.random(), rng.random()
    if style.lowercase:
        text = text.lower()
    if style.no_full_stop:
        text = text.rstrip(".")
    at = 1 + int(where * (len(text) - 2))
    if slip < style.typos and len(text) > 12 and text[at - 1 : at + 1].isalpha():
        text = text[: at - 1] + text[at] + text[at - 1] + text[at + 1 :]
    return text or "."
