"""Joiners are killed or stopped, or their group rebalances, while they process events."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from functools import partial

import pytest
import redis

from streams.kafka.topics import Topics
from streams.settings import Settings
from streams.testing import async_wait_for, send, spawn_worker
from tests.streams.joined import (
    all_committed,
    check_published,
    conversation,
    expected,
    joining,
    other_member,
    partitions,
    quick,
    replay,
    summary,
)
from tests.streams.joiner_rounds import Rounds
from tests.streams.kafka_helpers import read_all

pytestmark = pytest.mark.integration


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return quick(settings)


@pytest.fixture
def client(settings: Settings) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(settings.redis_address) as it:
        yield it


async def test_kill_9_in_the_middle_loses_nothing_and_doubles_nothing(
    settings: Settings, client: redis.Redis
) -> None:
    events = [event for n in range(80) for event in conversation(n, named=n % 2 == 0)]
    random.Random(1).shuffle(events)

    def progressed(seen: int) -> bool:
        return len(replay(settings, client)) > seen + 5

    joiner = spawn_worker("joiner", settings, join_batch=7).wait_ready()
    for half in (events[::2], events[1::2]):
        await send(settings, half)
        seen = len(replay(settings, client))
        await async_wait_for(partial(progressed, seen), "progress")
        joiner.kill()
        joiner = spawn_worker("joiner", settings, join_batch=7)
    await async_wait_for(lambda: all_committed(settings), "all events to be joined")
    got = replay(settings, client)
    assert summary(got) == expected(events)
    check_published(await read_all(settings, Topics.of(settings).experiences), got)
    assert joiner.stop() == 0


async def test_two_joiners_share_and_one_takes_over_when_the_other_is_killed(
    settings: Settings, client: redis.Redis
) -> None:
    first, second = spawn_worker("joiner", settings), spawn_worker("joiner", settings)
    first.wait_ready()
    second.wait_ready()
    await async_wait_for(
        lambda: len(partitions(first)) == len(partitions(second)) == 2, "the partitions to be shared"
    )
    topics = Topics.of(settings)
    for mine in (partitions(first), partitions(second)):  # one partition, of both topics
        assert mine in [{(topic, p) for topic in (topics.interactions, topics.replies)} for p in "01"]
    assert not partitions(first) & partitions(second)
    events = [event for n in range(60) for event in conversation(n, turns=2, named=n % 2 == 0)]
    half = len(events) // 2
    await send(settings, events[:half])
    first.kill()
    await send(settings, events[half:])
    await async_wait_for(lambda: all_committed(settings), "the second joiner to take over")
    assert second.alive
    got = replay(settings, client)
    assert summary(got) == expected(events)
    check_published(await read_all(settings, topics.experiences), got)


async def test_rebalances_in_the_middle_lose_nothing(settings: Settings, client: redis.Redis) -> None:
    topics = Topics.of(settings)
    events = [event for n in range(60) for event in conversation(n, named=n % 2 == 0)]
    async with joining(settings, join_batch=5):
        for part in [events[n::5] for n in range(5)]:
            sending = asyncio.create_task(send(settings, part))
            async with other_member(settings):  # owns half of the partitions for a moment
                await sending
        await async_wait_for(lambda: all_committed(settings), "all events to be joined")
    got = replay(settings, client)
    assert summary(got) == expected(events)
    check_published(await read_all(settings, topics.experiences), got)


async def test_kill_9_sigstop_and_rebalances_under_load_lose_and_double_nothing(settings: Settings) -> None:
    run = Rounds(settings, seed=1)
    for number in range(len(run.faults)):
        played = await run.play(number)
        assert (played.lost, played.doubled) == (0, 0), played
    assert not await run.unpublished()
    assert [joiner.stop() for joiner in run.joiners] == [0, 0]
