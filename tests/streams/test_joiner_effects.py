from __future__ import annotations

import asyncio
import random
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

import pytest
import redis.asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cortex_core.feedback_collector import FeedbackCollector
from streams.events import ExperienceEvent, InteractionEvent, ReplyEvent, parse
from streams.joiner.conversation import LATE_S, Conversation
from streams.joiner.decode import decode_interaction, decode_reply
from streams.joiner.effects import POSTPONE_S, Engine, Experience, Task
from streams.joiner.join import MAX_KEPT, Changes, Join
from streams.joiner.states import MemoryStates, RedisStates, Save, States
from streams.replay_store import ReplayKeys, decode
from streams.replay_writer import ReplayWriter
from streams.testing import T0, interaction, reply
from streams.trail import Trail

pytestmark = pytest.mark.integration
WINDOW = 600.0
START = T0.timestamp()
Events = Sequence[InteractionEvent | ReplyEvent]


class Bench:
    """An engine on a real Redis with its own prefix; records what it publishes."""

    def __init__(self, client: redis.asyncio.Redis, prefix: str, states: States | None = None) -> None:
        self.client, self.prefix = client, prefix
        self.join = Join(window_s=WINDOW, aggregation="last", collector=FeedbackCollector())
        self.trail = Trail(client, prefix)
        self.states = states or RedisStates(client, prefix, WINDOW, self.trail)
        self.published: list[ExperienceEvent] = []
        self.contents: dict[tuple[str, int], bytes] = {}
        self.fail_publishing = 0
        self.writer = ReplayWriter(client, prefix=prefix, capacity=1000, trail=self.trail)
        self.engine = Engine(self.join, self.states, self.writer, self._publish)

    async def _publish(self, experiences: Sequence[Experience]) -> None:
        if self.fail_publishing:
            self.fail_publishing -= 1
            raise ConnectionError("Kafka is unavailable")
        self.published += [parse(ExperienceEvent, it.value) for it in experiences]
        for it in experiences:
            content = self.contents.setdefault((it.write.id, it.write.version), it.value)
            assert content == it.value, "the same (id, version) is the same bytes"

    def task(self, event: InteractionEvent | ReplyEvent) -> Task:
        if isinstance(event, InteractionEvent):
            step: Callable[[Conversation, Changes], None] = partial(_interaction, self.join, event)
        else:
            step = partial(_reply, self.join, event)
        return Task(event.conversation_id, 0, step)

    async def see(self, *events: InteractionEvent | ReplyEvent) -> Counter[str]:
        return await self.engine.apply([self.task(e) for e in events])

    async def close(self) -> None:
        """Runs the timer twice: the second run closes what is pending during the first."""
        for _ in range(2):
            await self.engine.timer(0, START + 2 * WINDOW)

    async def replay(self) -> dict[str, bytes]:
        """JSON of the experiences in replay."""
        values: Any = await self.client.hgetall(ReplayKeys(self.prefix, "default").entries)
        return {k.decode(): decode(v)[1] for k, v in values.items()}


def _interaction(join: Join, event: InteractionEvent, conversation: Conversation, changes: Changes) -> None:
    join.on_interaction(conversation, decode_interaction(event.to_bytes(), store_text=False), START, changes)


def _reply(join: Join, event: ReplyEvent, conversation: Conversation, changes: Changes) -> None:
    [reply] = join.read([decode_reply(event.to_bytes())])
    join.on_reply(conversation, reply, START, changes)


def _timer(join: Join, now: float, conversation: Conversation, changes: Changes) -> None:
    join.on_timer(conversation, now, changes)


@pytest.fixture
async def client(redis_url: str) -> AsyncIterator[redis.asyncio.Redis]:
    async with redis.asyncio.Redis.from_url(redis_url) as it:
        yield it


@pytest.fixture
async def prefix(client: redis.asyncio.Redis) -> AsyncIterator[str]:
    name = f"test-{uuid.uuid4().hex[:10]}"
    yield name
    keys = [key async for key in client.scan_iter(f"{name}*", count=1000)]
    if keys:
        await client.delete(*keys)


def events_of(n: int) -> list[InteractionEvent | ReplyEvent]:
    """A conversation in which half of the replies name no interaction."""
    events: list[InteractionEvent | ReplyEvent] = []
    for turn in range(4):
        events.append(interaction(f"i{n}-{turn}", f"c{n}", at_s=10 * turn))
        names = f"i{n}-{turn}" if (n + turn) % 2 else None
        for k in range((n + turn) % 3):
            events.append(reply(f"r{n}-{turn}-{k}", names, f"c{n}", at_s=10 * turn + 1 + k))
    return events


