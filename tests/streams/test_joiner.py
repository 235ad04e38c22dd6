from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import redis
from aiokafka import AIOKafkaConsumer
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.errors import GroupCoordinatorNotAvailableError

from streams.events import DeadLetter, ExperienceEvent, InteractionEvent, ReplyEvent, parse, utc_now
from streams.kafka.topics import Topics
from streams.replay_store import RedisReplayBuffer
from streams.settings import Settings
from streams.testing import WorkerProcess, async_wait_for, interaction, reply, send, spawn_worker
from tests.streams.kafka_helpers import lag, read_all

pytestmark = pytest.mark.integration


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """With a group of its own and quick rebalances."""
    group = f"{settings.topic_prefix}-joiner"
    return settings.model_copy(update={"joiner_group": group, "session_timeout_s": 1.0})


@pytest.fixture
def client(settings: Settings) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(settings.redis_address) as it:
        yield it


def replay(settings: Settings, client: redis.Redis) -> dict[str, ExperienceEvent]:
    store = RedisReplayBuffer.of(settings, "default", client)
    return {
        entry_id: parse(ExperienceEvent, value.partition(b"\n")[2])
        for entry_id, value in store.raw_values(store.ids())
        if value is not None
    }


async def all_committed(settings: Settings) -> bool:
    """Whether the joiners have committed everything sent so far."""
    topics = Topics.of(settings)
    await asyncio.sleep(0.1)  # asking costs more than what is asked about
    try:
        lags = [await lag(settings, settings.joiner_group, t) for t in (topics.interactions, topics.replies)]
    except GroupCoordinatorNotAvailableError:  # the first group on a new broker
        return False
    return lags == [0, 0]


def metric(worker: WorkerProcess, name: str, **labels: str) -> float:
    wanted = "".join(f'{k}="{v}"' for k, v in labels.items())
    lines = worker.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name) and wanted in line)


def outcome(worker: WorkerProcess, name: str) -> float:
    return metric(worker, "cortex_joiner_outcomes_total", outcome=name)


def conversation(n: int, turns: int = 3, *, named: bool = False) -> list[InteractionEvent | ReplyEvent]:
    """Turns of one conversation that just took place: named replies, unnamed ones, amendments, silence."""
    rng, start = random.Random(n), utc_now() - timedelta(seconds=60)
    events: list[InteractionEvent | ReplyEvent] = []
    for turn in range(turns):
        at = start + timedelta(seconds=10 * turn)
        events.append(interaction(f"i{n}-{turn}", f"c{n}", occurred_at=at))
        for k in range(rng.choice([0, 1, 1, 2])):
            names = f"i{n}-{turn}" if named else rng.choice([None, f"i{n}-{turn}"])
            rating = {"kind": "rating", "rating": rng.choice([-1.0, 0.5]), "text": ""}
            changes: dict[str, Any] = rng.choice(
                [rating, {"text": rng.choice(["Perfect!", "No, I meant B"])}]
            )
            occurred_at = at + timedelta(seconds=1 + k)
            events.append(reply(f"r{n}-{turn}-{k}", names, f"c{n}", occurred_at=occurred_at, **changes))
    return events


