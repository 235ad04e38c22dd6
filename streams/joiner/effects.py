"""Joins a batch of events and writes the effects: state, replay, experiences. Used by joiner and rebuild.

    while tasks:
        joined = await engine.join(tasks)     # compute: new conversation states and their experiences
        await engine.settle(joined)           # replay and topic: what the state is about to remove
        tasks = await engine.save(joined)     # state: compare-and-set on each conversation's version
        await engine.store(joined)            # replay: an idempotent upsert by version
        await engine.publish(joined)          # topic: the same (id, version) has the same bytes

The state is written before its experiences, so that each reply of an experience is in the state: else, after
a crash, the next worker could assign it to a second interaction. The state lists the experiences still to be
written (`Conversation.pending`), and the next worker that loads it writes them. The caller commits the
batch's offsets last, so that the next worker reads these events again. `settle` may write before the state,
because it assigns no reply to another interaction: it writes interactions without a reply, and replies with
the id of an interaction that only replay has.

If another worker changed a conversation meanwhile (during a rebalance, two may own it for a moment), `save`
returns its tasks and writes nothing of them. Later writes of a worker that was removed from the group have a
lower version, and replay rejects them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import structlog

from cortex_core.errors import InputError
from streams.failures import is_systemic
from streams.forgotten import Forgotten
from streams.joiner.conversation import Conversation, ReceivedReply, TrackedInteraction
from streams.joiner.decode import StoredExperience, decode_experience, moment
from streams.joiner.join import Changes, Join
from streams.joiner.states import DUE_LIMIT, Save, States
from streams.kafka.publisher import MAX_VALUE
from streams.replay_store import Replaces, ReplayWrite, WriteResult
from streams.replay_writer import Found, ReplayWriter
from streams.trail import WritesLost

log = structlog.get_logger(__name__)

POSTPONE_S = 60.0
"""Seconds until a conversation that could not be closed is tried again."""

Step = Callable[[Conversation, Changes], None]


@dataclass(frozen=True, slots=True)
class Task:
    """One change of one conversation: an event or the timer."""

    conversation_id: str
    partition: int
    step: Step
    is_timer: bool = False
    """Whether to save an unchanged conversation too, which updates when it is due next."""
    is_published: bool = False
    """Whether its experiences were published, and only Redis has lost them."""


@dataclass(frozen=True, slots=True)
class Experience:
    """An experience to write to replay and to publish."""

    model_id: str
    value: bytes
    """JSON of the `ExperienceEvent`."""
    write: ReplayWrite
    is_published: bool = False
    """Whether it was published before."""


Publish = Callable[[Sequence[Experience]], Awaitable[None]]
"""Publishes experiences; returns when all are acknowledged."""


@dataclass(slots=True)
class Joined:
    """The results of a batch of tasks."""

    tasks: dict[str, list[Task]]
    """By conversation."""
    changes: dict[str, Changes] = field(default_factory=dict)
    saves: dict[str, Save] = field(default_factory=dict)
    """By conversation; after `Engine.save`, only those that were written."""
    pending: dict[str, list[Experience]] = field(default_factory=dict)
    """The pending experiences, by conversation."""
    accepted: list[Experience] = field(default_factory=list)
    """The experiences that replay accepted: to be published."""
    counts: Counter[str] = field(default_factory=Counter)
    """Event counts (see `Changes.counts`); complete after `Engine.save`."""

    def is_published(self, conversation_id: str) -> bool:
        """Whether all changes of a conversation were published before."""
        return all(task.is_published for task in self.tasks[conversation_id])


class Engine:
    """Runs tasks on conversations and writes their effects.

    Its methods raise the errors of Redis and Kafka. Then run the same tasks again: every step is idempotent.
    """

    def __init__(
        self,
        join: Join,
        states: States,
        replay: ReplayWriter,
        publish: Publish | None = None,
        forgotten: Forgotten | None = None,
    ) -> None:
        """
        Args:
            forgotten: what a state has of these conversations is removed, whenever it is loaded.
        """
        self.rules = join
        self._forgotten = forgotten or Forgotten()
        self.states = states
        self._replay = replay
        self._publish = publish

    async def apply(self, tasks: Sequence[Task]) -> Counter[str]:
        """Runs all tasks, in order for each conversation; returns event counts (see `Changes.counts`)."""
        counts: Counter[str] = Counter()
        while tasks:
            joined = await self.join(tasks)
            await self.settle(joined)
            tasks = await self.save(joined)
            await self.store(joined)
            await self.publish(joined)
            counts.update(joined.counts)
        return counts

    async def join(self, tasks: Sequence[Task]) -> Joined:
        """Runs the tasks, in order for each conversation, on copies of the stored conversations.

        Raises:
            InputError: an experience exceeds the maximum size of a record.
        """
        by_conversation: dict[str, list[Task]] = {}
        for task in tasks:
            by_conversation.setdefault(task.conversation_id, []).append(task)
        joined = Joined(by_conversation)
        stored = await self.states.load(by_conversation)
        for conversation_id, its_tasks in by_conversation.items():
            before = stored[conversation_id]
            after, changes = before.conversation.copy(), Changes()
            if (until := self._forgotten.until(conversation_id)) is not None:
                after.forget(until)
            if self._forgotten.models:
                after.forget_models(self._forgotten.models, self.rules.window_s)
            for task in its_tasks:
                task.step(after, changes)
            joined.changes[conversation_id] = changes
            if after.changed or after.pending or its_tasks[-1].is_timer:
                # From the clock, so that versions increase even if Redis loses the state with the last one.
                version = max(before.version + 1, _now_ms())
                after.stamp(version, is_published=joined.is_published(conversation_id))
                due = after.due(self.rules.window_s)
                joined.saves[conversation_id] = Save(
                    conversation_id, its_tasks[-1].partition, before, after, version, due
                )
        await self._compose(joined)
        return joined

    async def settle(self, joined: Joined) -> None:
        """Writes and publishes what the state removes next: interactions without a reply, and orphans."""
        # With a lower version than any experience with replies, and only if replay has none.
        unanswered = []
        for conversation_id, changes in joined.changes.items():
            is_published = joined.is_published(conversation_id)
            for it in changes.closed:
                version = joined.saves[conversation_id].before.version
                closed = self._experience(
                    it, (), it.body or b"", version, Replaces.NOTHING, is_published=is_published
                )
                unanswered.append(closed)
        await self._send(await self._insert(unanswered))
        late: dict[str, list[ReceivedReply]] = {}
        unpublished: set[str] = set()
        for conversation_id, changes in joined.changes.items():
            for reply in changes.orphans:
                late.setdefault(reply.interaction_id or "", []).append(reply)
                if not joined.is_published(conversation_id):
                    unpublished.add(reply.interaction_id or "")
        joined.counts["orphaned"] += len(late.pop("", ()))
        while late:
            late = await self._amend(late, unpublished, joined.counts)

    async def save(self, joined: Joined) -> list[Task]:
        """Writes the states; returns the tasks of conversations that another worker changed."""
        conflicts = await self.states.save([*joined.saves.values()])
        for conversation_id in conflicts:
            del joined.saves[conversation_id]
        for conversation_id, changes in joined.changes.items():
            if conversation_id not in conflicts:
                joined.counts.update(changes.counts)
        joined.counts["conflicts"] += len(conflicts)
        return [task for conversation_id in conflicts for task in joined.tasks[conversation_id]]

    async def store(self, joined: Joined) -> None:
        """Writes pending experiences to replay."""
        pending = [e for conversation_id in joined.saves for e in joined.pending.get(conversation_id, ())]
        joined.accepted = await self._write(pending)

    async def publish(self, joined: Joined) -> None:
        """Publishes the accepted experiences; when all are acknowledged, marks none as pending."""
        await self._send(joined.accepted)
        self.states.clear_pending(joined.saves.values())

    async def timer(self, partition: int, now: float) -> Counter[str]:
        """Runs `Join.on_timer` on a partition's due conversations; returns event counts.

        A conversation that fails is postponed for `POSTPONE_S`, and does not affect the others.

        Args:
            now: event time, Unix seconds; may go back.
        """
        counts: Counter[str] = Counter()
        step = _timer_step(self.rules, now)
        while due := await self.states.due(partition, now):
            tasks = [Task(conversation_id, partition, step, is_timer=True) for conversation_id in due]
            try:
                counts.update(await self.apply(tasks))
            except Exception as error:
                if is_systemic(error) or isinstance(error, WritesLost):
                    raise
                for task in tasks:
                    counts.update(await self._timer_alone(task, now))
            if len(due) < DUE_LIMIT:
                break
        return counts

    async def _timer_alone(self, task: Task, now: float) -> Counter[str]:
        try:
            return await self.apply([task])
        except Exception as error:
            if is_systemic(error) or isinstance(error, WritesLost):
                raise
            log.exception("closing a conversation failed", conversation_id=task.conversation_id)
            await self.states.postpone(task.partition, task.conversation_id, now + POSTPONE_S)
            return Counter({"timer_failures": 1})

    async def _compose(self, joined: Joined) -> None:
        """Composes the pending experiences; reads the bodies of closed interactions from replay."""
        pending = [
            (conversation_id, save.after, save.after.interactions[interaction_id], version)
            for conversation_id, save in joined.saves.items()
            for interaction_id, version in save.after.pending.items()
        ]
        closed = [(it.model_id, it.id) for _, _, it, _ in pending if it.body is None]
        found = dict(zip(closed, await self._replay.find(closed), strict=True))
        for conversation_id, after, it, version in pending:
            body = it.body
            if body is None:
                stored = _stored(found[it.model_id, it.id])
                if stored is None:
                    joined.changes[conversation_id].counts["too_late"] += 1
                    continue
                body = bytes(stored.interaction)
            experience = self._experience(
                it, after.replies_of(it), body, abs(version), Replaces.OLDER, is_published=version < 0
            )
            joined.pending.setdefault(conversation_id, []).append(experience)

    def _experience(
        self,
        it: TrackedInteraction,
        replies: Sequence[ReceivedReply],
        body: bytes,
        version: int,
        replaces: Replaces,
        *,
        is_published: bool,
    ) -> Experience:
        value = self.rules.experience(it, body, replies)
        if len(value) > MAX_VALUE:
            raise InputError(
                f"the experience of interaction {it.id!r} has {len(value)} bytes; the maximum is {MAX_VALUE}"
            )
        # Its only reply moved to another interaction: remove it from replay until it is closed or replied to.
        is_open = it.body is not None and not replies and replaces is Replaces.OLDER
        write = ReplayWrite(it.id, it.at, version, b"" if is_open else value, replaces)
        return Experience(it.model_id, value, write, is_published)

    async def _amend(
        self, late: Mapping[str, list[ReceivedReply]], unpublished: Collection[str], counts: Counter[str]
    ) -> dict[str, list[ReceivedReply]]:
        """Amends the experiences that only replay has, and publishes them.

        Args:
            late: replies by interaction id.
            unpublished: ids of interactions with a reply that was not published before.

        Returns:
            The replies whose experience another worker changed meanwhile: to be retried.
        """
        amended: dict[str, Experience] = {}
        unanswered: set[str] = set()
        found = await self._replay.find([(None, interaction_id) for interaction_id in late])
        for (interaction_id, replies), entry in zip(late.items(), found, strict=True):
            stored = _stored(entry)
            if entry is None or stored is None:
                counts["orphaned"] += len(replies)
                continue
            if not stored.readings:
                unanswered.add(interaction_id)
            value, version = self.rules.amended(stored, replies), max(entry.version + 1, _now_ms())
            if value is None:  # amended before, possibly without being published
                value, version = entry.value, entry.version
            write = ReplayWrite(interaction_id, moment(stored.occurred_at), version, value, entry.version)
            is_published = interaction_id not in unpublished
            amended[interaction_id] = Experience(entry.model_id, value, write, is_published)
        accepted = await self._write([*amended.values()])
        await self._send(accepted)
        conflicts: dict[str, list[ReceivedReply]] = {}
        for interaction_id, experience in amended.items():
            if experience in accepted:
                n = len(late[interaction_id])
                if experience.write.version == experience.write.replaces:
                    counts["repeated"] += n
                else:
                    first = interaction_id in unanswered
                    counts.update({"late": n, "joined": n, "amended": n - first})
            else:
                conflicts[interaction_id] = late[interaction_id]
        return conflicts

    async def _write(self, experiences: Sequence[Experience]) -> list[Experience]:
        """Writes to replay; returns the experiences that it accepted, now or in an earlier attempt."""
        results = await self._replay.write([(e.model_id, e.write) for e in experiences])
        return [e for e, it in zip(experiences, results, strict=True) if it is not WriteResult.STALE]

    async def _insert(self, experiences: Sequence[Experience]) -> list[Experience]:
        """Writes to replay what it does not have; returns the experiences that it has now.

        An earlier attempt may have written one without publishing it. That one has the version of its time,
        which is lower if the conversation has been saved since.
        """
        inserted = await self._write(experiences)
        if len(inserted) == len(experiences):
            return inserted
        others = [e for e in experiences if e not in inserted]
        found = await self._replay.find([(e.model_id, e.write.id) for e in others])
        return inserted + [
            replace(e, write=replace(e.write, version=stored.version))
            for e, stored in zip(others, found, strict=True)
            if stored is not None and stored.value == e.value
        ]

    async def _send(self, experiences: Sequence[Experience]) -> None:
        new = [experience for experience in experiences if not experience.is_published]
        if self._publish is not None and new:
            await self._publish(new)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _stored(found: Found | None) -> StoredExperience | None:
    return None if found is None else decode_experience(found.value)


def _timer_step(join: Join, now: float) -> Step:
    def step(conversation: Conversation, changes: Changes) -> None:
        join.on_timer(conversation, now, changes)

    return step