async def outcome_in_order(client: redis.asyncio.Redis, prefix: str, events: Events) -> dict[str, bytes]:
    bench = Bench(client, f"{prefix}-in-order", MemoryStates())
    await bench.see(*sorted(events, key=lambda e: e.occurred_at))
    await bench.engine.timer(0, START + 2 * WINDOW)
    return await bench.replay()


@pytest.mark.parametrize("batch", [1, 7, 1000])
@pytest.mark.parametrize("cold", [False, True])
async def test_any_order_in_any_batches_makes_the_same_replay(
    client: redis.asyncio.Redis, prefix: str, batch: int, cold: bool
) -> None:
    events = [e for n in range(8) for e in events_of(n)]
    wanted = await outcome_in_order(client, prefix, events)
    assert len(wanted) == 32
    bench = Bench(client, prefix)
    shuffled = [*events, *random.Random(1).sample(events, 10)]
    random.Random(batch).shuffle(shuffled)
    for start in range(0, len(shuffled), batch):
        if cold:
            bench = Bench(client, prefix)
        await bench.see(*shuffled[start : start + batch])
    await bench.close()
    assert await bench.replay() == wanted


async def test_a_batch_whose_effects_failed_is_retried_as_a_whole(
    client: redis.asyncio.Redis, prefix: str
) -> None:
    bench = Bench(client, prefix)
    events = events_of(2)
    bench.fail_publishing = 1
    with pytest.raises(ConnectionError):
        await bench.see(*events)
    assert not bench.published
    await bench.see(*events)
    assert {e.interaction.interaction_id for e in bench.published} == set(await bench.replay())
    done = len(bench.published)
    await bench.see(*events)
    assert len(bench.published) == done, "nothing is pending any more"


STEPS = ["join", "settle", "save", "store", "publish"]


async def until(engine: Engine, tasks: Sequence[Task], last: str) -> None:
    """Runs the steps up to `last`, as a worker that is killed after it."""
    joined = await engine.join(tasks)
    for step in STEPS[1 : STEPS.index(last) + 1]:
        await getattr(engine, step)(joined)


@pytest.mark.parametrize("last", STEPS)
async def test_a_crash_between_any_two_steps_gives_no_reply_to_two_interactions(
    client: redis.asyncio.Redis, prefix: str, last: str
) -> None:
    first, second, answer = interaction("i1", at_s=0), interaction("i2", at_s=10), reply("r", at_s=20)
    killed = Bench(client, prefix)
    await until(killed.engine, [killed.task(first), killed.task(answer)], last)
    successor = Bench(client, prefix)
    await successor.see(first, second, answer)  # the same records in another batch
    await successor.close()
    got = {i: parse(ExperienceEvent, value) for i, value in (await successor.replay()).items()}
    assert {i: e.reply_ids for i, e in got.items()} == {"i1": [], "i2": ["r"]}
    assert {
        e.interaction.interaction_id: e.to_bytes() for e in [*killed.published, *successor.published]
    } == {i: e.to_bytes() for i, e in got.items()}


async def test_what_an_event_writes_does_not_grow_with_its_conversation(
    client: redis.asyncio.Redis, prefix: str
) -> None:
    bench = Bench(client, prefix)

    async def bytes_written(turns: range) -> int:
        before = int((await client.info("stats"))["total_net_input_bytes"])
        for n in turns:
            await bench.see(interaction(f"i{n:04d}", at_s=30 * n))
            await bench.see(reply(f"r{n:04d}", at_s=30 * n + 5))
            await bench.engine.timer(0, START + 30 * n)
        return int((await client.info("stats"))["total_net_input_bytes"]) - before

    await bytes_written(range(10))  # loads the scripts
    early = await bytes_written(range(10, 30))
    await bytes_written(range(30, 600))
    late = await bytes_written(range(600, 620))
    [stored] = (await RedisStates(client, prefix, WINDOW, Trail(client, prefix)).load(["c"])).values()
    assert len(stored.conversation.interactions) == MAX_KEPT
    assert late < 1.25 * early  # beyond the limit, the earliest are deleted by name


async def test_what_was_closed_but_not_published_is_published_also_after_another_event(
    client: redis.asyncio.Redis, prefix: str
) -> None:
    bench = Bench(client, prefix)
    await bench.see(interaction("i0"))
    bench.fail_publishing = 1
    with pytest.raises(ConnectionError):
        await bench.close()
    assert "i0" in await bench.replay()
    assert not bench.published
    await bench.see(interaction("i1", at_s=1.0))  # the state gets another version
    await bench.close()
    published = {id_: value for (id_, _), value in bench.contents.items()}
    assert published == await bench.replay()
    assert len(published) == 2


