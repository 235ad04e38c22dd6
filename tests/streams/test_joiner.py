from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import timedelta

import pytest
import redis

from streams.events import DeadLetter, parse, utc_now
from streams.kafka.topics import Topics
from streams.settings import Settings
from streams.testing import WorkerProcess, async_wait_for, interaction, reply, send, spawn_worker
from tests.streams.joined import (
    all_committed,
    check_published,
    conversation,
    expected,
    quick,
    replay,
    summary,
)
from tests.streams.kafka_helpers import read_all

pytestmark = pytest.mark.integration


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return quick(settings)


@pytest.fixture
def client(settings: Settings) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(settings.redis_address) as it:
        yield it


def metric(worker: WorkerProcess, name: str, **labels: str) -> float:
    wanted = "".join(f'{k}="{v}"' for k, v in labels.items())
    lines = worker.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name) and wanted in line)


def outcome(worker: WorkerProcess, name: str) -> float:
    return metric(worker, "cortex_joiner_outcomes_total", outcome=name)


async def test_events_become_experiences(settings: Settings, client: redis.Redis) -> None:
    joiner = spawn_worker("joiner", settings).wait_ready()
    topics = Topics.of(settings)
    now = utc_now()
    await send(
        settings,
        [
            reply("r1", "i1", occurred_at=now + timedelta(seconds=1)),
            interaction("i1", occurred_at=now),
            interaction("i1", occurred_at=now),
            interaction("i2", "other", occurred_at=now),
            (topics.replies, b"c", b"no json"),
            (topics.interactions, None, b'{"schema_version": 99}'),
            (topics.replies, b"c", None),
            (topics.interactions, b"big", b"x" * 7_500_000),
        ],
    )
    await async_wait_for(lambda: replay(settings, client), "the first experience")
    await send(settings, [reply("r2", occurred_at=now + timedelta(seconds=2), text="No, that is wrong!")])
    await async_wait_for(lambda: replay(settings, client)["i1"].revision == 2, "the amendment")
    await async_wait_for(lambda: all_committed(settings), "the commit")

    assert summary(replay(settings, client)) == {"i1": (2, ("r1", "r2"))}
    check_published(await read_all(settings, topics.experiences), replay(settings, client))
    letters = [parse(DeadLetter, r.value) for r in await read_all(settings, topics.dead_letters)]
    assert Counter(letter.topic for letter in letters) == {topics.replies: 2, topics.interactions: 2}
    assert {letter.raw_at_source for letter in letters if "7500000 bytes" in letter.reason} == {True}
    assert any("schema_version 99" in letter.reason for letter in letters)
    assert outcome(joiner, "duplicates") == 1
    assert outcome(joiner, "amended") == 1
    assert metric(joiner, "cortex_joiner_dead_letters_total") == 4
    assert metric(joiner, "cortex_joiner_events_total", kind="interactions") == 3
    assert joiner.stop() == 0


async def test_silence_becomes_no_reply_and_a_late_reply_amends_it(
    settings: Settings, client: redis.Redis
) -> None:
    joiner = spawn_worker("joiner", settings, join_window_s=0.5).wait_ready()
    now = utc_now()
    await send(settings, [interaction("i1", occurred_at=now), reply("lost", "never", "d", occurred_at=now)])
    await async_wait_for(lambda: replay(settings, client), "the window to close")
    assert [(e.revision, e.outcome) for e in replay(settings, client).values()] == [(0, "no_reply")]
    await async_wait_for(lambda: outcome(joiner, "orphans") == 1, "the orphan")
    await send(settings, [reply("late", "i1", occurred_at=utc_now() + timedelta(seconds=1))])
    await async_wait_for(lambda: replay(settings, client)["i1"].revision == 1, "the late amendment")
    await async_wait_for(lambda: outcome(joiner, "late") == 1, "the count")
    await async_wait_for(lambda: all_committed(settings), "the commit")
    check_published(await read_all(settings, Topics.of(settings).experiences), replay(settings, client))
    join_keys = client.keys(f"{settings.topic_prefix}:join:*")
    assert len(join_keys) == 1
    assert client.pttl(join_keys[0]) > 0, "a conversation with nothing open expires"


async def test_it_waits_for_redis_says_so_and_skips_nothing(settings: Settings, client: redis.Redis) -> None:
    joiner = spawn_worker("joiner", settings).wait_ready()
    await send(settings, conversation(1))
    await async_wait_for(lambda: all_committed(settings), "the first events")
    wanted = expected(conversation(1) + conversation(2))
    client.config_set("maxmemory", "1")  # every write is refused from here on
    try:
        await send(settings, conversation(2))
        body = await async_wait_for(
            lambda: (r := joiner.get("/readyz")).status_code == 503 and r.json(), "/readyz to say no"
        )
        assert settings.redis_shown in body["missing"]["redis"]
        assert not await all_committed(settings)
    finally:
        client.config_set("maxmemory", "0")
    await async_wait_for(lambda: all_committed(settings), "the rest")
    joiner.wait_ready()
    assert summary(replay(settings, client)) == wanted
