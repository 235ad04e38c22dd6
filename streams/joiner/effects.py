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

from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from streams.joiner.conversation import LATE_S, Conversation, Heard
from streams.joiner.join import Changes, Join, Orphan, Put, Retract
from streams.replay_store import ReplayWrite, ReplayWriter, Wrote

if TYPE_CHECKING:
    import redis.asyncio

Step = Callable[[Conversation, Changes], None]
Publish = Callable[[Sequence[tuple[str, bytes]]], Awaitable[None]]
"""Takes (model_id, experience as JSON) pairs; returns when all are acknowledged."""

CACHE_BYTES = 64_000_000
"""Conversations of the partitions it owns that a joiner keeps in memory, beside Redis."""
DUE_AT_ONCE = 500
"""Conversations that one round of the timer takes."""


@dataclass(frozen=True, slots=True)
class Task:
    """One thing that happens to one conversation."""

    conversation_id: str
    partition: int
    step: Step
    is_timer: bool = False
    """Saved even where nothing changed, so that what is due next is right again."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A conversation as it was read, and the version that a write must still find."""

    version: int
    conversation: Conversation


@dataclass(frozen=True, slots=True)
class Save:
    """A conversation on its way back into its store."""

    conversation_id: str
    partition: int
    before: Stored
    after: Conversation
    due: float | None


class States(Protocol):
    """Where conversations are kept."""

    async def load(self, ids: Iterable[str], *, fresh: bool = False) -> dict[str, Stored]:
        """Every id's conversation, an empty one where none is kept. `fresh`: past any cache."""

    async def save(self, saves: Sequence[Save]) -> set[str]:
        """Writes; returns the ids whose version was no longer the one read: those are not written."""

    async def due(self, partition: int, now: float) -> list[str]:
        """Conversations of a partition with something to close, earliest first, up to `DUE_AT_ONCE`."""


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


class MemoryStates:
    """Conversations of one process; what a rebuild uses."""

    def __init__(self) -> None:
        self.conversations: dict[str, Conversation] = {}
        self._due: dict[int, dict[str, float]] = {}

    async def load(self, ids: Iterable[str], *, fresh: bool = False) -> dict[str, Stored]:
        del fresh
        return {i: Stored(0, self.conversations.get(i) or Conversation()) for i in ids}

    async def save(self, saves: Sequence[Save]) -> set[str]:
        for save in saves:
            if save.after == Conversation():
                self.conversations.pop(save.conversation_id, None)
            else:
                self.conversations[save.conversation_id] = save.after
            due = self._due.setdefault(save.partition, {})
            # A conversation with nothing open still has to be forgotten one day.
            last = max((i.until for i in save.after.interactions.values()), default=None)
            at = save.due if save.due is not None or last is None else last + LATE_S
            if at is None:
                due.pop(save.conversation_id, None)
            else:
                due[save.conversation_id] = at
        return set()

    def partitions(self) -> dict[str, int]:
        """The partition of each conversation."""
        return {i: partition for partition, due in self._due.items() for i in due}

    async def due(self, partition: int, now: float) -> list[str]:
        due = self._due.get(partition, {})
        return sorted((i for i, at in due.items() if at <= now), key=lambda i: (due[i], i))[:DUE_AT_ONCE]


# KEYS: the conversation. ARGV: version wanted, milliseconds to live (0: for ever), number of fields to
# delete, those, then field, value … to set; none to set deletes the conversation.
SAVE = """
local key = KEYS[1]
if (redis.call('HGET', key, 'v') or '0') ~= ARGV[1] then return 0 end
local gone = tonumber(ARGV[3])
if #ARGV == 3 + gone then redis.call('DEL', key) return 1 end
for i = 4, 3 + gone do redis.call('HDEL', key, ARGV[i]) end
for i = 4 + gone, #ARGV, 2 do redis.call('HSET', key, ARGV[i], ARGV[i+1]) end
redis.call('HINCRBY', key, 'v', 1)
if ARGV[2] ~= '0' then redis.call('PEXPIRE', key, ARGV[2]) else redis.call('PERSIST', key) end
return 1
"""