async def test_a_save_that_conflicts_does_not_change_when_its_conversation_is_due(
    client: redis.asyncio.Redis, prefix: str
) -> None:
    slow, quick = Bench(client, prefix), Bench(client, prefix)
    timer = Task("c", 0, partial(_timer, slow.join, START + 2 * WINDOW), is_timer=True)
    await slow.see(interaction("i1"))
    joined = await slow.engine.join([timer])
    await quick.see(interaction("i2", at_s=WINDOW))
    assert await slow.engine.save(joined) == [timer]
    # It dies before it tries again: the interactions are closed by another.
    assert (await quick.engine.timer(0, START + 3 * WINDOW))["expired"] == 2


@pytest.mark.parametrize("seed", range(40))
async def test_crashes_at_any_step_of_any_batches_make_the_same_replay(
    client: redis.asyncio.Redis, prefix: str, seed: int
) -> None:
    rng = random.Random(seed)
    events = [*events_of(seed % 6), *events_of(7)]
    wanted = await outcome_in_order(client, prefix, events)
    rng.shuffle(events)
    published: list[ExperienceEvent] = []
    contents: dict[tuple[str, int], bytes] = {}
    while events:
        bench = Bench(client, prefix)
        bench.contents = contents
        batch = events[: rng.randint(1, 6)]
        if rng.random() < 0.5:
            timer = partial(_timer, bench.join, START + rng.choice([15.0, WINDOW]))
            closing = Task(batch[0].conversation_id, 0, timer, is_timer=True)
            await until(bench.engine, [closing], rng.choice(STEPS))
        last = rng.choice(STEPS)
        await until(bench.engine, [bench.task(e) for e in batch], last)
        published += bench.published
        del events[: len(batch) * (last == STEPS[-1])]
    bench = Bench(client, prefix)
    bench.contents = contents
    await bench.close()
    published += bench.published
    newest = dict(sorted(contents))
    assert {i: contents[i, version] for i, version in newest.items()} == wanted
    assert await bench.replay() == wanted
    last_published = {e.interaction.interaction_id: e.to_bytes() for e in published}
    assert last_published == {i: parse(ExperienceEvent, value).to_bytes() for i, value in wanted.items()}


async def test_two_owners_of_a_conversation_reach_the_same_result(
    client: redis.asyncio.Redis, prefix: str
) -> None:
    events = events_of(5)
    wanted = await outcome_in_order(client, prefix, events)
    old, new = Bench(client, prefix), Bench(client, prefix)
    conflicts = 0
    for seed in range(10):
        shuffled = random.Random(seed).sample(events, len(events))
        for keys in [[k async for k in client.scan_iter(f"{prefix}:*")]]:
            await client.delete(*keys) if keys else None
        old, new = Bench(client, prefix), Bench(client, prefix)
        # Both have loaded the conversation; then both process some of its events concurrently.
        for mine, other in zip(shuffled[::2], shuffled[1::2], strict=False):
            both = await asyncio.gather(old.see(mine), new.see(other, mine))
            conflicts += sum(c["conflicts"] for c in both)
        await new.see(*shuffled)
        for bench in (old, new):
            await bench.engine.timer(0, START + 2 * WINDOW)
        assert await new.replay() == wanted
    assert conflicts > 10


async def test_a_worker_with_an_outdated_state_changes_nothing(
    client: redis.asyncio.Redis, prefix: str
) -> None:
    late, owner = Bench(client, prefix), Bench(client, prefix)
    await late.see(interaction("i1", at_s=0))
    await owner.see(interaction("i2", at_s=10), reply("r", at_s=20))
    before = await owner.replay()
    assert set(before) == {"i2"}
    # Its state lacks i2, so that it assigns the reply to i1.
    counts = await late.see(reply("r", at_s=20))
    assert counts["conflicts"] == 1
    assert await owner.replay() == before
    assert {e.interaction.interaction_id for e in late.published} <= {"i2"}, "i1 is not published"


