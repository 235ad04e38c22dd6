"""One batch of events through the join: state, effects, state. Shared by live joining and rebuilds.

    while tasks:
        joined = await engine.join(tasks)     # what the events make of their conversations
        await engine.store(joined)            # replay: an upsert by revision; repeating it is harmless
        await engine.publish(joined)          # the same; the same (id, revision) carries the same bytes
        tasks = await engine.save(joined)     # state: compare-and-set on each conversation's version

Effects have this one order, and a crash between any two of them repeats work and changes nothing. State comes
last, so that an event that the state knows has had its effects; the caller commits the batch's offsets after
it. When another worker changed a conversation meanwhile (for a moment two may own it, in a rebalance), `save`
hands back the tasks on it: its state is read again, they are done again on it, and everything that the
conversation now amounts to is written once more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from streams.joiner.conversation import Conversation, ReceivedReply
from streams.joiner.decode import StoredExperience, decode_experience, moment
from streams.joiner.join import Changes, Join, Orphan, Put, Retract
from streams.joiner.states import DUE_AT_ONCE, Save, States
from streams.replay_store import ReplayWrite, ReplayWriter, WriteResult

Step = Callable[[Conversation, Changes], None]
Asked = list[tuple[str | None, str]]
"""Model, None for any, and interaction."""
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
    again: bool = False
    """Another worker changed the conversation meanwhile: its state is read afresh, and all of it written."""


@dataclass(slots=True)
class Joined:
    """What a batch of tasks made of its conversations, on its way out."""

    tasks: dict[str, list[Task]]
    """By conversation."""
    saves: list[Save] = field(default_factory=list)
    writes: list[tuple[str, ReplayWrite]] = field(default_factory=list)
    """(model_id, entry) for replay."""
    values: list[bytes] = field(default_factory=list)
    """The experience that each write is about, as JSON."""
    news: list[tuple[str, bytes]] = field(default_factory=list)
    """(model_id, experience) to publish: those that replay took."""
    changed: dict[str, Counter[str]] = field(default_factory=dict)
    """What happened in each conversation, by the names of `Changes`."""
    counts: Counter[str] = field(default_factory=Counter)
    """What happened in all; complete after `save`."""

    def add(self, model_id: str, write: ReplayWrite, value: bytes) -> None:
        """A write, and the experience that it is about."""
        self.writes.append((model_id, write))
        self.values.append(value)


class Engine:
    """Runs tasks on conversations and makes their effects.

    Its methods raise whatever Redis or Kafka raise. Nothing is half done then: do the same tasks again.
    """

    def __init__(
        self, join: Join, states: States, replay: ReplayWriter, publish: Publish | None = None
    ) -> None:
        self.rules = join
        self.states = states
        self._replay = replay
        self._publish = publish

    async def apply(self, tasks: Sequence[Task]) -> Counter[str]:
        """Does all tasks, in order for each conversation; returns what happened, by names of `Changes`."""
        counts: Counter[str] = Counter()
        while tasks:
            joined = await self.join(tasks)
            await self.store(joined)
            await self.publish(joined)
            tasks = await self.save(joined)
            counts += joined.counts
        return counts

    async def join(self, tasks: Sequence[Task]) -> Joined:
        """Does the tasks, in order for each conversation, on copies of what is stored."""
        by_conversation: dict[str, list[Task]] = {}
        for task in tasks:
            by_conversation.setdefault(task.conversation_id, []).append(task)
        joined, again = Joined(by_conversation), any(task.again for task in tasks)
        stored = await self.states.load(by_conversation, fresh=again)
        effects: list[Put | Retract | Orphan] = []
        for conversation_id, its_tasks in by_conversation.items():
            before = stored[conversation_id]
            after, changes = before.conversation.copy(), Changes()
            for task in its_tasks:
                task.step(after, changes)
            if again:
                self.rules.everything(after, changes)
            joined.changed[conversation_id] = changes.counts
            effects += changes.effects
            if after.changed or again or its_tasks[-1].is_timer:
                due = after.due(self.rules.window_s)
                joined.saves.append(Save(conversation_id, its_tasks[-1].partition, before, after, due))
        await self._compose(effects, joined)
        return joined

    async def store(self, joined: Joined) -> None:
        """Writes replay."""
        wrote = await self._replay.write(joined.writes)
        joined.news = [
            (model_id, value)
            for (model_id, _), value, result in zip(joined.writes, joined.values, wrote, strict=True)
            if result is not WriteResult.STALE
        ]
        joined.counts["experiences"] += len(joined.news)

    async def publish(self, joined: Joined) -> None:
        """Publishes what replay took; returns when all is acknowledged."""
        if self._publish is not None and joined.news:
            await self._publish(joined.news)

    async def save(self, joined: Joined) -> list[Task]:
        """Writes the conversations' state; returns the tasks on those that another worker changed."""
        conflicts = await self.states.save(joined.saves)
        for conversation_id, counts in joined.changed.items():
            if conversation_id not in conflicts:
                joined.counts += counts
        joined.counts["conflicts"] += len(conflicts)
        return [
            replace(task, again=True)
            for conversation_id in joined.tasks
            if conversation_id in conflicts
            for task in joined.tasks[conversation_id]
        ]

    async def timer(self, partition: int, now: float) -> Counter[str]:
        """Closes what is due in a partition; may be called at any time, with any `now`."""
        counts: Counter[str] = Counter()
        while due := await self.states.due(partition, now):
            step = _timer_step(self.rules, now)
            counts += await self.apply(
                [Task(conversation_id, partition, step, is_timer=True) for conversation_id in due]
            )
            if len(due) < DUE_AT_ONCE:
                break
        return counts

    async def _compose(self, effects: Sequence[Put | Retract | Orphan], joined: Joined) -> None:
        """The experiences that the effects are about, with what replay still knows of them."""
        final, orphans = _collapse(effects)
        asked: Asked = [
            (e.interaction.model_id, e.interaction.id) for e in final if e.interaction.body is None
        ]
        asked += [(None, names) for names in orphans if names]
        found = await self._find(asked) if asked else {}
        for effect in final:
            it = effect.interaction
            body = it.body
            if body is None:
                if (it.model_id, it.id) not in found:
                    joined.counts["too_late"] += 1
                    continue
                body = bytes(found[it.model_id, it.id][1].interaction)
            replies = effect.replies if isinstance(effect, Put) else ()
            value = self.rules.experience(it, body, replies)
            kept, force = (value, effect.force) if isinstance(effect, Put) else (b"", True)
            joined.add(it.model_id, ReplayWrite(it.id, it.at, len(replies), kept, force), value)
        for names, replies_late in orphans.items():
            if (None, names) not in found:
                joined.counts["orphans"] += len(replies_late)
                continue
            model_id, stored = found[None, names]
            amended = self.rules.amended(stored, replies_late)
            if amended is None:
                joined.counts["duplicates"] += len(replies_late)
                continue
            joined.counts["late"] += len(replies_late)
            value, revision = amended
            write = ReplayWrite(names, moment(stored.occurred_at), revision, value)
            joined.add(model_id, write, value)

    async def _find(self, asked: Asked) -> dict[tuple[str | None, str], tuple[str, StoredExperience]]:
        """What replay has of those asked for, with the model that has it."""
        found = {}
        for key, value in zip(asked, await self._replay.find(asked), strict=True):
            stored = None if value is None else decode_experience(value[1])
            if value is not None and stored is not None:
                found[key] = value[0], stored
        return found


def _timer_step(join: Join, now: float) -> Step:
    def step(conversation: Conversation, changes: Changes) -> None:
        join.on_timer(conversation, now, changes)

    return step


def _collapse(
    effects: Iterable[Put | Retract | Orphan],
) -> tuple[list[Put | Retract], dict[str, list[ReceivedReply]]]:
    """The last effect on each interaction, and orphans by the interaction they name ("" for none)."""
    final: dict[tuple[str, str], Put | Retract] = {}
    orphans: dict[str, list[ReceivedReply]] = {}
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
    it = put.interaction
    if it.body is None and before.interaction.body is not None:
        it = before.interaction
    return Put(it, put.replies, put.force or isinstance(before, Retract) or before.force)