def expected(events: list[InteractionEvent | ReplyEvent]) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Revision and reply ids of each answered interaction, worked out from the rules by brute force."""
    interactions = [e for e in events if isinstance(e, InteractionEvent)]
    got: dict[str, set[tuple[Any, str]]] = {}
    for r in (e for e in events if isinstance(e, ReplyEvent)):
        before = [
            i
            for i in interactions
            if i.conversation_id == r.conversation_id and i.occurred_at < r.occurred_at
        ]
        target = r.interaction_id or max(before, key=lambda i: i.occurred_at).interaction_id
        got.setdefault(target, set()).add((r.occurred_at, r.reply_id))
    return {i: (len(rs), tuple(reply_id for _, reply_id in sorted(rs))) for i, rs in got.items()}


def summary(experiences: dict[str, ExperienceEvent]) -> dict[str, tuple[int, tuple[str, ...]]]:
    return {i: (e.revision, tuple(e.reply_ids)) for i, e in experiences.items()}


def check_published(records: list[Any], wanted: dict[str, ExperienceEvent], moves: bool = False) -> None:
    """What was published last about each interaction is what replay holds, to the byte.

    Args:
        moves: whether replies may have moved from one interaction to another; else the same
            (id, revision) must be the same bytes wherever it stands.
    """
    values: dict[tuple[str, int], bytes] = {}
    last: dict[str, bytes] = {}
    for record in records:
        event = parse(ExperienceEvent, record.value)
        key = (event.interaction.interaction_id, event.revision)
        assert moves or values.setdefault(key, record.value) == record.value
        assert record.key == event.interaction.model_id.encode()
        last[key[0]] = event.to_bytes()
        if moves and not event.revision and key[0] not in wanted:
            del last[key[0]]  # its one reply was another's: it is open again, and replay has it no more
    assert last == {i: e.to_bytes() for i, e in wanted.items()}


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
    await async_wait_for(lambda: replay(settings, client), 20, "the first experience")
    await send(settings, [reply("r2", occurred_at=now + timedelta(seconds=2), text="No, that is wrong!")])
    await async_wait_for(lambda: replay(settings, client)["i1"].revision == 2, 20, "the amendment")
    await async_wait_for(lambda: all_committed(settings), 20, "the commit")

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
    await async_wait_for(lambda: replay(settings, client), 20, "the window to close")
    assert [(e.revision, e.outcome) for e in replay(settings, client).values()] == [(0, "no_reply")]
    await async_wait_for(lambda: outcome(joiner, "orphans") == 1, 20, "the orphan")
    await send(settings, [reply("late", "i1", occurred_at=utc_now() + timedelta(seconds=1))])
    await async_wait_for(lambda: replay(settings, client)["i1"].revision == 1, 20, "the late amendment")
    await async_wait_for(lambda: outcome(joiner, "late") == 1, 20, "the count")
    await async_wait_for(lambda: all_committed(settings), 20, "the commit")
    check_published(await read_all(settings, Topics.of(settings).experiences), replay(settings, client))
    join_keys = client.keys(f"{settings.topic_prefix}:join:*")
    assert len(join_keys) == 1
    assert client.pttl(join_keys[0]) > 0, "a conversation with nothing open expires"


async def test_kill_9_in_the_middle_loses_nothing_and_doubles_nothing(
    settings: Settings, client: redis.Redis
) -> None:
    events = [event for n in range(80) for event in conversation(n, named=True)]
    random.Random(1).shuffle(events)
    wanted = expected(events)
    joiner = spawn_worker("joiner", settings, join_batch=7).wait_ready()
    for half in (events[::2], events[1::2]):
        await send(settings, half)
        seen = len(replay(settings, client))
        await async_wait_for(
            lambda seen=seen: len(replay(settings, client)) > seen + 5,  # type: ignore[misc]
            30,
            "progress",
        )
        joiner.kill()
        joiner = spawn_worker("joiner", settings, join_batch=7)
    await async_wait_for(lambda: all_committed(settings), 60, "all to be joined")
    got = replay(settings, client)
    assert summary(got) == wanted
    check_published(await read_all(settings, Topics.of(settings).experiences), got)
    assert joiner.stop() == 0


async def test_two_joiners_share_and_one_takes_over_when_the_other_is_killed(
    settings: Settings, client: redis.Redis
) -> None:
    first, second = (
        spawn_worker("joiner", settings),
        spawn_worker("joiner", settings),
    )
    first.wait_ready()
    second.wait_ready()

    def lags(worker: WorkerProcess) -> set[str]:
        lines = worker.get("/metrics").text.splitlines()
        return {line.split("}")[0] for line in lines if line.startswith("cortex_joiner_lag{")}

    # One partition of both topics each.
    await async_wait_for(
        lambda: len(lags(first)) == len(lags(second)) == 2, 30, "the partitions to be shared"
    )
    assert not lags(first) & lags(second)
    events = [event for n in range(60) for event in conversation(n, turns=2)]
    half = len(events) // 2
    await send(settings, events[:half])
    first.kill()
    await send(settings, events[half:])
    await async_wait_for(lambda: all_committed(settings), 60, "the other to take over")
    assert second.alive
    got = replay(settings, client)
    assert summary(got) == expected(events)
    check_published(await read_all(settings, Topics.of(settings).experiences), got, moves=True)


async def test_rebalances_in_the_middle_lose_nothing(settings: Settings, client: redis.Redis) -> None:
    topics = Topics.of(settings)
    joiner = spawn_worker("joiner", settings, join_batch=5).wait_ready()
    events = [event for n in range(60) for event in conversation(n, named=True)]
    parts = [events[n::5] for n in range(5)]
    for part in parts:
        # Another member takes half of the partitions for a moment, and commits nothing.
        guest = AIOKafkaConsumer(
            topics.interactions,
            topics.replies,
            bootstrap_servers=settings.kafka_address,
            group_id=settings.joiner_group,
            partition_assignment_strategy=[RangePartitionAssignor],
            enable_auto_commit=False,
            heartbeat_interval_ms=200,
        )
        sending = asyncio.create_task(send(settings, part))
        await guest.start()
        await async_wait_for(guest.assignment, 20, "the guest's share")
        await sending
        await guest.stop()
    await async_wait_for(lambda: all_committed(settings), 60, "all to be joined")
    got = replay(settings, client)
    assert summary(got) == expected(events)
    check_published(await read_all(settings, topics.experiences), got)
    assert joiner.stop() == 0


async def test_it_waits_for_redis_says_so_and_skips_nothing(settings: Settings, client: redis.Redis) -> None:
    joiner = spawn_worker("joiner", settings).wait_ready()
    await send(settings, conversation(1))
    await async_wait_for(lambda: all_committed(settings), 30, "the first events")
    wanted = expected(conversation(1) + conversation(2))
    client.config_set("maxmemory", "1")  # every write is refused from here on
    try:
        await send(settings, conversation(2))
        body = await async_wait_for(
            lambda: (r := joiner.get("/readyz")).status_code == 503 and r.json(), 20, "/readyz to say no"
        )
        assert settings.redis_shown in body["missing"]["redis"]
        assert not await all_committed(settings)
    finally:
        client.config_set("maxmemory", "0")
    await async_wait_for(lambda: all_committed(settings), 30, "the rest")
    joiner.wait_ready()
    assert summary(replay(settings, client)) == wanted


async def test_faust_s_own_command_runs_it_too(settings: Settings, client: redis.Redis) -> None:
    worker = FaustWorker(settings)
    try:
        await send(settings, conversation(3))
        await async_wait_for(lambda: all_committed(settings), 30, "the events to be joined")
        assert summary(replay(settings, client)) == expected(conversation(3))
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(15) == 0, worker.log.read_text()
    finally:
        worker.process.kill()
        worker.process.wait()


class FaustWorker:
    """`faust -A streams.joiner worker` as a process."""

    def __init__(self, settings: Settings) -> None:
        self.log = settings.data / "faust.log"
        command = [sys.executable, "-m", "faust", "-A", "streams.joiner", "worker", "--without-web"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env=os.environ | settings.environment() | {"CORTEX_PORT": "0"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
