"""The join by brute force: for each reply, every interaction it could be about. Pure.

A reply belongs to the interaction that it names, else to its conversation's latest interaction before it.
Where events were sent far apart in time the outcome may depend on when they were read: such a reply is not
`certain`, and may stand with any of its candidates or nowhere.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from streams.audit.evidence import Evidence, Interaction, Key, Reply

LATE_S = 24 * 3600.0
"""A reply that names no interaction may lie this long after the one it is about."""

E = TypeVar("E", Interaction, Reply)


@dataclass(frozen=True, slots=True)
class Assigned:
    """A reply, and where it belongs."""

    reply: Reply
    candidates: tuple[Interaction, ...]
    """Interactions that it can be about; the first is the one that it is about."""
    certain: bool
    """Whether it must stand with the first by now, and nowhere else."""
    settled: bool
    """Whether nothing further can happen to it by itself."""
    late: bool


@dataclass(frozen=True, slots=True)
class Joined:
    """All distinct events, and which belong together."""

    interactions: list[Interaction]
    replies: list[Assigned]
    duplicates: int
    """Repeated events."""
    reused: set[Key]
    """Ids that stand for interactions of several conversations."""
    rank: dict[Key, int]
    """How many interactions of its model are later: replay may have let go those beyond its capacity."""


def join(evidence: Evidence) -> Joined:
    """Assigns every reply."""
    interactions, replies = _distinct(evidence.interactions), _distinct(evidence.replies)
    keys = Counter(i.key for i in interactions)
    rank: dict[Key, int] = {}
    for its in _grouped(interactions, lambda i: i.model_id).values():
        for n, interaction in enumerate(sorted(its, key=lambda i: i.order, reverse=True)):
            rank[interaction.key] = n
    talks = _grouped(interactions, lambda i: i.conversation_id)
    by_id = _grouped(interactions, lambda i: i.id)
    assigned = []
    for reply in replies:
        talk = talks.get(reply.conversation_id, [])
        # A name that its own conversation does not know is looked for in replay, at the end of the wait.
        found = _candidates(reply, talk) or by_id.get(reply.names or "", [])
        assigned.append(_assigned(reply, found, evidence, rank))
    repeated = len(evidence.interactions) + len(evidence.replies) - len(interactions) - len(replies)
    return Joined(interactions, assigned, repeated, {k for k, n in keys.items() if n > 1}, rank)


def _candidates(reply: Reply, talk: Sequence[Interaction]) -> list[Interaction]:
    """In the reply's conversation, the best first."""
    if reply.names is not None:
        return [i for i in talk if i.id == reply.names]
    before = [i for i in talk if reply.at - LATE_S <= i.at < reply.at]
    return sorted(before, key=lambda i: i.order, reverse=True)


def _assigned(
    reply: Reply, candidates: Sequence[Interaction], evidence: Evidence, rank: dict[Key, int]
) -> Assigned:
    window, grace = evidence.window_s, evidence.grace_s
    waits_until = max(reply.at, reply.arrived) + window
    settled = reply.is_done and waits_until + grace <= evidence.started
    if not candidates:
        return Assigned(reply, (), False, settled, False)
    best = candidates[0]
    known_until = max(best.at, best.arrived) + window + LATE_S
    certain = (
        reply.is_done
        and best.is_done
        and best.conversation_id == reply.conversation_id
        and best.arrived + grace < waits_until
        and reply.arrived + grace < known_until
        # Once its window has closed, the interaction's features are in replay alone.
        and (reply.arrived + grace < best.at + window or rank[best.key] < evidence.capacity)
    )
    late = reply.at > best.at + window or (reply.is_done and best.is_done and not certain)
    return Assigned(reply, (best,) if certain else tuple(candidates), certain, certain or settled, late)


def _distinct(events: Iterable[E]) -> list[E]:
    """The first of each id in its conversation."""
    first: dict[tuple[str, str], E] = {}
    for event in events:
        first.setdefault((event.conversation_id, event.id), event)
    return list(first.values())


def _grouped(
    interactions: Iterable[Interaction], key: Callable[[Interaction], str]
) -> dict[str, list[Interaction]]:
    groups: dict[str, list[Interaction]] = defaultdict(list)
    for interaction in interactions:
        groups[key(interaction)].append(interaction)
    return dict(groups)
