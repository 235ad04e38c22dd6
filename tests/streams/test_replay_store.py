from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import redis
import redis.asyncio

from cortex_core.replay_buffer import ReplayBuffer
from streams.events import ExperienceEvent, Reading, parse
from streams.replay_store import (
    INDEX_S,
    RedisReplayBuffer,
    Replaces,
    ReplayKeys,
    ReplayWrite,
    WriteResult,
    index_key,
    model_ids,
    to_entry,
)
from streams.replay_writer import ReplayWriter
from streams.testing import interaction
from tests.contracts.replay_store_contract import MakeStore, ReplayStoreContract, entry, ids, same

pytestmark = pytest.mark.integration


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as it:
        yield it


@pytest.fixture
def prefix(client: redis.Redis) -> Iterator[str]:
    name = f"test-{uuid.uuid4().hex[:10]}"
    yield name
    for keys in iter(lambda: list(client.scan_iter(f"{name}:*", count=1000)), []):
        client.delete(*keys)


class TestRedisReplayBuffer(ReplayStoreContract):
    @pytest.fixture
    def make_store(self, client: redis.Redis, prefix: str) -> MakeStore:
        return lambda capacity: RedisReplayBuffer(
            client, uuid.uuid4().hex, prefix=prefix, capacity=capacity, rng=0
        )


def experience(entry_id: str, at_s: float = 0.0, reward: float = 0.5, revision: int = 1) -> ExperienceEvent:
    it = interaction(entry_id, at_s=at_s)
    readings = [
        Reading(
            reply_id=f"r{i}", occurred_at=it.occurred_at + timedelta(seconds=i), reward=reward, confidence=1.0
        )
        for i in range(revision)
    ]
    return ExperienceEvent(
        occurred_at=it.occurred_at,
        interaction=it,
        revision=revision,
        outcome="reply",
        reward=reward,
        readings=readings,
    )


def written(event: ExperienceEvent, replaces: Replaces | int = Replaces.OLDER) -> ReplayWrite:
    return ReplayWrite(
        event.interaction.interaction_id,
        event.occurred_at.timestamp(),
        event.revision,
        event.to_bytes(),
        replaces,
    )


def test_an_experience_is_read_as_an_entry_and_stored_byte_for_byte(client: redis.Redis, prefix: str) -> None:
    store = RedisReplayBuffer(client, "m", prefix=prefix)
    event = experience("i1", reward=-0.3)
    assert store.write([written(event)]) == [WriteResult.CHANGED]
    got = store.get("i1")
    assert got is not None
    assert same(got, event.to_entry(), atol=0)
    assert [v for _, v in store.raw_values(["i1", "none"])] == [b"1\n" + event.to_bytes(), None]


def test_each_write_returns_its_result(client: redis.Redis, prefix: str) -> None:
    store = RedisReplayBuffer(client, "m", prefix=prefix, capacity=2)
    results = store.write(
        [
            written(experience("b", 2, revision=2)),
            written(experience("b", 2, revision=2)),
            written(experience("b", 2, revision=1)),
            written(experience("c", 3)),
            written(experience("a", 1)),
            written(experience("b", 2, revision=1, reward=-1.0), Replaces.ANY),
            written(experience("b", 2, revision=1, reward=-1.0), Replaces.ANY),
            written(experience("b", 2, revision=2), Replaces.NOTHING),
            written(experience("b", 2, revision=1), Replaces.NOTHING),
            written(experience("b", 2, revision=5), 4),
            written(experience("b", 2, revision=5, reward=-1.0), 1),
            written(experience("d", 4), 0),
            ReplayWrite("c", 0, 0, b"", Replaces.ANY),
            ReplayWrite("c", 0, 0, b"", Replaces.ANY),
        ]
    )
    assert results == [
        WriteResult.CHANGED,
        WriteResult.SAME,
        WriteResult.STALE,
        WriteResult.CHANGED,
        WriteResult.TOO_OLD,
        WriteResult.CHANGED,
        WriteResult.SAME,
        WriteResult.STALE,
        WriteResult.SAME,
        WriteResult.STALE,
        WriteResult.CHANGED,
        WriteResult.STALE,
        WriteResult.CHANGED,
        WriteResult.SAME,
    ]
    assert [(e.id, e.revision, e.reward) for e in store.entries()] == [("b", 5, -1.0)]


