"""What the join knows of one conversation, and how that is stored: plain values and no rules.

A conversation is stored as fields, one for each interaction and each reply, and a change writes the fields
that it changed: what an event costs does not grow with the conversation.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct

LATE_S = 24 * 3600.0
"""A reply that names no interaction may lie this long after the one it is about."""

INTERACTION, REPLY = "i:", "r:"
"""Begin the names of the fields of a stored conversation; the rest of a name is the id."""
PENDING = "p"
"""Name of the field with `Conversation.pending`."""
_BODY = b"\n"
"""Before the body of an open interaction, in its field."""


class TrackedInteraction(Struct, frozen=True):
    """An interaction of a conversation."""

    id: str
    at: float
    """Unix seconds."""
    occurred_at: str
    """The same, as the event has it."""
    model_id: str
    until: float
    """A window after it occurred or, if later, arrived; it is not forgotten before `LATE_S` after this."""
    body: bytes | None
    """The event's JSON; None once the window has closed, for replay has it by then."""

    @property
    def order(self) -> tuple[float, str]:
        return (self.at, self.id)


class ReceivedReply(Struct, frozen=True):
    """A reply as it was read; its text is gone."""

    id: str
    at: float
    names: str | None
    """The interaction it names."""
    reading: dict[str, Any]
    """A `Reading`, as JSON values."""
    until: float = 0.0
    """How long it waits for its interaction: a window from when it occurred or, if later, arrived."""
    turns: str = ""
    """Which `Turn`s from the interaction's message to the reply would change the reading ("r": repeated, "s":
    switched); the join's."""
    embedding: bytes | None = None
    """float16 of the text, where any would: what tells which of them it is."""

    @property
    def order(self) -> tuple[float, str]:
        return (self.at, self.id)


