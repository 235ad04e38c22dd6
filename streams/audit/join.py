"""A brute-force join: for each reply, all interactions to which it may belong. Pure.

A reply belongs to the interaction that it names, else to its conversation's latest interaction before it. If
its events were sent far apart, the result may depend on when they were processed: such a reply is not
`certain`, and may belong to any of its candidates or to none.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from streams.audit.evidence import Evidence, Interaction, Key, Reply

LATE_S = 24 * 3600.0
"""The longest time between an interaction and a reply that belongs to it without naming it."""

E = TypeVar("E", Interaction, Reply)


@dataclass(frozen=True, slots=True)
class Assignment:
    """A reply, and the interactions to which it may belong."""

    reply: Reply
    candidates: tuple[Interaction, ...]
    """Best first."""
    certain: bool
    """Whether it must be in the experience of the first candidate by now, and in no other."""
    final: bool
    """Whether its assignment can no longer change without new events."""
    late: bool
    """Whether it came after its interaction's window."""


@dataclass(frozen=True, slots=True)
class Joined:
    """All distinct events and the assignment of the replies."""

    interactions: list[Interaction]
    replies: list[Assignment]
    duplicates: int
    """Number of duplicate events."""
    reused: set[Key]
    """Ids of interactions in more than one conversation."""
    rank: dict[Key, int]
    """Number of later interactions of the same model; from its capacity on, replay may have evicted it."""


def join(evidence: Evidence) -> Joined:
    """Assigns every reply."""
    interactions, replies = _distinct(evidence.interactions), _distinct(evidence.replies)
    keys = Counter(i.key for i in interactions)
    rank: dict[Key, int] = {}
    for its in _grouped(interactions, lambda i: i.model_id).values():
        for n, interaction in enumerate(sorted(its, key=lambda i: i.order, reverse=True)):
            rank[interaction.key] = n
    conversations = _grouped(interactions, lambda i: i.conversation_id)
    by_id = _grouped(interactions, lambda i: i.id)
    assigned = []
    for reply in replies:
        conversation = conversations.get(reply.conversation_id, [])
        # An interaction_id that is not in the conversation is looked up in replay once the wait ends.
        found = _candidates(reply, conversation) or by_id.get(reply.interaction_id or "", [])
        assigned.append(_assigned(reply, found, evidence, rank))
    repeated = len(evidence.interactions) + len(evidence.replies) - len(interactions) - len(replies)
    return Joined(interactions, assigned, repeated, {k for k, n in keys.items() if n > 1}, rank)


def _candidates(reply: Reply, conversation: Sequence[Interaction]) -> list[Interaction]:
    """The candidates in the reply's conversation, best first."""
    if reply.interaction_id is not None:
        return [i for i in conversation if i.id == reply.interaction_id]
    before = [i for i in conversation if reply.at - LATE_S <= i.at < reply.at]
    return sorted(before, key=lambda i: i.order, reverse=True)


def _assigned(
    reply: Reply, candidates: Sequence[Interaction], evidence: Evidence, rank: dict[Key, int]
) -> Assignment:
    window, grace = evidence.window_s, evidence.grace_s
    waits_until = max(reply.at, reply.arrived) + window
    final = reply.committed and waits_until + grace <= evidence.started
    if not candidates:
        return Assignment(reply, (), False, final, False)
    best = candidates[0]
    known_until = max(best.at, best.arrived) + window + LATE_S
    certain = (
        reply.committed
        and best.committed
        and best.conversation_id == reply.conversation_id
        and best.arrived + grace < waits_until
        and reply.arrived + grace < known_until
        # Once its window has closed, only replay has the interaction's features.
        and (reply.arrived + grace < best.at + window or rank[best.key] < evidence.capacity)
    )
    late = reply.at > best.at + window or (reply.committed and best.committed and not certain)
    return Assignment(reply, (best,) if certain else tuple(candidates), certain, certain or final, late)


def _distinct(events: Iterable[E]) -> list[E]:
    """The first event of each id in each conversation."""
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
