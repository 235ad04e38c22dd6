"""The join of interactions and replies: pure functions of a conversation's state; no Kafka, Redis or clock.

    join = Join(window_s=1800.0, aggregation="last", collector=FeedbackCollector())
    conversation = Conversation()
    changes = Changes()
    join.on_interaction(conversation, decode_interaction(value, store_text=False), arrived, changes)
    [received] = join.read([reply])
    join.on_reply(conversation, received, arrived, changes)
    join.on_timer(conversation, now, changes)
    conversation.pending     # interactions whose experience must be written
    changes.closed           # interactions without a reply
    changes.orphans          # replies without an interaction
    changes.counts           # event counts, for the metrics

An experience is a function of the set of events, not of their order. A reply belongs to the interaction whose
id it has; without an id, to its conversation's latest interaction before it. An interaction's experience
contains its replies in the order of (`occurred_at`, `reply_id`). If an interaction arrives after its reply
was assigned to an earlier one, the reply moves, and both experiences are pending.

This holds if an interaction and its replies arrive within `window_s` of each other, however long ago they
occurred. A later reply amends the experience in the state or in replay, or is counted as an orphan.

`now` is event time in Unix seconds: all events sent before it have been read. `arrived` is when an event was
sent. The caller passes both. They decide how long state is kept and when an interaction without a reply is
closed, never the content of an experience. A `now` that goes back changes nothing.
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
    IMPLICIT,
    Aggregation,
    Feedback,
    FeedbackCollector,
    TextReading,
    Turn,
    aggregate,
    turn_between,
)
from streams.events import SCHEMA_VERSION
from streams.joiner.conversation import LATE_S, Conversation, ReceivedReply, TrackedInteraction
from streams.joiner.decode import Interaction, Reply, StoredExperience, message_of, moment

MAX_KEPT = 256
"""The most interactions, and the most waiting replies, kept per conversation, and the most replies of one
interaction: the earliest are removed. Removed replies of an interaction are counted as excess."""


_REPEATS, _SWITCHES = "r", "s"
"""Flags of `ReceivedReply.turns`: the reply may repeat the request, or switch the topic."""


@dataclass(slots=True)
class Changes:
    """Results of calls of `Join` that are not part of the conversation's state."""

    closed: list[TrackedInteraction] = field(default_factory=list)
    """Interactions without a reply within the window: `no_reply`, unless replay has an experience already."""
    orphans: list[ReceivedReply] = field(default_factory=list)
    """Replies that waited for a window and whose interaction is not in the state; replay may have it."""
    counts: Counter[str] = field(default_factory=Counter)
    """interactions, replies, repeated, joined, amended, late, moved, waited, excess, expired: as in
    `streams.joiner.metrics.OUTCOME_NAMES`"""