class RedisStates:
    """Conversations in Redis, with those of late in memory.

    Keys (braces are hash tags):

        <prefix>:join:{<conversation_id>}   hash   v version, s what is known, b:<id> each open interaction
        <prefix>:join-due:{<partition>}     zset   conversation_id by the time when something closes

    A conversation in which nothing is open expires by itself after `LATE_S` and the window.
    """

    def __init__(self, client: redis.asyncio.Redis, prefix: str, window_s: float) -> None:
        self._client = client
        self._prefix = prefix
        self._expiry_ms = int(1000 * (LATE_S + window_s + 3600))
        self._cache: OrderedDict[str, tuple[Stored, int]] = OrderedDict()
        self._cached_bytes = 0
        self._sha: str | None = None

    def key(self, conversation_id: str) -> str:
        return f"{self._prefix}:join:{{{conversation_id}}}"

    def due_key(self, partition: int) -> str:
        return f"{self._prefix}:join-due:{{{partition}}}"

    def forget_cache(self) -> None:
        """After a rebalance: others may have changed what is cached."""
        self._cache.clear()
        self._cached_bytes = 0

    async def load(self, ids: Iterable[str], *, fresh: bool = False) -> dict[str, Stored]:
        out: dict[str, Stored] = {}
        missing = []
        for conversation_id in ids:
            cached = self._cache.get(conversation_id)
            if cached is not None and not fresh:
                out[conversation_id] = cached[0]
            else:
                missing.append(conversation_id)
        if missing:
            pipe = self._client.pipeline(transaction=False)
            for conversation_id in missing:
                pipe.hgetall(self.key(conversation_id))
            for conversation_id, fields in zip(missing, await pipe.execute(), strict=True):
                out[conversation_id] = self._read(conversation_id, fields)
        return out

    def _read(self, conversation_id: str, fields: Mapping[bytes, bytes]) -> Stored:
        if fields:
            return Stored(int(fields[b"v"]), Conversation.load(fields))
        # Redis lost it or let it expire, and this process has it still: it is written anew, whole.
        cached = self._cache.get(conversation_id)
        return Stored(0, cached[0].conversation if cached else Conversation())

    async def save(self, saves: Sequence[Save]) -> set[str]:
        if not saves:
            return set()
        import redis as redis_py  # noqa: PLC0415

        if self._sha is None:
            self._sha = str(await self._client.script_load(SAVE))
        pipe = self._client.pipeline(transaction=False)
        for save in saves:
            pipe.evalsha(self._sha, 1, self.key(save.conversation_id), *self._arguments(save))
            if save.due is None:
                pipe.zrem(self.due_key(save.partition), save.conversation_id)
            else:
                pipe.zadd(self.due_key(save.partition), {save.conversation_id: save.due})
        try:
            answers = await pipe.execute()
        except redis_py.exceptions.NoScriptError:  # Redis was restarted
            self._sha = None
            raise
        conflicts = {s.conversation_id for s, ok in zip(saves, answers[::2], strict=True) if not ok}
        for save in saves:
            if save.conversation_id not in conflicts:
                empty = save.after == Conversation()
                self._keep(save.conversation_id, Stored(0 if empty else save.before.version + 1, save.after))
        return conflicts

    def _arguments(self, save: Save) -> list[Any]:
        if save.after == Conversation():
            return [save.before.version, 0, 0]
        fields, gone = save.after.dump(save.before.conversation if save.before.version else Conversation())
        expiry_ms = self._expiry_ms if save.due is None else 0
        return [
            save.before.version,
            expiry_ms,
            len(gone),
            *gone,
            *(x for pair in fields.items() for x in pair),
        ]

    def _keep(self, conversation_id: str, stored: Stored) -> None:
        _, size = self._cache.pop(conversation_id, (None, 0))
        self._cached_bytes -= size
        size = stored.conversation.size
        self._cache[conversation_id] = stored, size
        self._cached_bytes += size
        while self._cached_bytes > CACHE_BYTES:
            _, (_, size) = self._cache.popitem(last=False)
            self._cached_bytes -= size

    async def due(self, partition: int, now: float) -> list[str]:
        key = self.due_key(partition)
        found: Any = await self._client.zrangebyscore(key, "-inf", now, start=0, num=DUE_AT_ONCE)
        return [conversation_id.decode() for conversation_id in found]
