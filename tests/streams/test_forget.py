"""`cortex forget`: what Redis has of a conversation is erased, and re-reading the topics restores nothing."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import msgspec
import pytest
import redis

from cortex_core.errors import UnavailableError
from streams.audit.compare import audit
from streams.audit.reading import collect
from streams.connections import async_redis_client
from streams.events import utc_now
from streams.heartbeats import FORGOTTEN_S, Heartbeat
from streams.joiner.conversation import Conversation
from streams.joiner.decode import decode_interaction, decode_reply
from streams.joiner.forget import forget
from streams.joiner.join import Changes
from streams.joiner.rebuild import locked, rebuild
from streams.joiner.records import make_join
from streams.kafka.topics import Topics
from streams.settings import Settings
from streams.testing import async_wait_for, at, interaction, reply, send
from streams.weights.control import ControlFollower
from tests.streams.joined import all_committed, expected, joining, quick, replay, summary
from tests.test_cli import flags, here

pytestmark = pytest.mark.integration

SECRET = "secret-conversation"


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return quick(settings).model_copy(update={"store_text": True})


@pytest.fixture
def client(settings: Settings) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(settings.redis_address) as it:
        yield it


def everything(settings: Settings, client: redis.Redis) -> dict[bytes, Any]:
    """All keys and values."""

    def value(key: bytes) -> Any:
        match client.type(key):
            case b"hash":
                return client.hgetall(key)
            case b"zset":
                return client.zrange(key, 0, -1, withscores=True)
            case b"set":
                return client.smembers(key)
            case _:
                return client.get(key)

    return {key: value(key) for key in client.scan_iter(f"{settings.topic_prefix}:*")}


def secrets(settings: Settings, client: redis.Redis) -> list[str]:
    """The keys and values with anything of the conversation."""
    return [
        f"{key!r}: {value!r}"[:300]
        for key, value in everything(settings, client).items()
        if b"secret" in key or "secret" in repr(value)
    ]


def talk(conversation_id: str, prefix: str) -> list[Any]:
    """One interaction with replies, one without, one whose reply moved to another, and a waiting reply."""
    now = utc_now()

    def seconds(n: float) -> dict[str, Any]:
        return {"occurred_at": now - timedelta(seconds=60 - n)}

    name = f"{prefix}-i"
    return [
        interaction(f"{name}1", conversation_id, text=f"{prefix} question", **seconds(0)),
        reply(f"{prefix}-r1", f"{name}1", conversation_id, text=f"Thanks! {prefix} text", **seconds(1)),
        interaction(f"{name}2", conversation_id, **seconds(10)),
        reply(f"{prefix}-r2", None, conversation_id, text="Perfect!", **seconds(30)),
        interaction(f"{name}3", conversation_id, **seconds(20)),
        reply(f"{prefix}-r3", "never", conversation_id, **seconds(31)),
    ]


async def test_a_forgotten_conversation_is_gone_and_stays_gone(
    settings: Settings, client: redis.Redis
) -> None:
    events, others = talk(SECRET, "secret"), talk("other", "kept")
    async with joining(settings):
        for event in [*events, *others]:  # one by one, so that a reply is published before it moves
            await send(settings, [event])
            await async_wait_for(lambda: all_committed(settings), "the event")
        assert len(secrets(settings, client)) >= 4
        done = await forget(settings, SECRET)
        assert (done.entries, done.had_state, done.unconfirmed) == ({"default": 2}, True, [])
        assert secrets(settings, client) == []
        # Neither the joiner's cache nor what comes later restores it.
        late = reply("secret-late", "secret-i1", SECRET, occurred_at=done.until - timedelta(seconds=1))
        await send(settings, [late, reply("more", "kept-i2", "other", occurred_at=utc_now()), *events])
        await async_wait_for(lambda: all_committed(settings), "what comes later")
        assert secrets(settings, client) == []
        with_more = [*others, reply("more", "kept-i2", "other", occurred_at=utc_now())]
        assert summary(replay(settings, client)) == expected(with_more)

    await rebuild(settings)
    assert secrets(settings, client) == []
    assert summary(replay(settings, client)) == expected(with_more)
    # Redis loses everything, and the next joiner reads the topics from their beginnings.
    for key in client.scan_iter(f"{settings.topic_prefix}:*"):
        client.delete(key)
    again = settings.model_copy(update={"joiner_group": f"{settings.topic_prefix}-again"})
    async with joining(again):
        await async_wait_for(lambda: all_committed(again), "the topics")
        await async_wait_for(
            lambda: summary(replay(settings, client)) == expected(with_more), "the other conversation"
        )
        assert secrets(settings, client) == []
    report = audit(await collect(again))
    assert (report.findings, report.counts["forgotten"]) == ([], 2 * len(events) + 1)
    async with ControlFollower(settings) as controls:
        await controls.until_caught_up()
        assert not controls.refused


async def test_a_conversation_that_goes_on_begins_anew(settings: Settings, client: redis.Redis) -> None:
    async with joining(settings):
        await send(settings, talk("c", "old"))
        await async_wait_for(lambda: all_committed(settings), "the first part")
        await forget(settings, "c")
        now = utc_now()
        new = [
            interaction("new", "c", occurred_at=now),
            reply("r", None, "c", occurred_at=now + timedelta(seconds=1)),
        ]
        await send(settings, new)
        await async_wait_for(lambda: replay(settings, client), "the second part")
        await async_wait_for(lambda: all_committed(settings), "the second part")
    assert summary(replay(settings, client)) == {"new": (1, ("r",))}
    assert set(client.hkeys(f"{settings.topic_prefix}:join:{{c}}")) <= {b"v", b"p", b"i:new", b"r:r"}


async def test_a_joiner_that_does_not_confirm_is_named(settings: Settings, client: redis.Redis) -> None:
    old = Heartbeat("joiner@there:1", "joiner", "there", 1, "http://there:1", 0.0, "0", True, {})
    key = f"{settings.topic_prefix}:worker:{old.name}"
    client.set(key, msgspec.json.encode(old), ex=FORGOTTEN_S)
    client.zadd(f"{settings.topic_prefix}:workers", {old.name: utc_now().timestamp()})
    assert (await forget(settings, "c", confirm_s=0.0)).unconfirmed == [old.name]
    client.expire(key, FORGOTTEN_S - 60)  # it is missing: it reads the record when it starts again
    assert (await forget(settings, "c")).unconfirmed == []


async def test_it_does_not_run_during_a_rebuild(settings: Settings) -> None:
    async with async_redis_client(settings) as aio, locked(settings, aio):
        with pytest.raises(UnavailableError, match="rebuild"):
            await forget(settings, "c")


def test_the_command_says_what_remains_and_until_when(settings: Settings) -> None:
    done = here("forget", "--conversation", "c", *flags(settings), "--redis", settings.redis_address)
    assert done.returncode == 0, done.stderr
    topics = Topics.of(settings)
    for topic, days in ((topics.replies, 30), (topics.experiences, 90), (topics.dead_letters, 30)):
        assert f"{topic}: by retention, from {(utc_now() + timedelta(days=days)).date()} on" in done.stdout
    assert "erased from Redis: replay entries: none; joiner state: none" in done.stdout


def test_a_state_forgets_all_up_to_a_time_and_keeps_the_rest() -> None:
    join, conversation, changes = make_join(Settings.load()), Conversation(), Changes()
    for n in range(4):
        event = decode_interaction(interaction(f"i{n}", at_s=10 * n).to_bytes(), store_text=False)
        join.on_interaction(conversation, event, 0.0, changes)
    texts = [reply("r0", "i0", at_s=5), reply("r3", "i3", at_s=40), reply("early", "i3", at_s=5)]
    texts += [reply("w0", "never", at_s=6), reply("w1", "never", at_s=50)]
    for received in join.read([decode_reply(text.to_bytes()) for text in texts]):
        join.on_reply(conversation, received, 0.0, changes)
    conversation.stamp(1)
    loaded = Conversation.load({k.encode(): v for k, v in conversation.fields(whole=True)[0].items()})
    loaded.forget(at(10).timestamp())
    assert set(loaded.interactions) == {"i2", "i3"}
    assert set(loaded.replies) == {"r3", "w1"}
    assert set(loaded.pending) == {"i3"}
    assert [r.id for r in loaded.replies_of(loaded.interactions["i3"])] == ["r3"]
    changed, deleted = loaded.fields()
    assert {"i:i0", "i:i1", "r:r0", "r:early", "r:w0"} == set(deleted)
    assert changed.keys() == {"p"}
    loaded.forget(at(100).timestamp())
    assert loaded.is_empty
    assert loaded.due(1.0) is None