class Join:
    """The rules of the join. Stateless: one object serves all conversations."""

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
        """Adds an interaction; assigns its replies: waiting ones, and those of the interaction before it."""
        changes.counts["interactions"] += 1
        if event.id in conversation.interactions:
            changes.counts["repeated"] += 1
            return
        until = max(event.at, arrived) + self.window_s
        new = TrackedInteraction(event.id, event.at, event.occurred_at, event.model_id, until, event.body)
        waited, moved_from = conversation.add_interaction(new)
        replies = conversation.replies_of(new)
        if moved_from is not None:
            changes.counts["moved"] += len(replies) - len(waited)
            # Closed with the reply, it was not counted then.
            changes.counts["expired"] += moved_from.body is None and not conversation.replies_of(moved_from)
            conversation.set_pending(moved_from)
        if replies:
            changes.counts["joined"] += len(waited)
            changes.counts["late"] += sum(reply.at > new.at + self.window_s for reply in waited)
            # All but the first of a new experience. Those that moved were counted where they were before.
            changes.counts["amended"] += len(waited) - (len(replies) == len(waited))
            conversation.set_pending(new)
        excess = len(conversation.interactions) - self.max_kept
        if excess > 0:
            for earliest in conversation.in_order()[:excess]:
                if earliest.id not in conversation.pending:
                    self._remove(conversation, earliest, changes)

    def on_reply(
        self, conversation: Conversation, reply: ReceivedReply, arrived: float, changes: Changes
    ) -> None:
        """Adds a reply: completes or amends its interaction's experience, or keeps the reply waiting."""
        changes.counts["replies"] += 1
        if reply.id in conversation.replies:
            changes.counts["repeated"] += 1
            return
        target = conversation.target(reply)
        # The latest replies are kept, so that which ones does not depend on their order of arrival.
        kept = () if target is None else conversation.replies_of(target)
        if target is not None and len(kept) >= self.max_kept:
            changes.counts["excess"] += 1
            if reply.order < kept[0].order:
                return
            conversation.remove_assigned(target, kept[0])
        conversation.add_reply(replace(reply, until=max(reply.at, arrived) + self.window_s))
        if target is None:
            changes.counts["waited"] += 1
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
        """Closes interactions whose window has passed, ends waits, and removes expired interactions.

        Skips pending interactions: their experience is composed from the conversation's state.
        """
        for interaction in conversation.in_order():
            if interaction.id in conversation.pending:
                continue
            if interaction.until + LATE_S <= now:
                self._remove(conversation, interaction, changes)
            elif interaction.body is not None and interaction.at + self.window_s <= now:
                self._close(conversation, interaction, changes)
        for reply in conversation.waiting():
            if reply.until <= now:
                self._orphan(conversation, reply, changes)

    def _close(self, conversation: Conversation, interaction: TrackedInteraction, changes: Changes) -> None:
        if not conversation.replies_of(interaction):
            changes.counts["expired"] += 1
            changes.closed.append(interaction)
        conversation.close(interaction)

    def _orphan(self, conversation: Conversation, reply: ReceivedReply, changes: Changes) -> None:
        conversation.remove_waiting(reply)
        changes.orphans.append(reply)

    def _remove(self, conversation: Conversation, interaction: TrackedInteraction, changes: Changes) -> None:
        if interaction.body is not None:
            self._close(conversation, interaction, changes)
        conversation.remove_interaction(interaction)

    # -- readings and experiences --------------------------------------------------------------------------

    def read(self, replies: Sequence[Reply]) -> list[ReceivedReply]:
        """Extracts the feedback of replies, once for each: a function of the reply alone.

        Whether a reply repeats the request or switches the topic depends on its interaction too, which may
        not have arrived. If that can change the feedback, the result keeps the embedding for `experience`.
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
        """JSON of the `ExperienceEvent` of an interaction and its replies.

        Args:
            body: the interaction's JSON; from replay if the interaction is closed.
            replies: in order.
        """
        return self._compose(interaction.occurred_at, body, self._final_readings(body, replies))

    def amended(self, stored: StoredExperience, replies: Iterable[ReceivedReply]) -> bytes | None:
        """JSON of a stored experience with further replies; None if it has all of them already."""
        readings = {(moment(r["occurred_at"]), r["reply_id"]): r for r in stored.readings}
        known = {reply_id for _, reply_id in readings}
        new = [r for r in replies if r.id not in known]
        if not new:
            return None
        body = bytes(stored.interaction)
        readings |= zip((r.order for r in new), self._final_readings(body, new), strict=True)
        in_order = [readings[order] for order in sorted(readings)]
        return self._compose(stored.occurred_at, body, in_order)

    def _final_readings(self, body: bytes, replies: Iterable[ReceivedReply]) -> list[dict[str, Any]]:
        """The replies' readings, given the interaction: applies repeated requests and switched topics."""
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
        """JSON of the `ExperienceEvent` of an interaction and its final readings, in order."""
        decisive = _decisive(readings)
        reward, chosen = 0.0, decisive
        if decisive:
            reward, indices = aggregate([r["reward"] for r in decisive], self.aggregation)
            chosen = [decisive[i] for i in indices]
        head = {
            "schema_version": SCHEMA_VERSION,
            "occurred_at": occurred_at,
            "revision": len(readings),
            "outcome": "reply" if readings else "no_reply",
            "reward": reward,
            # Without a reply nothing is known of the reward: the experience has no weight.
            "reward_confidence": sum(r["confidence"] for r in chosen) / len(chosen) if chosen else 0.0,
            "signals": [s for r in chosen for s in r["signals"]],
            "readings": readings,
            "reply_ids": [r["reply_id"] for r in readings],
            "replied_at": readings[-1]["occurred_at"] if readings else None,
            "extractor": "+".join(sorted({r["extractor"] for r in readings})),
            "aggregation": self.aggregation,
        }
        # The interaction was validated when it was decoded: its bytes are inserted unchanged.
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
    return any(signal["type"] not in IMPLICIT for signal in reading["signals"])


def _sign(reading: dict[str, Any]) -> int:
    reward: float = reading["reward"]
    return (reward > 0.0) - (reward < 0.0)


def _iso(moment: datetime) -> str:
    # In pydantic's format, so that a new reading and one read from replay have the same bytes.
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")
