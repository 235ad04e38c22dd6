"""What the join knows of one conversation, and how that is stored: plain values and no rules."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

LATE_S = 24 * 3600.0
"""A reply that names no interaction may lie this long after the one it is about."""

BODY = b"b:"
"""Begins the fields of a stored conversation that hold interactions; the rest of the name is the id."""
META = b"s"
"""The field with everything else."""


@dataclass(frozen=True, slots=True)
class Known:
    """An interaction of a conversation."""

    id: str
    at: float
    """Unix seconds."""
    model_id: str
    body: bytes | None
    """The event's JSON; None once the window has closed: replay has it from then on."""
    until: float
    """A window after it occurred or, if later, arrived; it is not forgotten before `LATE_S` after this."""

    @property
    def order(self) -> tuple[float, str]:
        return (self.at, self.id)


@dataclass(frozen=True, slots=True)
class Heard:
    """A reply as it was read; its text is gone."""

    id: str
    at: float
    names: str | None
    """The interaction it names."""
    reading: dict[str, Any]
    """A `Reading`, as JSON values."""
    until: float = 0.0
    """How long it waits for its interaction: a window from when it occurred or, if later, arrived."""
    otherwise: dict[str, dict[str, Any]] | None = None
    """The readings that hold instead where the interaction was about another topic ("switched"), or asked the
    same ("again"); None: what it was about makes no difference."""
    embedding: bytes | None = None
    """float16 of the text, where `otherwise` is given: what tells which of them holds."""

    @property
    def order(self) -> tuple[float, str]:
        return (self.at, self.id)


@dataclass(slots=True)
class Conversation:
    """What the join knows of one conversation. Values are immutable, so that a copy is cheap."""

    interactions: dict[str, Known] = field(default_factory=dict)
    replies: dict[str, Heard] = field(default_factory=dict)

    def copy(self) -> Conversation:
        return Conversation(dict(self.interactions), dict(self.replies))

    def target(self, reply: Heard) -> Known | None:
        """The interaction that a reply is about; None while it waits."""
        if reply.names is not None:
            return self.interactions.get(reply.names)
        before = [i for i in self.interactions.values() if reply.at - LATE_S <= i.at < reply.at]
        return max(before, key=lambda i: i.order, default=None)

    def replies_of(self, interaction: Known) -> tuple[Heard, ...]:
        """The replies about an interaction, in order."""
        mine = [r for r in self.replies.values() if self.target(r) is interaction]
        return tuple(sorted(mine, key=lambda r: r.order))

    def waiting(self) -> list[Heard]:
        """Replies without an interaction, in order."""
        return sorted(
            (r for r in self.replies.values() if self.target(r) is None),
            key=lambda r: r.order,
        )

    def due(self, window_s: float) -> float | None:
        """When `on_timer` has something to do; None: only forgetting is left."""
        times = [i.at + window_s for i in self.interactions.values() if i.body is not None]
        times += [r.until for r in self.waiting()]
        return min(times, default=None)

    @property
    def size(self) -> int:
        """About how many bytes it holds."""
        bodies = sum(len(i.body) for i in self.interactions.values() if i.body is not None)
        return 500 + bodies + 200 * len(self.interactions) + 600 * len(self.replies)

    def dump(self, before: Conversation) -> tuple[dict[bytes, bytes], list[bytes]]:
        """Fields to set and fields to delete that turn a stored `before` into this."""
        meta = {
            "i": [[i.id, i.at, i.model_id, i.body is not None, i.until] for i in self.interactions.values()],
            "r": [[r.id, r.at, r.names, r.reading, r.until, *_turns(r)] for r in self.replies.values()],
        }
        fields = {META: orjson.dumps(meta)}
        now = {i.id for i in self.interactions.values() if i.body is not None}
        stored = {i.id for i in before.interactions.values() if i.body is not None}
        for interaction in self.interactions.values():
            if interaction.body is not None and interaction.id not in stored:
                fields[BODY + interaction.id.encode()] = interaction.body
        return fields, [BODY + entry_id.encode() for entry_id in sorted(stored - now)]

    @classmethod
    def load(cls, fields: Mapping[bytes, bytes]) -> Conversation:
        """The inverse of `dump`; an empty mapping is an empty conversation."""
        if META not in fields:
            return cls()
        meta = orjson.loads(fields[META])
        known = [
            Known(entry_id, at, model_id, fields.get(BODY + entry_id.encode()) if is_open else None, until)
            for entry_id, at, model_id, is_open, until in meta["i"]
        ]
        heard = [
            Heard(
                reply_id, at, names, reading, until, *rest[:1], *(base64.b64decode(text) for text in rest[1:])
            )
            for reply_id, at, names, reading, until, *rest in meta["r"]
        ]
        return cls({i.id: i for i in known}, {r.id: r for r in heard})


def _turns(reply: Heard) -> list[Any]:
    return [] if reply.embedding is None else [reply.otherwise, base64.b64encode(reply.embedding).decode()]
