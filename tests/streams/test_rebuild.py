from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from asyncio.subprocess import DEVNULL
from collections.abc import Iterator, Sequence
from datetime import timedelta

import pytest
import redis

from cortex_core import feedback_collector
from cortex_core.errors import InputError, UnavailableError
from cortex_core.feedback.extractors import Extraction
from cortex_core.feedback_collector import FeedbackSignal, SignalType
from streams.events import Event, InteractionEvent, utc_now
from streams.joiner.rebuild import console_progress, rebuild
from streams.joiner.rebuild_buffers import UNFINISHED_S
from streams.kafka.topics import Topics
from streams.replay_store import RedisReplayBuffer, ReplayKeys, ReplayWrite, decode, index_key, model_ids
from streams.settings import Settings
from streams.testing import async_wait_for, interaction, reply, send, spawn_worker
from tests.streams.kafka_helpers import lag, read_all

pytestmark = pytest.mark.integration
NOW = utc_now()


@pytest.fixture
def settings(settings: Settings) -> Settings:
    group = f"{settings.topic_prefix}-joiner"
    return settings.model_copy(update={"joiner_group": group, "session_timeout_s": 1.0, "join_batch": 20})


@pytest.fixture
def client(settings: Settings) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(settings.redis_address) as it:
        yield it


def events_of(n: int) -> list[Event]:
    """A conversation of a minute or two hours ago: each turn has 0 to 2 replies, half of them without an
    interaction id."""
    rng = random.Random(n)
    start = NOW - timedelta(seconds=rng.choice([60, 7200]))
    events: list[Event] = []
    for turn in range(3):
        at, name = start + timedelta(seconds=10 * turn), f"i{n}-{turn}"
        events.append(interaction(name, f"c{n}", occurred_at=at, model_id=f"m{n % 2}"))
        for k in range(rng.choice([0, 1, 2])):
            names, text = rng.choice([None, name]), rng.choice(["Perfect!", "No, that is wrong.", "What?"])
            occurred_at = at + timedelta(seconds=1 + k)
            events.append(reply(f"r{n}-{turn}-{k}", names, f"c{n}", occurred_at=occurred_at, text=text))
    return events


def buffers(settings: Settings, client: redis.Redis) -> dict[str, list[tuple[str, bytes]]]:
    """The id and JSON of all entries of each model; versions depend on the time of writing."""
    stores = [RedisReplayBuffer.of(settings, model, client) for model in ("m0", "m1")]
    return {
        store.model_id: [(i, decode(value)[1]) for i, value in store.raw_values(store.ids()) if value]
        for store in stores
    }


async def live(settings: Settings, events: list[Event]) -> None:
    """A real joiner processes the events, until all are joined and all due interactions are closed."""
    topics = Topics.of(settings)
    joiner = spawn_worker("joiner", settings).wait_ready()
    await send(settings, [*events, (topics.replies, b"c", b"not json")])

    async def idle() -> bool:
        lags = [await lag(settings, settings.joiner_group, t) for t in (topics.interactions, topics.replies)]
        return lags == [0, 0] and 'outcome="expired"} 0.0' not in joiner.get("/metrics").text

    await async_wait_for(idle, "the joiner", every_s=0.1)
    with redis.Redis.from_url(settings.redis_address) as client:
        due = [f"{settings.topic_prefix}:join-due:{{{p}}}" for p in range(settings.partitions)]
        old = NOW.timestamp() - 100
        await async_wait_for(lambda: not any(client.zcount(key, 0, old) for key in due), "the timer")
    assert joiner.stop() == 0


