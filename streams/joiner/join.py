"""The join of interactions and replies, as plain state: no Kafka, no Redis, no clock.

    join = Join(window_s=1800.0, aggregation="last", collector=FeedbackCollector())
    conversation = Conversation()
    changes = Changes()
    join.on_interaction(conversation, decode_interaction(value, store_text=False), arrived, changes)
    [received] = join.read([reply])
    join.on_reply(conversation, received, arrived, changes)
    join.on_timer(conversation, now, changes)
    conversation.pending     # interactions whose experience is now made of other replies
    changes.closed           # interactions that nobody answered
    changes.orphans          # replies without an interaction
    changes.counts           # what happened, for the metrics

What an experience becomes is a function of the set of events: each reply belongs to the interaction it
names, else to its conversation's latest interaction before it, and an interaction's experience is made of
its replies in the order of (`occurred_at`, `reply_id`). A reply that had gone to the wrong interaction is
moved, and both experiences are pending.

That holds where an interaction and its replies arrive within `window_s` of each other, however long ago they
occurred. What comes later still is joined to what the state or replay holds by then, or counted.

`now` is seconds on the axis of event time: everything that was sent before it has been read. It and
`arrived`, when an event was sent, come from outside. They decide how long things are kept and when silence
closes an interaction, never what an experience becomes. A `now` that goes back changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import orjson
from msgspec.structs import replace

from cortex_core.feedback_collector import (
    Aggregation,
    Feedback,
    FeedbackCollector,
    TextReading,
    Turn,
    aggregate_rewards,
    turn_between,
)
from streams.events import SCHEMA_VERSION
from streams.joiner.conversation import LATE_S, Conversation, ReceivedReply, TrackedInteraction
from streams.joiner.decode import Interaction, Reply, StoredExperience, message_of, moment

MAX_KEPT = 256
"""Interactions, and replies that wait, kept for one conversation: beyond it the earliest are let go. Also
the replies that one interaction takes: what comes after them is counted as excess."""


_REPEATS, _SWITCHES = "r", "s"
"""In `ReceivedReply.turns`: what the reply may turn out to do."""


@dataclass(slots=True)
class Changes:
    """What calls on a conversation add up to, beyond what stands in the conversation itself."""

    closed: list[TrackedInteraction] = field(default_factory=list)
    """Interactions that nobody answered within the window: `no_reply`, unless replay has them already."""
    orphans: list[ReceivedReply] = field(default_factory=list)
    """Replies whose wait is over and whose interaction the state does not have; replay may have it still."""
    counts: Counter[str] = field(default_factory=Counter)
    """interactions, replies, duplicates, joined, amended, late, moved, waiting, excess, no_reply"""


class Join:
    """The rules. Holds no state of its own; one object may serve every conversation."""

    def __init__(
        self,
        *,
        window_s: float,
        aggregation: Aggregation,
        collector: FeedbackCollector,
        store_text: bool = False,
        max_kept: int = MAX_KEPT,
    ) -> None:
        self.window_s = window_s
        self.aggregation: Aggregation = aggregation
        self.collector = collector
        self.store_text = store_text
        self.max_kept = max_kept

    # -- events --------------------------------------------------------------------------------------------

    def on_interaction(
        self, conversation: Conversation, event: Interaction, arrived: float, changes: Changes
    ) -> None:
        """Adds an interaction; takes the replies that are its own, also from one that had them wrongly."""
        changes.counts["interactions"] += 1
        if event.id in conversation.interactions:
            changes.counts["duplicates"] += 1
            return
        until = max(event.at, arrived) + self.window_s
        new = TrackedInteraction(event.id, event.at, event.occurred_at, event.model_id, until, event.body)
        waited, loser = conversation.add_interaction(new)
        if loser is not None:
            changes.counts["moved"] += 1
            conversation.set_pending(loser)
        if conversation.replies_of(new):
            changes.counts["joined"] += waited
            conversation.set_pending(new)
        excess = len(conversation.interactions) - self.max_kept
        if excess > 0:
            for earliest in conversation.in_order()[:excess]:
                if earliest.id not in conversation.pending:
                    self._forget(conversation, earliest, changes)

    def on_reply(
        self, conversation: Conversation, reply: ReceivedReply, arrived: float, changes: Changes
    ) -> None:
        """Adds a reply: completes or amends its interaction's experience, or lets it wait."""
        changes.counts["replies"] += 1
        if reply.id in conversation.replies:
            changes.counts["duplicates"] += 1
            return
        target = conversation.target(reply)
        if target is not None and len(conversation.replies_of(target)) >= self.max_kept:
            changes.counts["excess"] += 1
            return
        conversation.add_reply(replace(reply, until=max(reply.at, arrived) + self.window_s))
        if target is None:
            changes.counts["waiting"] += 1
            waiting = conversation.waiting()
            for earliest in waiting[: max(0, len(waiting) - self.max_kept)]:
                self._orphan(conversation, earliest, changes)
            return
        replies = conversation.replies_of(target)
        changes.counts["joined"] += 1
        changes.counts["amended"] += len(replies) > 1
        changes.counts["late"] += reply.at > target.at + self.window_s
        conversation.set_pending(target)

    def on_timer(self, conversation: Conversation, now: float, changes: Changes) -> None:
        """Closes what nobody answered in time, ends waits, and forgets what no event can change any more.

        What is pending stays until its experience is written: the conversation has all that it is made of.
        """
        for interaction in conversation.in_order():
            if interaction.id in conversation.pending:
                continue
            if interaction.until + LATE_S <= now:
                self._forget(conversation, interaction, changes)
            elif interaction.body is not None and interaction.at + self.window_s <= now:
                self._close(conversation, interaction, changes)
        for reply in conversation.waiting():
            if reply.until <= now:
                self._orphan(conversation, reply, changes)

    def _close(self, conversation: Conversation, interaction: TrackedInteraction, changes: Changes) -> None:
        if not conversation.replies_of(interaction):
            changes.counts["no_reply"] += 1
            changes.closed.append(interaction)
        conversation.close(interaction)

    def _orphan(self, conversation: Conversation, reply: ReceivedReply, changes: Changes) -> None:
        conversation.forget_reply(reply)
        changes.orphans.append(reply)

    def _forget(self, conversation: Conversation, interaction: TrackedInteraction, changes: Changes) -> None:
        if interaction.body is not None:
            self._close(conversation, interaction, changes)
        conversation.forget_interaction(interaction)

    # -- readings and experiences --------------------------------------------------------------------------

    def read(self, replies: Sequence[Reply]) -> list[ReceivedReply]:
        """Reads each reply once, for good: what it says is a function of the reply alone.

        Whether it switched the topic, or asks the same again, depends on the interaction as well, which may
        not be known yet: where that would make a difference the embedding is kept, too.
        """
        texts = [reply for reply in replies if reply.kind == "text"]
        read = iter(self.collector.read([r.text for r in texts], [r.embedding for r in texts]))
        return [
            self._text(reply, next(read)) if reply.kind == "text" else self._rating(reply)
            for reply in replies
        ]

    def _text(self, reply: Reply, read: TextReading) -> ReceivedReply:
        turns = ""
        if reply.embedding is not None and not read.explicit:
            turns = _REPEATS * read.can_repeat + _SWITCHES * read.can_switch
        return ReceivedReply(
            reply.reply_id,
            reply.occurred_at.timestamp(),
            reply.interaction_id,
            self._reading(reply.reply_id, _iso(reply.occurred_at), read.feedback()),
            turns=turns,
            embedding=reply.embedding.tobytes() if turns and reply.embedding is not None else None,
        )

    def _rating(self, reply: Reply) -> ReceivedReply:
        assert reply.rating is not None, "decoding requires it"
        feedback = self.collector.from_rating(reply.rating)
        reading = self._reading(reply.reply_id, _iso(reply.occurred_at), feedback, reply.kind)
        return ReceivedReply(reply.reply_id, reply.occurred_at.timestamp(), reply.interaction_id, reading)

    def _reading(
        self, reply_id: str, occurred_at: str, feedback: Feedback, kind: str = "text"
    ) -> dict[str, Any]:
        return {
            "reply_id": reply_id,
            "kind": kind,
            "occurred_at": occurred_at,
            "reward": feedback.reward,
            "confidence": feedback.confidence,
            "signals": [
                {
                    "type": s.type.value,
                    "strength": s.strength,
                    "reward": s.reward,
                    "evidence": s.evidence if self.store_text else "",
                }
                for s in feedback.signals
            ],
            "extractor": feedback.extractor,
        }

    def experience(
        self, interaction: TrackedInteraction, body: bytes, replies: Iterable[ReceivedReply]
    ) -> bytes:
        """JSON of the `ExperienceEvent` that an interaction and its replies, in order, make.

        Args:
            body: the interaction's, also where the conversation has let go of it.
        """
        return self._compose(interaction.occurred_at, body, self._settled(body, replies))

    def amended(self, stored: StoredExperience, replies: Iterable[ReceivedReply]) -> bytes | None:
        """A stored experience with more replies; None when it has them all already."""
        readings = {(moment(r["occurred_at"]), r["reply_id"]): r for r in stored.readings}
        known = {reply_id for _, reply_id in readings}
        new = [r for r in replies if r.id not in known]
        if not new:
            return None
        body = bytes(stored.interaction)
        readings |= zip((r.order for r in new), self._settled(body, new), strict=True)
        in_order = [readings[order] for order in sorted(readings)]
        return self._compose(stored.occurred_at, body, in_order)

    def _settled(self, body: bytes, replies: Iterable[ReceivedReply]) -> list[dict[str, Any]]:
        """Each reply's reading, now that it is known what the interaction was about."""
        message = None
        readings = []
        for reply in replies:
            reading = reply.reading
            if reply.embedding is not None:
                if message is None:
                    message = message_of(body)
                embedding = np.frombuffer(reply.embedding, dtype="<f2").astype(np.float32)
                turn = turn_between(message, embedding)
                if turn is not Turn.CONTINUED:
                    read = TextReading(
                        (),
                        reading["confidence"],
                        reading["extractor"],
                        can_repeat=_REPEATS in reply.turns,
                        can_switch=_SWITCHES in reply.turns,
                    )
                    reading = self._reading(reply.id, reading["occurred_at"], read.feedback(turn))
            readings.append(reading)
        return readings

    def _compose(self, occurred_at: str, body: bytes, readings: list[dict[str, Any]]) -> bytes:
        """JSON of the `ExperienceEvent` that an interaction and settled readings, in order, make."""
        chosen = _decisive(readings)
        rewards = [r["reward"] for r in chosen]
        reward = aggregate_rewards(rewards, self.aggregation) if chosen else 0.0
        if self.aggregation in ("first", "last", "min", "max") and chosen:
            index = {
                "first": 0,
                "last": -1,
                "min": rewards.index(min(rewards)),
                "max": rewards.index(max(rewards)),
            }[self.aggregation]
            chosen = [chosen[index]]
        head = {
            "schema_version": SCHEMA_VERSION,
            "occurred_at": occurred_at,
            "revision": len(readings),
            "outcome": "reply" if readings else "no_reply",
            "reward": reward,
            # Silence says nothing: it is kept, and weighs nothing.
            "reward_confidence": sum(r["confidence"] for r in chosen) / len(chosen) if chosen else 0.0,
            "signals": [s for r in chosen for s in r["signals"]],
            "readings": readings,
            "reply_ids": [r["reply_id"] for r in readings],
            "replied_at": readings[-1]["occurred_at"] if readings else None,
            "extractor": "+".join(sorted({r["extractor"] for r in readings})),
            "aggregation": self.aggregation,
        }
        # The interaction's own bytes go in as they are: it was checked when it came.
        return orjson.dumps(head)[:-1] + b',"interaction":' + body + b"}"


def _decisive(readings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of an interaction's readings, in order, that are aggregated to its reward.

    A rating, or an outcome, decides, and after the last one each text from the first that explicitly says the
    opposite. Without a rating the explicit texts decide, and without one of these all texts.
    """
    rated = [n for n, r in enumerate(readings) if r.get("kind", "text") != "text"]
    if not rated:
        return [r for r in readings if _is_explicit(r)] or readings
    after = [r for r in readings[rated[-1] + 1 :] if _is_explicit(r)]
    opposite = (n for n, r in enumerate(after) if _sign(r) != _sign(readings[rated[-1]]))
    return [readings[n] for n in rated] + after[next(opposite, len(after)) :]


def _is_explicit(reading: dict[str, Any]) -> bool:
    return any(signal["type"] not in ("engagement", "disengagement") for signal in reading["signals"])


def _sign(reading: dict[str, Any]) -> int:
    return (reading["reward"] > 0.0) - (reading["reward"] < 0.0)


def _iso(moment: datetime) -> str:
    # As pydantic writes it, so that a reading is the same bytes whether fresh or read back from replay.
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