async def test_a_conversation_that_redis_lost_is_restored_from_the_cache(
    client: redis.asyncio.Redis, prefix: str
) -> None:
    bench = Bench(client, prefix)
    await bench.see(interaction("i1"))
    await client.delete(f"{prefix}:join:{{c}}")
    await bench.see(reply("r1", "i1"))
    fresh = Bench(client, prefix)
    await fresh.see(reply("r2", at_s=5))
    assert parse(ExperienceEvent, (await fresh.replay())["i1"]).reply_ids == ["r1", "r2"]


async def test_late_replies_reach_replay_in_one_batch_and_in_two(
    client: redis.asyncio.Redis, prefix: str
) -> None:
    bench = Bench(client, prefix)
    await bench.see(interaction("i1"), reply("r1", "i1"))
    for at_s in (WINDOW, LATE_S, LATE_S + 2 * WINDOW):
        await bench.engine.timer(0, START + at_s)
    await client.delete(f"{prefix}:join:{{c}}")  # as its expiry would
    fresh = Bench(client, prefix)
    after = LATE_S + 3 * WINDOW
    await fresh.see(*(reply(f"late{n}", "i1", at_s=after + n) for n in range(3)))
    counts = await fresh.engine.timer(0, START + after + 2 * WINDOW)
    assert (counts["late"], counts["orphaned"]) == (3, 0)
    got = parse(ExperienceEvent, (await fresh.replay())["i1"])
    assert (got.revision, got.reply_ids) == (4, ["r1", "late0", "late1", "late2"])
    assert [e.to_bytes() for e in fresh.published] == [got.to_bytes()]


async def test_the_timer_closes_any_number_of_conversations(client: redis.asyncio.Redis, prefix: str) -> None:
    bench = Bench(client, prefix)
    await bench.see(*(interaction(f"i{n}", f"c{n}", at_s=n / 100) for n in range(1200)))
    assert sum((await bench.engine.timer(0, START + WINDOW - 1)).values()) == 0
    counts = await bench.engine.timer(0, START + 2 * WINDOW)
    assert counts["expired"] == 1200
    store_ids = await client.zrange(ReplayKeys(prefix, "default").order, 0, -1)
    assert len(store_ids) == 1000, "the capacity"
    assert len(bench.published) == 1200
    assert await client.exists(f"{prefix}:join-due:{{0}}") == 0


async def test_a_conversation_that_cannot_be_closed_holds_up_no_other(
    client: redis.asyncio.Redis, prefix: str
) -> None:
    await Bench(client, prefix).see(*(interaction(f"i{n}", f"c{n}", at_s=n) for n in range(5)))
    await client.delete(f"{prefix}:join:{{c0}}")
    await client.set(f"{prefix}:join:{{c0}}", "a key of another type")
    engine = Bench(client, prefix).engine
    for failures, closed in ((1, 4), (0, 0)):
        counts = await engine.timer(0, START + 2 * WINDOW)
        assert (counts["timer_failures"], counts["expired"]) == (failures, closed)
    assert (await engine.timer(0, START + 2 * WINDOW + POSTPONE_S))["timer_failures"] == 1


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_states_in_redis_and_in_memory_are_equal(
    client: redis.asyncio.Redis, prefix: str, data: st.DataObject
) -> None:
    mine = f"{prefix}-{uuid.uuid4().hex[:6]}"
    stores: list[States] = [RedisStates(client, mine, WINDOW, Trail(client, mine)), MemoryStates()]
    benches = [Bench(client, f"{mine}-{n}", states) for n, states in enumerate(stores)]
    events = events_of(data.draw(st.integers(0, 5)))
    for event in data.draw(st.permutations(events)):
        now = START + data.draw(st.sampled_from([0.0, 15.0, WINDOW]))
        for bench in benches:
            await bench.see(event)
            await bench.engine.timer(0, now)
    stores[0] = RedisStates(client, mine, WINDOW, Trail(client, mine))
    loaded = [await states.load({e.conversation_id for e in events}) for states in stores]
    assert {i: s.conversation for i, s in loaded[0].items()} == {
        i: s.conversation for i, s in loaded[1].items()
    }
    replays = [await bench.replay() for bench in benches]
    assert replays[0] == replays[1]


async def test_a_stale_version_is_not_written(client: redis.asyncio.Redis, prefix: str) -> None:
    states = RedisStates(client, prefix, WINDOW, Trail(client, prefix))
    [before] = (await states.load(["c"])).values()
    join = Join(window_s=WINDOW, aggregation="last", collector=FeedbackCollector())
    after = before.conversation.copy()
    _interaction(join, interaction("i1"), after, Changes())
    save = Save("c", 0, before, after, 1, 1.0)
    assert await states.save([save]) == set()
    assert await states.save([save]) == {"c"}