async def test_a_rebuild_equals_what_live_processing_built(settings: Settings, client: redis.Redis) -> None:
    events = [event for n in range(30) for event in events_of(n)]
    random.Random(0).shuffle(events)
    await live(settings, [*events, *events[:20]])
    built = buffers(settings, client)
    assert all(len(entries) >= 20 for entries in built.values())
    topics = Topics.of(settings)
    published = len(await read_all(settings, topics.experiences))
    keys_before = {k: client.dump(k) for k in client.scan_iter(f"{settings.topic_prefix}:join*")}

    seen: list[tuple[int, int]] = []
    during: list[bool] = []

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        during.append(buffers(settings, client) == built)

    report = await rebuild(settings, progress=progress)
    assert buffers(settings, client) == built
    assert during
    assert all(during), "readers see the old buffer until the swap"
    assert seen[-1] == (len(events) + 21, len(events) + 21)
    assert report.models == {model: len(entries) for model, entries in built.items()}
    assert (report.unreadable, report.rescored) == (1, None)
    assert report.interactions + report.replies == len(events) + 20

    # It changed only the buffers.
    assert len(await read_all(settings, topics.experiences)) == published
    assert await lag(settings, settings.joiner_group, topics.interactions) == 0
    assert {k: client.dump(k) for k in client.scan_iter(f"{settings.topic_prefix}:join*")} == keys_before
    assert not list(client.scan_iter(f"{settings.topic_prefix}:*rebuil*"))
    assert not list(client.scan_iter(f"{settings.topic_prefix}:*changed"))

    # Redis lost all data: the rebuild restores the buffers, and the joiner its own state.
    for key in client.scan_iter(f"{settings.topic_prefix}:*"):
        client.delete(key)
    await rebuild(settings)
    assert buffers(settings, client) == built
    entries = {(model, entry_id) for model, them in built.items() for entry_id, _ in them}
    index = {entry_id: client.get(index_key(settings.topic_prefix, entry_id)) for _, entry_id in entries}
    assert index == {entry_id: model.encode() for model, entry_id in entries}
    assert {client.ttl(ReplayKeys(settings.topic_prefix, model).entries) for model in built} == {-1}
    joiner = spawn_worker("joiner", settings)
    last = max((e for e in events if isinstance(e, InteractionEvent)), key=lambda e: e.occurred_at)
    await send(settings, [reply("after", None, last.conversation_id, occurred_at=NOW)])

    def has_it() -> bool:
        return any(b'"after"' in (value or b"") for _, value in buffers(settings, client)[last.model_id])

    await async_wait_for(has_it, "a reply in a restored conversation")
    assert joiner.stop() == 0


async def test_writes_during_a_rebuild_are_copied_to_the_new_buffer(
    settings: Settings, client: redis.Redis
) -> None:
    interactions = [interaction(f"i{n}", f"c{n}", occurred_at=NOW, model_id="m0") for n in range(50)]
    replies = [reply(f"r{n}", f"i{n}", f"c{n}", occurred_at=NOW) for n in range(50)]
    await send(settings, [*interactions, *replies])
    await rebuild(settings)
    store = RedisReplayBuffer.of(settings, "m0", client)
    assert len(store) == 50
    [(_, value)] = store.raw_values(["i7"])
    assert value is not None
    late_model = RedisReplayBuffer.of(settings, "m1", client)
    done: list[int] = []

    def write_as_a_joiner(count: int, _total: int) -> None:
        if not done:
            at = NOW.timestamp()
            writes = [ReplayWrite("i7", at, 5, value[2:]), ReplayWrite("new", at + 1, 1, value[2:])]
            store.write([*writes, ReplayWrite("i8", at, 6, b"")])
            late_model.write([ReplayWrite("first", at, 1, value[2:])])
        done.append(count)

    await rebuild(settings, progress=write_as_a_joiner)
    raw = dict(store.raw_values(store.ids()))
    assert raw["i7"] == b"5" + value[1:]
    assert raw["new"] == b"1" + value[1:]
    assert "i8" not in raw
    assert len(raw) == 50
    assert late_model.ids() == ["first"]


async def test_a_rebuild_from_a_point_in_time_and_of_one_model(
    settings: Settings, client: redis.Redis
) -> None:
    pairs: list[Event] = []
    for n in range(20):
        at = NOW - timedelta(seconds=1000 - 10 * n)
        pairs.append(interaction(f"i{n:02d}", f"c{n}", occurred_at=at, model_id=f"m{n % 2}"))
        pairs.append(reply(f"r{n}", None, f"c{n}", occurred_at=at + timedelta(seconds=1)))
    await send(settings, pairs)
    await rebuild(settings, model_id="m0")
    got = buffers(settings, client)
    assert [i for i, _ in got["m0"]] == [f"i{n:02d}" for n in range(0, 20, 2)]
    assert got["m1"] == []
    await rebuild(settings, since=NOW - timedelta(seconds=1000 - 100))
    got = buffers(settings, client)
    assert [i for i, _ in got["m0"]] == [f"i{n:02d}" for n in range(10, 20, 2)]
    assert [i for i, _ in got["m1"]] == [f"i{n:02d}" for n in range(11, 20, 2)]


