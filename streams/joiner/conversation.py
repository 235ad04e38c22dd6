"""The state of one conversation, and its storage format: data structures without the join's rules.

A conversation is stored as one field per interaction and per reply, and a save writes only changed fields:
the cost of an event does not grow with the conversation.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct

LATE_S = 24 * 3600.0
"""The longest time from an interaction to a reply without an interaction id."""

INTERACTION, REPLY = "i:", "r:"
"""Prefixes of the field names of a stored conversation; the id follows."""
PENDING = "p"
"""Name of the field that stores `Conversation.pending`."""
_BODY = b"\n"
"""Separates an open interaction's attributes from its body, in its field."""


class TrackedInteraction(Struct, frozen=True):
    """An interaction of a conversation."""

    id: str
    at: float
    """Unix seconds."""
    occurred_at: str
    """The same, as in the event."""
    model_id: str
    until: float
    """Unix seconds: one window after it occurred or arrived, whichever is later. It is kept for at least
    `LATE_S` longer."""
    body: bytes | None
    """The event's JSON; None when the window has closed: then replay has it."""

    @property
    def order(self) -> tuple[float, str]:
        return (self.at, self.id)


class ReceivedReply(Struct, frozen=True):
    """A reply with its extracted feedback, without its text."""

    id: str
    at: float
    """Unix seconds."""
    interaction_id: str | None
    reading: dict[str, Any]
    """A `Reading`, as JSON values."""
    until: float = 0.0
    """Unix seconds until which it waits for its interaction: one window after it occurred or arrived,
    whichever is later."""
    turns: str = ""
    """The `Turn`s between the interaction's message and the reply that would change the reading: "r"
    (repeated), "s" (switched). Set by `Join.read`."""
    embedding: bytes | None = None
    """(D,) float16 of the text if `turns` is not empty: determines the turn."""

    @property
    def order(self) -> tuple[float, str]:
        return (self.at, self.id)