@pytest.mark.parametrize("seed", range(5))
def test_the_content_is_independent_of_order_and_equals_the_file_buffer_s(
    client: redis.Redis, prefix: str, seed: int
) -> None:
    rng = random.Random(seed)
    writes = [
        entry(f"{i:02d}", float(i // 3), revision=r, reward=r / 10) for i in range(30) for r in (1, 2, 3)
    ]
    highest = {e.id: e for e in writes}
    rng.shuffle(writes)
    store = RedisReplayBuffer(client, "m", prefix=prefix, capacity=10)
    in_memory = ReplayBuffer(capacity=10)
    store.extend(writes)
    in_memory.extend(writes)
    assert ids(store) == ids(in_memory) == [f"{i:02d}" for i in range(20, 30)]
    assert all(same(e, highest[e.id]) for e in store.entries())


def test_an_older_write_does_not_restore_a_removed_entry(client: redis.Redis, prefix: str) -> None:
    store = RedisReplayBuffer(client, "m", prefix=prefix)
    assert store.write([written(experience("b", revision=3)), ReplayWrite("b", 0, 5, b"")]) == [
        WriteResult.CHANGED,
        WriteResult.CHANGED,
    ]
    assert (store.get("b"), len(store), list(store.entries())) == (None, 0, [])
    assert store.write([written(experience("b", revision=4))]) == [WriteResult.STALE]
    assert store.write([written(experience("b", revision=1), Replaces.NOTHING)]) == [WriteResult.CHANGED]
    assert store.ids() == ["b"]


async def test_a_pipeline_of_many_models_returns_results_in_order(
    client: redis.Redis, redis_url: str, prefix: str
) -> None:
    async with redis.asyncio.Redis.from_url(redis_url) as aio:
        writer = ReplayWriter(aio, prefix=prefix, capacity=300)
        pairs = [("ab"[i % 2], written(experience(f"i{i}", i))) for i in range(500)]
        pairs += [("a", written(experience("i0", 0)))]
        results = await writer.write(pairs)
        assert results == [WriteResult.CHANGED] * 500 + [WriteResult.SAME]
        assert model_ids(client, prefix) == ["a", "b"]
        assert len(RedisReplayBuffer(client, "a", prefix=prefix)) == 250
        found = await writer.find([("a", "i2"), (None, "i3"), ("a", "i3"), (None, "never")])
        assert [
            f and (f.model_id, f.version, parse(ExperienceEvent, f.value).interaction.interaction_id)
            for f in found
        ] == [
            ("a", 1, "i2"),
            ("b", 1, "i3"),
            None,
            None,
        ]
        assert await writer.write([]) == []


async def test_an_interaction_is_found_by_its_id_at_the_same_cost_with_any_number_of_models(
    client: redis.Redis, redis_url: str, prefix: str
) -> None:
    async with redis.asyncio.Redis.from_url(redis_url) as aio:
        writer = ReplayWriter(aio, prefix=prefix, capacity=300)
        await writer.write([(f"m{i}", written(experience(f"i{i}", i))) for i in range(100)])
        before = commands(client)
        found = await writer.find([(None, f"i{i}") for i in range(10)] + [(None, f"x{i}") for i in range(10)])
        assert [f and f.model_id for f in found] == [f"m{i}" for i in range(10)] + [None] * 10
        assert commands(client) - before == 20 + 10


def commands(client: redis.Redis) -> int:
    """Number of keys read so far."""
    stats: Any = client.info("commandstats")
    return sum(stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("get", "hget", "smembers"))


async def test_the_index_holds_what_the_buffer_holds_and_expires(
    client: redis.Redis, redis_url: str, prefix: str
) -> None:
    async with redis.asyncio.Redis.from_url(redis_url) as aio:
        writer = ReplayWriter(aio, prefix=prefix, capacity=10)
        for i in range(30):
            await writer.write([("m", written(experience(f"i{i}", i)))])
        await writer.write([("other", written(experience("one")))])  # what was evicted leaves it by now
        held = {
            key.decode().rpartition("{")[2].rstrip("}")
            for key in client.scan_iter(f"{prefix}:replay-model:*")
        }
        assert held == {"one", *(f"i{i}" for i in range(20, 30))}
        life: Any = client.ttl(index_key(prefix, "i29"))
        assert 29 * 86_400 < life <= INDEX_S


async def test_a_write_that_fails_half_way_leaves_no_entry_without_an_index(
    client: redis.Redis, redis_url: str, prefix: str
) -> None:
    keys = ReplayKeys(prefix, "m")
    client.set(keys.entries, "not a hash")
    async with redis.asyncio.Redis.from_url(redis_url) as aio:
        writer = ReplayWriter(aio, prefix=prefix, capacity=10)
        with pytest.raises(redis.ResponseError):
            await writer.write([("m", written(experience("i1")))])
        assert client.get(index_key(prefix, "i1")) == b"m"
        client.delete(keys.entries)
        assert await writer.find([(None, "i1")]) == [None]
        await writer.write([("m", written(experience("i1")))])
        assert [f and f.model_id for f in await writer.find([(None, "i1")])] == ["m"]


def test_readers_see_whole_entries_while_a_writer_amends(client: redis.Redis, prefix: str) -> None:
    store = RedisReplayBuffer(client, "m", prefix=prefix, capacity=20)
    store.extend(entry(f"{i:02d}", float(i)) for i in range(20))
    for i in range(20, 60):
        store.add(entry(f"{i:02d}", float(i)))
        assert len({e.id for e in store.sample(20)}) == 20
    assert to_entry(next(store.raw_values(["59"]))[1] or b"").id == "59"
