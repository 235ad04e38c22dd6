"""Redis loses effects of committed events: a joiner notices, and joins those events again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import redis
import redis.asyncio
import structlog.testing
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.records_to_delete import RecordsToDelete

from streams.events import ExperienceEvent, InteractionEvent, ReplyEvent, parse, utc_now
from streams.joiner.metrics import EXPIRED
from streams.joiner.offsets import StoredOffsets
from streams.joiner.states import RedisStates
from streams.kafka.clients import started
from streams.kafka.topics import Topics
from streams.settings import Settings
from streams.testing import async_wait_for, interaction, reply, send, spawn_worker
from streams.trail import WritesLost
from tests.streams.joined import (
    all_committed,
    check_published,
    conversation,
    expected,
    joining,
    quick,
    replay,
    summary,
)
from tests.streams.kafka_helpers import read_all
from tests.streams.test_joiner_effects import Bench, events_of, outcome_in_order

pytestmark = pytest.mark.integration
Events = list[InteractionEvent | ReplyEvent]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return quick(settings)


@pytest.fixture
def client(settings: Settings) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(settings.redis_address) as it:
        yield it


@pytest.fixture
async def aio(settings: Settings) -> AsyncIterator[redis.asyncio.Redis]:
    async with redis.asyncio.Redis.from_url(settings.redis_address) as it:
        yield it


class Copies:
    """Copies of all keys of one prefix."""

    def __init__(self, client: redis.Redis, prefix: str) -> None:
        self.client, self.prefix = client, prefix

    def make(self) -> dict[bytes, Any]:
        return {key: self.client.dump(key) for key in self.client.scan_iter(f"{self.prefix}:*", count=1000)}

    def restore(self, copy: dict[bytes, Any]) -> None:
        """Replaces all keys by a copy, at once; an empty copy: deletes them."""
        with self.client.pipeline() as pipe:
            for key in self.client.scan_iter(f"{self.prefix}:*", count=1000):
                pipe.delete(key)
            for key, value in copy.items():
                pipe.restore(key, 0, value)
            pipe.execute()


async def join_all(settings: Settings, events: Sequence[InteractionEvent | ReplyEvent]) -> None:
    await send(settings, events)
    await async_wait_for(lambda: all_committed(settings), "the events to be joined")


async def published(settings: Settings) -> list[Any]:
    return await read_all(settings, Topics.of(settings).experiences)


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("lost", ["everything", "the last events"])
async def test_what_redis_has_lost_is_joined_again_and_not_published_again(
    settings: Settings, client: redis.Redis, lost: str, stopped: bool
) -> None:
    copies = Copies(client, settings.topic_prefix)
    first, second, third = ([e for n in range(k, 30, 3) for e in conversation(n)] for k in range(3))
    # Without an interaction id: which interaction they belong to only the state says.
    third += [reply(f"later-{n}", None, f"c{n}", occurred_at=utc_now()) for n in range(30)]
    joiner = spawn_worker("joiner", settings, join_batch=7).wait_ready()
    await join_all(settings, first)
    copy = {} if lost == "everything" else copies.make()
    await join_all(settings, second)
    before = [record.value for record in await published(settings)]
    assert joiner.alive if not stopped else joiner.stop() == 0
    copies.restore(copy)
    if stopped:
        joiner = spawn_worker("joiner", settings, join_batch=7)
    await async_wait_for(
        lambda: summary(replay(settings, client)) == expected(first + second), "the lost effects"
    )
    assert [record.value for record in await published(settings)] == before
    await join_all(settings, third)
    got = replay(settings, client)
    assert summary(got) == expected(first + second + third)
    check_published(await published(settings), got)
    assert joiner.stop() == 0


async def test_redis_may_lose_its_data_at_any_moment_under_load(
    settings: Settings, client: redis.Redis
) -> None:
    copies, rng = Copies(client, settings.topic_prefix), random.Random(0)
    events = [event for n in range(120) for event in conversation(n)]
    rng.shuffle(events)
    taken: list[dict[bytes, Any]] = [{}]

    def grown(seen: int) -> bool:
        return len(replay(settings, client)) > seen

    async with joining(settings, join_batch=5):
        for start in range(0, len(events), 60):
            sending = asyncio.create_task(send(settings, events[start : start + 60]))
            await async_wait_for(partial(grown, len(replay(settings, client))), "progress")
            copies.restore(rng.choice(taken))
            taken.append(copies.make())
            await sending
        await async_wait_for(lambda: all_committed(settings), "all events to be joined")
        await async_wait_for(
            lambda: summary(replay(settings, client)) == expected(events), "the lost effects"
        )
    check_published(await published(settings), replay(settings, client))


async def test_events_that_expired_before_they_were_joined_are_counted(
    settings: Settings, client: redis.Redis
) -> None:
    topics = Topics.of(settings)
    first, second = ([e for n in part for e in conversation(n)] for part in (range(9), range(9, 20)))
    async with joining(settings):
        await join_all(settings, first)
    await send(settings, second)
    records = await read_all(settings, topics.replies)
    ends = {TopicPartition(r.topic, r.partition): r.offset + 1 for r in records}
    async with started(AIOKafkaAdminClient(bootstrap_servers=settings.kafka_address)) as admin:
        await admin.delete_records({tp: RecordsToDelete(end) for tp, end in ends.items()})
    lost = sum(isinstance(e, ReplyEvent) for e in second)
    before = EXPIRED.labels(topics.replies)._value.get()
    with structlog.testing.capture_logs() as logs:
        async with joining(settings):
            await async_wait_for(lambda: EXPIRED.labels(topics.replies)._value.get() > before, "the count")
    assert EXPIRED.labels(topics.replies)._value.get() - before == lost
    assert sum(line.get("events", 0) for line in logs if "expired" in line["event"]) == lost


# -- the engine alone, on a real Redis ---------------------------------------------------------------------


async def test_nothing_is_computed_from_a_state_with_a_gap(
    settings: Settings, client: redis.Redis, aio: redis.asyncio.Redis
) -> None:
    bench = Bench(aio, settings.topic_prefix)
    offsets = StoredOffsets(aio, settings.topic_prefix, bench.trail)
    await offsets.load()
    await bench.see(interaction("i1"))
    position = TopicPartition(Topics.of(settings).interactions, 0)
    await offsets.advance({position: 1})
    Copies(client, settings.topic_prefix).restore({})
    with pytest.raises(WritesLost):
        await bench.see(reply("r1", None))
    with pytest.raises(WritesLost):
        await bench.close()
    with pytest.raises(WritesLost):
        await offsets.advance({position: 2})
    assert not bench.published
    assert not await bench.replay()
    assert await offsets.load() == {}


@pytest.mark.parametrize("seed", [*range(8), 31, 47])
async def test_losses_and_crashes_in_any_order_change_no_experience(
    settings: Settings, client: redis.Redis, aio: redis.asyncio.Redis, seed: int
) -> None:
    rng, prefix = random.Random(seed), settings.topic_prefix
    events = [e for n in range(8) for e in events_of(n)]
    wanted = await outcome_in_order(aio, f"{prefix}x", events)
    rng.shuffle(events)
    topics, copies = Topics.of(settings), Copies(client, prefix)
    logs: dict[TopicPartition, Events] = {
        TopicPartition(topics.interactions, 0): [e for e in events if isinstance(e, InteractionEvent)],
        TopicPartition(topics.replies, 0): [e for e in events if isinstance(e, ReplyEvent)],
    }
    committed = dict.fromkeys(logs, 0)  # in Kafka
    newest: dict[str, tuple[int, bytes]] = {}
    taken: list[dict[bytes, Any]] = [{}]
    bench = Bench(aio, prefix)
    offsets = StoredOffsets(aio, prefix, bench.trail)

    async def begin() -> dict[TopicPartition, int]:
        """What the consumer does after an assignment or a loss."""
        nonlocal offsets
        assert isinstance(bench.states, RedisStates)
        bench.states.clear_cache()
        offsets = StoredOffsets(aio, prefix, bench.trail)
        stored = await offsets.load()
        return {tp: min(stored.get(tp, 0), committed[tp]) for tp in logs}

    position = await begin()
    losses = 0
    while position != {tp: len(log) for tp, log in logs.items()}:
        tasks, after = [], dict(position)
        is_restoring = any(position[tp] < committed[tp] for tp in logs)
        for tp, log in logs.items():
            end = committed[tp] if is_restoring else len(log)
            after[tp] = min(end, position[tp] + rng.randint(0, 6))
            for offset in range(position[tp], after[tp]):
                tasks.append(replace(bench.task(log[offset]), is_published=offset < committed[tp]))
        try:
            if rng.random() < 0.3:
                bench.fail_publishing = 1
            await bench.engine.apply(tasks)
            if rng.random() < 0.4 and losses < 8:
                losses += 1
                copies.restore(rng.choice(taken))
            await offsets.advance({tp: n for tp, n in after.items() if n > position[tp]})
            committed = {tp: max(committed[tp], n) for tp, n in after.items()}
            position = after
            if rng.random() < 0.3:
                taken.append(copies.make())
        except (WritesLost, ConnectionError) as error:
            if isinstance(error, ConnectionError) and rng.random() < 0.5:  # the joiner dies
                keep(newest, bench)
                bench = Bench(aio, prefix)
            position = await begin()
    bench.fail_publishing = 0
    await bench.close()
    keep(newest, bench)
    assert losses
    assert await bench.replay() == wanted
    with_replies = {i: v for i, (_, v) in newest.items() if parse(ExperienceEvent, v).reply_ids}
    assert with_replies == {i: v for i, v in wanted.items() if parse(ExperienceEvent, v).reply_ids}


def keep(newest: dict[str, tuple[int, bytes]], bench: Bench) -> None:
    """Adds what a joiner has published."""
    for (interaction_id, version), value in bench.contents.items():
        newest[interaction_id] = max(newest.get(interaction_id, (-1, b"")), (version, value))
