"""One batch of events through the join: state, then its effects. Shared by live joining and rebuilds.

    while tasks:
        joined = await engine.join(tasks)     # what the events make of their conversations
        await engine.settle(joined)           # into replay and out: what the state is about to let go of
        tasks = await engine.save(joined)     # state: compare-and-set on each conversation's version
        await engine.store(joined)            # replay: an upsert by version; repeating it is harmless
        await engine.publish(joined)          # the same (id, version) carries the same bytes

State comes before the experiences that it makes, so that a reply is never in one that the state knows nothing
of: after a crash the next worker would give it to another interaction as well. The experiences still to be
written are in the state (`Conversation.pending`), and whoever loads it next writes them; the caller commits
the batch's offsets last, so that somebody does. What `settle` writes gives no reply to anybody else: silence,
and replies that name an interaction which is in replay alone.

When another worker changed a conversation meanwhile (for a moment two may own it, in a rebalance), `save`
hands back the tasks on it, and nothing of them has been written. What a worker that was taken for dead writes
afterwards has a lower version, and replay does not take it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from cortex_core.errors import InputError
from streams.failures import is_systemic
from streams.joiner.conversation import Conversation, ReceivedReply, TrackedInteraction
from streams.joiner.decode import StoredExperience, decode_experience, moment
from streams.joiner.join import Changes, Join
from streams.joiner.states import DUE_AT_ONCE, Save, States
from streams.kafka.publisher import MAX_VALUE
from streams.replay_store import Found, Replaces, ReplayWrite, ReplayWriter, WriteResult

log = structlog.get_logger(__name__)

POSTPONE_S = 60.0
"""Seconds until a conversation that could not be closed is tried again."""

Step = Callable[[Conversation, Changes], None]


@dataclass(frozen=True, slots=True)
class Task:
    """One thing that happens to one conversation."""

    conversation_id: str
    partition: int
    step: Step
    is_timer: bool = False
    """Saved even where nothing changed, so that what is due next is noted."""


@dataclass(frozen=True, slots=True)
class Experience:
    """An experience on its way to replay, and out."""

    model_id: str
    value: bytes
    """JSON of the `ExperienceEvent`."""
    write: ReplayWrite


Publish = Callable[[Sequence[Experience]], Awaitable[None]]
"""Returns when all are acknowledged."""


@dataclass(slots=True)
class Joined:
    """What a batch of tasks made of its conversations."""

    tasks: dict[str, list[Task]]
    """By conversation."""
    changes: dict[str, Changes] = field(default_factory=dict)
    saves: dict[str, Save] = field(default_factory=dict)
    """After `Engine.save`, those that were written."""
    pending: dict[str, list[Experience]] = field(default_factory=dict)
    """The experiences that are pending, by conversation."""
    news: list[Experience] = field(default_factory=list)
    """Those to publish: replay took them."""
    counts: Counter[str] = field(default_factory=Counter)
    """What happened, by the names of `Changes`; complete after `Engine.save`."""


class Engine:
    """Runs tasks on conversations and makes their effects.

    Its methods raise whatever Redis or Kafka raise. Do the same tasks again then: what was done is not done
    twice, and what was not is.
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
            await self.settle(joined)
            tasks = await self.save(joined)
            await self.store(joined)
            await self.publish(joined)
            counts += joined.counts
        return counts

    async def join(self, tasks: Sequence[Task]) -> Joined:
        """Does the tasks, in order for each conversation, on copies of what is stored.

        Raises:
            InputError: an experience would be larger than a record may be.
        """
        by_conversation: dict[str, list[Task]] = {}
        for task in tasks:
            by_conversation.setdefault(task.conversation_id, []).append(task)
        joined = Joined(by_conversation)
        stored = await self.states.load(by_conversation)
        for conversation_id, its_tasks in by_conversation.items():
            before = stored[conversation_id]
            after, changes = before.conversation.copy(), Changes()
            for task in its_tasks:
                task.step(after, changes)
            joined.changes[conversation_id] = changes
            due = after.due(self.rules.window_s)
            must_note = its_tasks[-1].is_timer or (due is not None and not before.is_cached)
            if after.changed or after.pending or must_note:
                # By the clock, so that versions grow although Redis may lose the state that has the last one.
                version = max(before.version + 1, _clock())
                after.stamp(version)
                joined.saves[conversation_id] = Save(
                    conversation_id, its_tasks[-1].partition, before, after, version, due
                )
        await self._compose(joined)
        return joined

    async def settle(self, joined: Joined) -> None:
        """Writes and publishes what the state is about to let go of: silence, and replies that waited."""
        # Lower than the version of any reply, and in the place of nothing: whoever was answered stays so.
        silent = []
        for conversation_id, changes in joined.changes.items():
            for it in changes.closed:
                version = joined.saves[conversation_id].before.version
                silent.append(self._experience(it, (), it.body or b"", version, Replaces.NOTHING))
        await self._send(await self._write(silent))
        late: dict[str, list[ReceivedReply]] = {}
        for changes in joined.changes.values():
            for reply in changes.orphans:
                late.setdefault(reply.names or "", []).append(reply)
        joined.counts["orphans"] += len(late.pop("", ()))
        while late:
            late = await self._amend(late, joined.counts)

    async def save(self, joined: Joined) -> list[Task]:
        """Writes the conversations' state; returns the tasks on those that another worker changed."""
        conflicts = await self.states.save([*joined.saves.values()])
        for conversation_id in conflicts:
            del joined.saves[conversation_id]
        for conversation_id, changes in joined.changes.items():
            if conversation_id not in conflicts:
                joined.counts += changes.counts
        joined.counts["conflicts"] += len(conflicts)
        return [task for conversation_id in conflicts for task in joined.tasks[conversation_id]]

    async def store(self, joined: Joined) -> None:
        """Writes what is pending to replay."""
        pending = [e for conversation_id in joined.saves for e in joined.pending.get(conversation_id, ())]
        joined.news = await self._write(pending)

    async def publish(self, joined: Joined) -> None:
        """Publishes what replay took; returns when all is acknowledged, and nothing is pending any more."""
        await self._send(joined.news)
        self.states.written(joined.saves.values())

    async def timer(self, partition: int, now: float) -> Counter[str]:
        """Closes what is due in a partition; may be called at any time, with any `now`.

        A conversation that fails is postponed for `POSTPONE_S`, and does not affect the others.
        """
        counts: Counter[str] = Counter()
        step = _timer_step(self.rules, now)
        while due := await self.states.due(partition, now):
            tasks = [Task(conversation_id, partition, step, is_timer=True) for conversation_id in due]
            try:
                counts += await self.apply(tasks)
            except Exception as error:
                if is_systemic(error):
                    raise
                for task in tasks:
                    counts += await self._timer_alone(task, now)
            if len(due) < DUE_AT_ONCE:
                break
        return counts

    async def _timer_alone(self, task: Task, now: float) -> Counter[str]:
        try:
            return await self.apply([task])
        except Exception as error:
            if is_systemic(error):
                raise
            log.exception("closing a conversation failed", conversation_id=task.conversation_id)
            await self.states.postpone(task.partition, task.conversation_id, now + POSTPONE_S)
            return Counter({"timer_failures": 1})

    async def _compose(self, joined: Joined) -> None:
        """The experiences that are pending, with what replay still has of those that are closed."""
        pending = [
            (conversation_id, save.after.interactions[interaction_id], version, save.after)
            for conversation_id, save in joined.saves.items()
            for interaction_id, version in save.after.pending.items()
        ]
        closed = [(it.model_id, it.id) for _, it, _, _ in pending if it.body is None]
        found = dict(zip(closed, await self._replay.find(closed), strict=True))
        for conversation_id, it, version, conversation in pending:
            body = it.body
            if body is None:
                stored = _stored(found[it.model_id, it.id])
                if stored is None:
                    joined.changes[conversation_id].counts["too_late"] += 1
                    continue
                body = bytes(stored.interaction)
            experience = self._experience(it, conversation.replies_of(it), body, version, Replaces.OLDER)
            joined.pending.setdefault(conversation_id, []).append(experience)

    def _experience(
        self,
        it: TrackedInteraction,
        replies: Sequence[ReceivedReply],
        body: bytes,
        version: int,
        replaces: Replaces,
    ) -> Experience:
        value = self.rules.experience(it, body, replies)
        if len(value) > MAX_VALUE:
            raise InputError(
                f"the experience of {it.id!r} has {len(value)} bytes, at most {MAX_VALUE} can be published"
            )
        # Open again, for its one reply was another's: out of replay until it is answered or closed.
        is_open = it.body is not None and not replies and replaces is Replaces.OLDER
        write = ReplayWrite(it.id, it.at, version, b"" if is_open else value, replaces)
        return Experience(it.model_id, value, write)

    async def _amend(
        self, late: Mapping[str, list[ReceivedReply]], counts: Counter[str]
    ) -> dict[str, list[ReceivedReply]]:
        """Adds replies to what replay has of the interactions that they name, and publishes that; returns
        those whose experience another worker changed meanwhile."""
        amended: dict[str, Experience] = {}
        found = await self._replay.find([(None, names) for names in late])
        for (names, replies), entry in zip(late.items(), found, strict=True):
            stored = _stored(entry)
            if entry is None or stored is None:
                counts["orphans"] += len(replies)
                continue
            value, version = self.rules.amended(stored, replies), max(entry.version + 1, _clock())
            if value is None:  # it was amended, and perhaps not published
                value, version = entry.value, entry.version
            write = ReplayWrite(names, moment(stored.occurred_at), version, value, entry.version)
            amended[names] = Experience(entry.model_id, value, write)
        taken = await self._write([*amended.values()])
        await self._send(taken)
        again: dict[str, list[ReceivedReply]] = {}
        for names, experience in amended.items():
            if experience in taken:
                is_new = experience.write.version != experience.write.replaces
                counts["late" if is_new else "duplicates"] += len(late[names])
            else:
                again[names] = late[names]
        return again

    async def _write(self, experiences: Sequence[Experience]) -> list[Experience]:
        """Writes to replay; those that it took, now or before."""
        results = await self._replay.write([(e.model_id, e.write) for e in experiences])
        return [e for e, it in zip(experiences, results, strict=True) if it is not WriteResult.STALE]

    async def _send(self, experiences: Sequence[Experience]) -> None:
        if self._publish is not None and experiences:
            await self._publish(experiences)


def _clock() -> int:
    """Milliseconds."""
    return time.time_ns() // 1_000_000


def _stored(found: Found | None) -> StoredExperience | None:
    return None if found is None else decode_experience(found.value)


def _timer_step(join: Join, now: float) -> Step:
    def step(conversation: Conversation, changes: Changes) -> None:
        join.on_timer(conversation, now, changes)

    return step