class Conversation:
    """What the join knows of one conversation, with each reply at the interaction it is about."""

    __slots__ = (
        "_answers",
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
        """Names of the fields that changed since it was copied or loaded."""
        self.pending: dict[str, int] = {}
        """Interactions whose experience is still to be written and published, with the version that it gets.

        It is stored in one write with the change that caused it, and before the experience is: a worker that
        dies in between leaves it to the next one, which gives each reply to the same interaction."""
        self.size = 500
        """About how many bytes it holds."""
        self._order: list[tuple[float, str]] = []
        """Of all interactions."""
        self._open: dict[str, float] = {}
        """When each interaction with a body occurred."""
        self._answers: dict[str, tuple[ReceivedReply, ...]] = {}
        """The replies about each interaction that has any, in order."""
        self._waiting: dict[str, ReceivedReply] = {}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Conversation):
            return NotImplemented
        return self.interactions == other.interactions and self.replies == other.replies

    __hash__ = None  # type: ignore[assignment]  # as Python has it

    def copy(self) -> Conversation:
        """One that may change without this one; its values are immutable and shared."""
        new = Conversation.__new__(Conversation)
        new.interactions, new.replies = self.interactions.copy(), self.replies.copy()
        new.changed, new.size, new.pending = set(), self.size, self.pending.copy()
        new._order, new._open = self._order.copy(), self._open.copy()
        new._answers, new._waiting = self._answers.copy(), self._waiting.copy()
        return new

    @property
    def is_empty(self) -> bool:
        return not self.interactions and not self.replies

    # -- what belongs together -----------------------------------------------------------------------------

    def target(self, reply: ReceivedReply) -> TrackedInteraction | None:
        """The interaction that a reply is about; None while it waits."""
        if reply.names is not None:
            return self.interactions.get(reply.names)
        place = bisect_left(self._order, (reply.at,))
        if not place:
            return None
        at, latest = self._order[place - 1]
        return self.interactions[latest] if at >= reply.at - LATE_S else None

    def replies_of(self, interaction: TrackedInteraction) -> tuple[ReceivedReply, ...]:
        """The replies about an interaction, in order."""
        return self._answers.get(interaction.id, ())

    def waiting(self) -> list[ReceivedReply]:
        """Replies without an interaction, in order."""
        return sorted(self._waiting.values(), key=lambda r: r.order)

    def in_order(self) -> list[TrackedInteraction]:
        """All interactions, the one that occurred first at the head."""
        return [self.interactions[interaction_id] for _, interaction_id in self._order]

    def due(self, window_s: float) -> float | None:
        """When `Join.on_timer` has something to do; None: only forgetting is left."""
        times = [min(self._open.values()) + window_s] if self._open else []
        times += [reply.until for reply in self._waiting.values()]
        return min(times, default=None)

    # -- changes -------------------------------------------------------------------------------------------

    def add_interaction(self, new: TrackedInteraction) -> tuple[int, TrackedInteraction | None]:
        """Adds an interaction and gives it the replies that are about it.

        Returns:
            How many of them had waited, and the interaction that had the others.
        """
        # A reply that names none is about the latest before it: only the one just before can lose any.
        place = bisect_left(self._order, new.order)
        before = self.interactions[self._order[place - 1][1]] if place else None
        self.interactions[new.id] = new
        insort(self._order, new.order)
        self._note(new)
        waited = [reply for reply in self._waiting.values() if self.target(reply) is new]
        for reply in waited:
            del self._waiting[reply.id]
        had = () if before is None else self.replies_of(before)
        moved = [reply for reply in had if self.target(reply) is new]
        if before is not None and moved:
            self._set_answers(before, [reply for reply in had if reply not in moved])
        if waited or moved:
            self._set_answers(new, waited + moved)
        return len(waited), before if moved else None

    def add_reply(self, reply: ReceivedReply) -> None:
        """Adds a reply, to the interaction it is about or to those that wait."""
        self.replies[reply.id] = reply
        self.changed.add(REPLY + reply.id)
        self.size += 600
        target = self.target(reply)
        if target is None:
            self._waiting[reply.id] = reply
        else:
            self._set_answers(target, [*self.replies_of(target), reply])

    def set_pending(self, interaction: TrackedInteraction) -> None:
        """The interaction's experience must be written anew; `stamp` gives it its version."""
        self.pending[interaction.id] = 0

    def stamp(self, version: int) -> None:
        """Gives this version to all that became pending since the conversation was copied."""
        self.pending = {i: known or version for i, known in self.pending.items()}

    def close(self, interaction: TrackedInteraction) -> None:
        """Lets go of an interaction's body."""
        self.interactions[interaction.id] = msgspec.structs.replace(interaction, body=None)
        self.size -= len(interaction.body or b"")
        del self._open[interaction.id]
        self.changed.add(INTERACTION + interaction.id)

    def forget_reply(self, reply: ReceivedReply) -> None:
        """Lets go of a reply that waits."""
        del self._waiting[reply.id]
        self._drop(reply)

    def forget_interaction(self, interaction: TrackedInteraction) -> None:
        """Lets go of a closed interaction and of the replies about it."""
        for reply in self._answers.pop(interaction.id, ()):
            self._drop(reply)
        del self.interactions[interaction.id]
        del self._order[bisect_left(self._order, interaction.order)]
        self.size -= 200
        self.changed.add(INTERACTION + interaction.id)

    def _note(self, new: TrackedInteraction) -> None:
        if new.body is not None:
            self._open[new.id] = new.at
        self.size += 200 + len(new.body or b"")
        self.changed.add(INTERACTION + new.id)

    def _set_answers(self, interaction: TrackedInteraction, replies: list[ReceivedReply]) -> None:
        if replies:
            self._answers[interaction.id] = tuple(sorted(replies, key=lambda r: r.order))
        else:
            self._answers.pop(interaction.id, None)

    def _drop(self, reply: ReceivedReply) -> None:
        del self.replies[reply.id]
        self.size -= 600
        self.changed.add(REPLY + reply.id)

    # -- stored --------------------------------------------------------------------------------------------

    def fields(self, *, whole: bool = False) -> tuple[dict[str, bytes], list[str]]:
        """Fields to set, and fields to delete, that bring what is stored up to date.

        Args:
            whole: nothing is stored; else what was copied or loaded is.
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
        """The conversation that is stored as these fields; those of other names are left alone."""
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
