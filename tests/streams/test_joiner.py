from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import redis
from prometheus_client import REGISTRY

from cortex_core.errors import UnavailableError
from streams.events import DeadLetter, parse, utc_now
from streams.kafka.topics import Topics
from streams.settings import Settings
from streams.testing import async_wait_for, interaction, reply, send
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

pytestmark = pytest.mark.integration


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return quick(settings)


@pytest.fixture
def client(settings: Settings) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(settings.redis_address) as it:
        yield it


@pytest.fixture
def counted() -> Callable[..., float]:
    """The increase of a joiner's metric since the start of the test."""
    before = {(s.name, *sorted(s.labels.items())): s.value for m in REGISTRY.collect() for s in m.samples}

    def difference(name: str, **labels: str) -> float:
        return sum(
            sample.value - before.get((sample.name, *sorted(sample.labels.items())), 0.0)
            for metric in REGISTRY.collect()
            for sample in metric.samples
            if sample.name == f"cortex_joiner_{name}" and labels.items() <= sample.labels.items()
        )

    return difference


async def test_events_become_experiences(
    settings: Settings, client: redis.Redis, counted: Callable[..., float]
) -> None:
    topics = Topics.of(settings)
    now = utc_now()
    async with joining(settings):
        await send(
            settings,
            [
                reply("r1", "i1", occurred_at=now + timedelta(seconds=1)),
                interaction("i1", occurred_at=now),
                interaction("i1", occurred_at=now),
                interaction("i2", "other", occurred_at=now),
                (topics.replies, b"c", b"not json"),
                (topics.interactions, None, b'{"schema_version": 99}'),
                (topics.replies, b"c", None),
                (topics.interactions, b"big", b"x" * 7_500_000),
            ],
        )
        await async_wait_for(lambda: replay(settings, client), "the first experience")
        at = now + timedelta(seconds=2)
        await send(settings, [reply("r2", occurred_at=at, text="No, that is wrong!")])
        await async_wait_for(lambda: replay(settings, client)["i1"].revision == 2, "the amendment")
        await async_wait_for(lambda: all_committed(settings), "the commit")

    assert summary(replay(settings, client)) == {"i1": (2, ("r1", "r2"))}
    check_published(await read_all(settings, topics.experiences), replay(settings, client))
    letters = [parse(DeadLetter, r.value) for r in await read_all(settings, topics.dead_letters)]
    assert Counter(letter.topic for letter in letters) == {topics.replies: 2, topics.interactions: 2}
    assert {letter.raw_at_source for letter in letters if "7500000 bytes" in letter.reason} == {True}
    assert any("schema_version 99" in letter.reason for letter in letters)
    assert counted("outcomes_total", outcome="repeated") == 1
    assert counted("outcomes_total", outcome="amended") == 1
    assert counted("dead_letters_total") == 4
    assert counted("events_total", kind="interactions") == 3


async def test_an_interaction_without_a_reply_becomes_no_reply_and_a_late_reply_amends_it(
    settings: Settings, client: redis.Redis, counted: Callable[..., float]
) -> None:
    now = utc_now()
    async with joining(settings, join_window_s=0.5):
        lost = reply("lost", "never", "d", occurred_at=now)
        await send(settings, [interaction("i1", occurred_at=now), lost])
        await async_wait_for(lambda: replay(settings, client), "the window to close")
        assert [(e.revision, e.outcome) for e in replay(settings, client).values()] == [(0, "no_reply")]
        await async_wait_for(lambda: counted("outcomes_total", outcome="orphaned") == 1, "the orphan")
        await send(settings, [reply("late", "i1", occurred_at=utc_now() + timedelta(seconds=1))])
        await async_wait_for(lambda: replay(settings, client)["i1"].revision == 1, "the late amendment")
        await async_wait_for(lambda: counted("outcomes_total", outcome="late") == 1, "the count")
        await async_wait_for(lambda: all_committed(settings), "the commit")
    check_published(await read_all(settings, Topics.of(settings).experiences), replay(settings, client))
    join_keys = client.keys(f"{settings.topic_prefix}:join:*")
    assert len(join_keys) == 1
    assert client.pttl(join_keys[0]) > 0, "a conversation with nothing open expires"


async def test_it_waits_for_redis_reports_it_and_skips_no_event(
    settings: Settings, client: redis.Redis
) -> None:
    async with joining(settings) as joiner:
        await send(settings, conversation(1))
        await async_wait_for(lambda: all_committed(settings), "the first events")
        wanted = expected(conversation(1) + conversation(2))
        generation = joiner.consumer_generation_id
        client.config_set("maxmemory", "1")  # Redis refuses every write
        try:
            await send(settings, conversation(2))
            missing = await async_wait_for(lambda: joiner.worker.missing, "the joiner to report it")
            assert settings.redis_shown in missing["redis"]
            end = time.monotonic() + 2 * settings.session_timeout_s
            await async_wait_for(lambda: time.monotonic() > end, "the session timeout to pass")
            assert not await all_committed(settings)
        finally:
            client.config_set("maxmemory", "0")
        await async_wait_for(lambda: all_committed(settings), "the other events")
        assert not joiner.worker.missing
        assert joiner.consumer_generation_id == generation, "it stayed in the group"
        assert summary(replay(settings, client)) == wanted


async def test_it_is_ready_again_after_a_batch_that_kafka_refused_once(
    settings: Settings, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the producer was available again before the batch reported that it was not."""
    async with joining(settings) as joiner:
        publish, refusals = joiner.engine.publish, ["the last request to a broker that died"]

        async def refused_once(joined: Any) -> None:
            if refusals:
                raise UnavailableError(refusals.pop())
            await publish(joined)

        monkeypatch.setattr(joiner.engine, "publish", refused_once)
        await send(settings, conversation(1))
        await async_wait_for(lambda: not refusals, "the refusal")
        await async_wait_for(lambda: all_committed(settings), "the events")
        await async_wait_for(lambda: not joiner.worker.missing, "the joiner to be ready")
    assert summary(replay(settings, client)) == expected(conversation(1))


async def test_events_of_models_that_are_not_allowed_become_dead_letters(
    settings: Settings, client: redis.Redis
) -> None:
    now = utc_now()
    async with joining(settings.model_copy(update={"models": ("default", "support")})):
        events = [
            interaction("i1", occurred_at=now, model_id="invented"),
            interaction("i2", "d", occurred_at=now),
        ]
        replies = [reply("r1", "i1", occurred_at=now), reply("r2", "i2", "d", occurred_at=now)]
        await send(settings, [*events, *replies])
        await async_wait_for(lambda: replay(settings, client), "the experience of the other model")
    letters = [parse(DeadLetter, r.value) for r in await read_all(settings, Topics.of(settings).dead_letters)]
    assert len(letters) == 1
    assert "'invented' may not be used here; CORTEX_MODELS has default, support" in letters[0].reason
