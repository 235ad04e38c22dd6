"""One batch of events through the join: state, effects, state. Shared by live joining and rebuilds.

Effects have one order, and a crash between any two of them repeats work and changes nothing:

    1. replay        what the experiences now are (an upsert by revision: repeating it is harmless)
    2. experiences   the same, published; the same (id, revision) again carries the same bytes
    3. state         compare-and-set on each conversation's version
    (4. the caller commits the batch's offsets)

State comes last, so that an event that the state knows has had its effects. When another worker changed a
conversation meanwhile (for a moment two may own it, in a rebalance), its state is read again, the batch's
events are done again on it, and everything the conversation now amounts to is written once more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streams.joiner.conversation import Conversation, Heard
from streams.joiner.join import Changes, Join, Orphan, Put, Retract
from streams.joiner.states import DUE_AT_ONCE, Save, States
from streams.replay_store import ReplayWrite, ReplayWriter, Wrote

if TYPE_CHECKING:
    pass

Step = Callable[[Conversation, Changes], None]
Publish = Callable[[Sequence[tuple[str, bytes]]], Awaitable[None]]
"""Takes (model_id, experience as JSON) pairs; returns when all are acknowledged."""


@dataclass(frozen=True, slots=True)
class Task:
    """One thing that happens to one conversation."""

    conversation_id: str
    partition: int
    step: Step
    is_timer: bool = False
    """Saved even where nothing changed, so that what is due next is right again."""


class Engine:
    """Runs tasks on conversations and makes their effects."""

    def __init__(self, join: Join, states: States, replay: ReplayWriter, publish: Publish | None) -> None:
        self.join = join
        self.states = states
        self._replay = replay
        self._publish = publish

    async def apply(self, tasks: Sequence[Task]) -> Counter[str]:
        """Does all tasks, in order for each conversation; returns what happened, by the names of `Changes`.

        Raises:
            Exception: whatever Redis or Kafka raise. Nothing is half done then: call it again.
        """
        counts: Counter[str] = Counter()
        pending: dict[str, list[Task]] = {}
        for task in tasks:
            pending.setdefault(task.conversation_id, []).append(task)
        again = False
        while pending:
            stored = await self.states.load(pending, fresh=again)
            saves: list[Save] = []
            changed: dict[str, Changes] = {}
            for conversation_id, its_tasks in pending.items():
                before = stored[conversation_id]
                after, changes = before.conversation.copy(), Changes()
                for task in its_tasks:
                    task.step(after, changes)
                if again:
                    self.join.everything(after, changes)
                changed[conversation_id] = changes
                if after != before.conversation or again or its_tasks[-1].is_timer:
                    due = after.due(self.join.window_s)
                    saves.append(Save(conversation_id, its_tasks[-1].partition, before, after, due))
            effects_counts = await self._effects([e for c in changed.values() for e in c.effects])
            conflicts = await self.states.save(saves)
            for conversation_id, changes in changed.items():
                if conversation_id not in conflicts:
                    counts += changes.counts
            counts += effects_counts
            counts["conflicts"] += len(conflicts)
            pending = {conversation_id: pending[conversation_id] for conversation_id in conflicts}
            again = True
        return counts

    async def timer(self, partition: int, now: float) -> Counter[str]:
        """Closes what is due in a partition; may be called at any time, with any `now`."""
        counts: Counter[str] = Counter()
        while due := await self.states.due(partition, now):
            step = _timer_step(self.join, now)
            counts += await self.apply(
                [Task(conversation_id, partition, step, is_timer=True) for conversation_id in due]
            )
            if len(due) < DUE_AT_ONCE:
                break
        return counts

    async def _effects(self, effects: Sequence[Put | Retract | Orphan]) -> Counter[str]:
        counts: Counter[str] = Counter()
        final, orphans = _collapse(effects)
        asked: list[tuple[str | None, str]] = [
            (e.interaction.model_id, e.interaction.id) for e in final if e.interaction.body is None
        ]
        asked += [(None, names) for names in orphans]
        found = dict(zip(asked, await self._replay.find(asked), strict=True)) if asked else {}
        writes: list[tuple[str, ReplayWrite]] = []
        values: list[bytes] = []
        for effect in final:
            known = effect.interaction
            body = known.body
            if body is None:
                stored = found[known.model_id, known.id]
                if stored is None:
                    counts["too_late"] += 1
                    continue
                body = stored[1].interaction.to_bytes()
            replies = effect.replies if isinstance(effect, Put) else ()
            value = self.join.experience(body, replies)
            kept, force = (value, effect.force) if isinstance(effect, Put) else (b"", True)
            writes.append((known.model_id, ReplayWrite(known.id, known.at, len(replies), kept, force)))
            values.append(value)
        for names, replies_late in orphans.items():
            stored = found[None, names] if names else None
            if stored is None:
                counts["orphans"] += len(replies_late)
                continue
            model_id, event = stored
            merged = self.join.merged(event, replies_late)
            if merged is None:
                counts["duplicates"] += len(replies_late)
                continue
            counts["late"] += len(replies_late)
            value, revision = merged
            writes.append(
                (model_id, ReplayWrite(names, event.occurred_at.timestamp(), revision, value)),
            )
            values.append(value)
        wrote = await self._replay.write(writes)
        if self._publish is not None:
            news = [
                (model_id, value)
                for (model_id, _), value, result in zip(writes, values, wrote, strict=True)
                if result is not Wrote.STALE
            ]
            if news:
                await self._publish(news)
        counts["experiences"] += sum(result is not Wrote.STALE for result in wrote)
        return counts


def _timer_step(join: Join, now: float) -> Step:
    def step(conversation: Conversation, changes: Changes) -> None:
        join.on_timer(conversation, now, changes)

    return step


def _collapse(
    effects: Iterable[Put | Retract | Orphan],
) -> tuple[list[Put | Retract], dict[str, list[Heard]]]:
    """The last effect on each interaction, and orphans by the interaction they name ("" for none)."""
    final: dict[tuple[str, str], Put | Retract] = {}
    orphans: dict[str, list[Heard]] = {}
    for effect in effects:
        if isinstance(effect, Orphan):
            orphans.setdefault(effect.reply.names or "", []).append(effect.reply)
            continue
        key = (effect.interaction.model_id, effect.interaction.id)
        before = final.pop(key, None)
        final[key] = effect if before is None or isinstance(effect, Retract) else _after(before, effect)
    return list(final.values()), orphans


def _after(before: Put | Retract, put: Put) -> Put:
    """`put` alone, where `before` was to happen to the same interaction first."""
    known = put.interaction
    if known.body is None and before.interaction.body is not None:
        known = before.interaction
    return Put(known, put.replies, put.force or isinstance(before, Retract) or before.force)