async def test_an_unknown_model_is_an_error_and_a_known_one_without_events_stays(
    settings: Settings, client: redis.Redis
) -> None:
    await send(settings, [interaction("i1", model_id="m1"), reply("r1", "i1")])
    old = RedisReplayBuffer.of(settings, "m0", client)
    old.write([ReplayWrite("old", 1.0, 1, b"{}")])
    with pytest.raises(InputError, match="no interaction of 'nope'; models are: m0"):
        await rebuild(settings, model_id="nope")
    assert model_ids(client, settings.topic_prefix) == ["m0"]
    assert (await rebuild(settings, model_id="m0")).untouched == ["m0"]
    assert old.ids() == ["old"]
    assert (await rebuild(settings, model_id="m1")).models == {"m1": 1}


async def test_another_extractor_changes_the_rewards(
    settings: Settings, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    def grumpy(texts: Sequence[str], embeddings: object, *, evidence: bool) -> list[Extraction]:
        return [Extraction([FeedbackSignal.of(SignalType.NEGATIVE, 0.0, text)], 0.9) for text in texts]

    monkeypatch.setitem(feedback_collector.EXTRACTORS, "grumpy-1", lambda: grumpy)
    await send(
        settings,
        [
            *(interaction(f"i{n}", f"c{n}", occurred_at=NOW, model_id="m0") for n in range(4)),
            *(
                reply(f"r{n}", f"i{n}", f"c{n}", occurred_at=NOW, text=text)
                for n, text in enumerate(["Perfect, thanks!", "That's wrong.", "Great, that worked!"])
            ),
            reply("r3", "i3", "c3", occurred_at=NOW, kind="rating", rating=0.25, text=""),
        ],
    )
    await rebuild(settings)
    store = RedisReplayBuffer.of(settings, "m0", client)
    before = {e.id: e.reward for e in store.entries()}
    report = await rebuild(settings, extractor="grumpy-1")
    after = {e.id: e.reward for e in store.entries()}
    assert after == {"i0": -0.5, "i1": -0.5, "i2": -0.5, "i3": 0.25}
    changed = [after[i] - before[i] for i in after if after[i] != before[i]]
    assert report.rescored is not None
    assert (report.rescored.compared, report.rescored.changed) == (4, len(changed))
    assert report.rescored.sign_flips == 2
    assert report.rescored.mean_change == pytest.approx(sum(changed) / len(changed))


async def test_a_second_rebuild_is_refused_and_a_model_without_events_keeps_its_buffer(
    settings: Settings, client: redis.Redis, capsys: pytest.CaptureFixture[str]
) -> None:
    client.set(f"{settings.topic_prefix}:rebuilding", "another", ex=60)
    with pytest.raises(UnavailableError, match="another rebuild"):
        await rebuild(settings)
    client.delete(f"{settings.topic_prefix}:rebuilding")
    RedisReplayBuffer.of(settings, "m0", client).write([ReplayWrite("old", 1.0, 1, b"{}")])
    with console_progress() as progress:
        report = await rebuild(settings, progress=progress)
    assert (report.models, report.untouched) == ({}, ["m0"])
    assert buffers(settings, client)["m0"] == [("old", b"{}")]
    assert "rebuilding" in capsys.readouterr().out


async def test_a_rebuild_that_is_killed_leaves_what_expires(settings: Settings, client: redis.Redis) -> None:
    """With -9 it cannot clean up; with SIGTERM it does, and the next one need not wait for its lock."""
    events = [interaction(f"i{n}", f"c{n}", occurred_at=NOW, model_id=f"m{n % 2}") for n in range(20)]
    await send(settings, [*events, *(reply(f"r{n}", f"i{n}", f"c{n}", occurred_at=NOW) for n in range(20))])
    unfinished, lock = f"{settings.topic_prefix}:replay:*:rebuild:*", f"{settings.topic_prefix}:rebuilding"

    class Killed(BaseException):
        """Ends a rebuild at once."""

    def kill(_done: int, _total: int) -> None:
        left.extend((key, client.ttl(key)) for key in client.scan_iter(unfinished))
        if left:
            raise Killed

    left: list[tuple[bytes, object]] = []
    with pytest.raises(Killed):
        await rebuild(settings, progress=kill)
    assert all(0 < life <= UNFINISHED_S for _, life in left)  # type: ignore[operator]  # redis-py's type

    command = [sys.executable, "-m", "streams.cli", "rebuild", "--from", "beginning"]
    env = os.environ | settings.environment()
    process = await asyncio.create_subprocess_exec(*command, env=env, stdout=DEVNULL, stderr=DEVNULL)
    await async_wait_for(lambda: client.exists(lock), "the lock", every_s=0.001)
    process.send_signal(signal.SIGTERM)
    assert await process.wait() in (0, 128 + signal.SIGTERM)
    assert not client.exists(lock)
    assert not list(client.scan_iter(unfinished))