class Conversation:
    """The interactions and replies of one conversation, with each reply assigned to its interaction."""

    __slots__ = (
        "_assigned",
        "_open",
        "_order",
        "_waiting",
        "changed",
        "interactions",
        "pending",
        "replies",
        "size",
    )

    def __init__(self) -> None:
        self.interactions: dict[str, TrackedInteraction] = {}
        self.replies: dict[str, ReceivedReply] = {}
        self.changed: set[str] = set()
        """Names of the fields that changed since the copy or load."""
        self.pending: dict[str, int] = {}
        """Interaction ids whose experience must be written and published, with its version. Negative: only to
        be written; it was published, and Redis has lost it.

        Stored in one write with the change that caused it, before the experience: if the worker crashes in
        between, the next one writes the experience and assigns each reply to the same interaction."""
        self.size = 500
        """Approximate size in bytes."""
        self._order: list[tuple[float, str]] = []
        """`TrackedInteraction.order` of all interactions, sorted."""
        self._open: dict[str, float] = {}
        """Interaction ids with a body, with the times when they occurred."""
        self._assigned: dict[str, tuple[ReceivedReply, ...]] = {}
        """Interaction ids with replies, with these in order."""
        self._waiting: dict[str, ReceivedReply] = {}
        """Replies without an interaction, by id."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Conversation):
            return NotImplemented
        return self.interactions == other.interactions and self.replies == other.replies

    __hash__ = None  # type: ignore[assignment]  # mutable, and so not hashable

    def copy(self) -> Conversation:
        """A copy that changes independently of this conversation; it shares the immutable values."""
        new = Conversation.__new__(Conversation)
        new.interactions, new.replies = self.interactions.copy(), self.replies.copy()
        new.changed, new.size, new.pending = set(), self.size, self.pending.copy()
        new._order, new._open = self._order.copy(), self._open.copy()
        new._assigned, new._waiting = self._assigned.copy(), self._waiting.copy()
        return new

    @property
    def is_empty(self) -> bool:
        return not self.interactions and not self.replies

    # -- queries -------------------------------------------------------------------------------------------

    def target(self, reply: ReceivedReply) -> TrackedInteraction | None:
        """The interaction that a reply belongs to; None if it is not known (yet)."""
        if reply.interaction_id is not None:
            return self.interactions.get(reply.interaction_id)
        index = bisect_left(self._order, (reply.at,))
        if not index:
            return None
        at, latest = self._order[index - 1]
        return self.interactions[latest] if at >= reply.at - LATE_S else None

    def replies_of(self, interaction: TrackedInteraction) -> tuple[ReceivedReply, ...]:
        """The replies to an interaction, in order."""
        return self._assigned.get(interaction.id, ())

    def waiting(self) -> list[ReceivedReply]:
        """Replies without an interaction, in order."""
        return sorted(self._waiting.values(), key=lambda r: r.order)

    def in_order(self) -> list[TrackedInteraction]:
        """All interactions, in the order in which they occurred."""
        return [self.interactions[interaction_id] for _, interaction_id in self._order]

    def due(self, window_s: float) -> float | None:
        """When `Join.on_timer` must next close an interaction or end a wait, Unix seconds; None: never."""
        times = [min(self._open.values()) + window_s] if self._open else []
        times += [reply.until for reply in self._waiting.values()]
        return min(times, default=None)

    # -- changes -------------------------------------------------------------------------------------------

    def add_interaction(
        self, new: TrackedInteraction
    ) -> tuple[list[ReceivedReply], TrackedInteraction | None]:
        """Adds an interaction and assigns its replies to it.

        Returns:
            Those of the replies that were waiting, and the interaction from which the others moved, if any.
        """
        # A reply without an interaction id belongs to the latest interaction before it: replies can move only
        # from the one directly before the new one.
        index = bisect_left(self._order, new.order)
        before = self.interactions[self._order[index - 1][1]] if index else None
        self.interactions[new.id] = new
        insort(self._order, new.order)
        if new.body is not None:
            self._open[new.id] = new.at
        self.size += 200 + len(new.body or b"")
        self.changed.add(INTERACTION + new.id)
        waited = [reply for reply in self._waiting.values() if self.target(reply) is new]
        for reply in waited:
            del self._waiting[reply.id]
        earlier = () if before is None else self.replies_of(before)
        moved = [reply for reply in earlier if self.target(reply) is new]
        if before is not None and moved:
            self._assign(before, [reply for reply in earlier if reply not in moved])
        if waited or moved:
            self._assign(new, waited + moved)
        return waited, before if moved else None

    def add_reply(self, reply: ReceivedReply) -> None:
        """Adds a reply: assigns it to its interaction, or keeps it waiting."""
        self.replies[reply.id] = reply
        self.changed.add(REPLY + reply.id)
        self.size += 600
        target = self.target(reply)
        if target is None:
            self._waiting[reply.id] = reply
        else:
            self._assign(target, [*self.replies_of(target), reply])

    def set_pending(self, interaction: TrackedInteraction) -> None:
        """Marks an interaction's experience as to be written; `stamp` sets its version."""
        self.pending[interaction.id] = 0

    def stamp(self, version: int, *, is_published: bool = False) -> None:
        """Sets the version of all experiences that became pending since the copy."""
        stamp = -version if is_published else version
        self.pending = {i: known or stamp for i, known in self.pending.items()}

    def close(self, interaction: TrackedInteraction) -> None:
        """Removes an interaction's body."""
        self.interactions[interaction.id] = msgspec.structs.replace(interaction, body=None)
        self.size -= len(interaction.body or b"")
        del self._open[interaction.id]
        self.changed.add(INTERACTION + interaction.id)

    def remove_waiting(self, reply: ReceivedReply) -> None:
        """Removes a waiting reply."""
        del self._waiting[reply.id]
        self._remove(reply)

    def remove_assigned(self, interaction: TrackedInteraction, reply: ReceivedReply) -> None:
        """Removes a reply of an interaction."""
        self._assign(interaction, [r for r in self.replies_of(interaction) if r is not reply])
        self._remove(reply)

    def remove_interaction(self, interaction: TrackedInteraction) -> None:
        """Removes a closed interaction and its replies."""
        for reply in self._assigned.pop(interaction.id, ()):
            self._remove(reply)
        del self.interactions[interaction.id]
        del self._order[bisect_left(self._order, interaction.order)]
        self.size -= 200
        self.changed.add(INTERACTION + interaction.id)

    def forget(self, until: float) -> None:
        """Removes all interactions and replies up to this time, Unix seconds, also those that are pending."""
        for interaction in self.in_order():
            for reply in self.replies_of(interaction):
                if reply.at <= until:
                    self.remove_assigned(interaction, reply)
            if interaction.at <= until:
                if interaction.body is not None:
                    self.close(interaction)
                self.pending.pop(interaction.id, None)
                self.remove_interaction(interaction)
        for reply in self.waiting():
            if reply.at <= until:
                self.remove_waiting(reply)

    def forget_models(self, models: Mapping[str, float], window_s: float) -> None:
        """Removes the interactions of forgotten models that arrived before, with their replies.

        Args:
            models: model → Unix seconds when it was forgotten.
        """
        for interaction in self.in_order():
            if interaction.until - window_s < models.get(interaction.model_id, 0.0):
                if interaction.body is not None:
                    self.close(interaction)
                self.pending.pop(interaction.id, None)
                self.remove_interaction(interaction)

    def _assign(self, interaction: TrackedInteraction, replies: list[ReceivedReply]) -> None:
        if replies:
            self._assigned[interaction.id] = tuple(sorted(replies, key=lambda r: r.order))
        else:
            self._assigned.pop(interaction.id, None)

    def _remove(self, reply: ReceivedReply) -> None:
        del self.replies[reply.id]
        self.size -= 600
        self.changed.add(REPLY + reply.id)

    # -- storage -------------------------------------------------------------------------------------------

    def fields(self, *, whole: bool = False) -> tuple[dict[str, bytes], list[str]]:
        """The stored fields to set, and the names of those to delete.

        Args:
            whole: all fields, for a conversation that is not stored yet; else those that changed since the
                copy or load.
        """
        if whole:
            names = [INTERACTION + i for i in self.interactions] + [REPLY + r for r in self.replies]
            fields = {name: self._field(name) for name in names}
        else:
            fields = {name: self._field(name) for name in self.changed}
        fields[PENDING] = msgspec.json.encode(self.pending) if self.pending else None
        return (
            {name: value for name, value in fields.items() if value is not None},
            [name for name, value in fields.items() if value is None],
        )

    def _field(self, name: str) -> bytes | None:
        kind, id_ = name[:2], name[2:]
        if kind == REPLY:
            reply = self.replies.get(id_)
            return None if reply is None else msgspec.json.encode(msgspec.structs.astuple(reply)[1:])
        it = self.interactions.get(id_)
        if it is None:
            return None
        head = msgspec.json.encode((it.at, it.occurred_at, it.model_id, it.until))
        return head if it.body is None else head + _BODY + it.body

    @classmethod
    def load(cls, fields: Mapping[bytes, bytes]) -> Conversation:
        """Decodes a conversation from its stored fields; ignores fields with other names."""
        new = cls()
        interactions, replies = [], []
        for key, value in fields.items():
            name = key.decode()
            if name.startswith(INTERACTION):
                head, _, body = value.partition(_BODY)
                interactions.append(
                    TrackedInteraction(name[2:], *_interaction.decode(head), body if _ else None)
                )
            elif name.startswith(REPLY):
                replies.append(ReceivedReply(name[2:], *_reply.decode(value)))
        for interaction in sorted(interactions, key=lambda i: i.order):
            new.add_interaction(interaction)
        for reply in sorted(replies, key=lambda r: r.order):
            new.add_reply(reply)
        new.changed.clear()
        if pending := fields.get(PENDING.encode()):
            new.pending = _pending.decode(pending)
        return new


_pending = msgspec.json.Decoder(dict[str, int])
_interaction = msgspec.json.Decoder(tuple[float, str, str, float])
_reply = msgspec.json.Decoder(tuple[float, str | None, dict[str, Any], float, str, bytes | None])
