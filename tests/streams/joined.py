"""Experiences of joiners, and those that a brute-force join expects."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import redis
from aiokafka import AIOKafkaConsumer
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.errors import GroupCoordinatorNotAvailableError

from streams.events import ExperienceEvent, InteractionEvent, ReplyEvent, parse, utc_now, version_of
from streams.joiner.app import JoinerApp, create_app
from streams.kafka.clients import started
from streams.kafka.topics import Topics
from streams.replay_store import RedisReplayBuffer
from streams.settings import Settings
from streams.testing import WorkerProcess, async_wait_for, interaction, reply
from streams.worker import Worker
from tests.streams.kafka_helpers import lag

Events = Sequence[InteractionEvent | ReplyEvent]
Summary = dict[str, tuple[int, tuple[str, ...]]]
"""Revision and reply ids, in order, of each interaction with replies."""


def conversation(n: int, turns: int = 3, *, named: bool = False) -> list[InteractionEvent | ReplyEvent]:
    """Events of a recent conversation: each turn has 0 to 2 replies, which are texts or ratings.

    Args:
        named: every reply has an interaction id; else half of them have none, and their interaction depends
            on the events that have arrived.
    """
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


def expected(events: Events) -> Summary:
    """The experiences with replies, by brute force."""
    interactions = [e for e in events if isinstance(e, InteractionEvent)]
    by_conversation: dict[str, list[InteractionEvent]] = {}
    for i in interactions:
        by_conversation.setdefault(i.conversation_id, []).append(i)
    got: dict[str, set[tuple[Any, str]]] = {}
    for r in (e for e in events if isinstance(e, ReplyEvent)):
        before = [i for i in by_conversation.get(r.conversation_id, ()) if i.occurred_at < r.occurred_at]
        if r.interaction_id is not None:
            before = [i for i in before if i.interaction_id == r.interaction_id]
        if before:  # else the reply waits
            target = max(before, key=lambda i: i.occurred_at).interaction_id
            got.setdefault(target, set()).add((r.occurred_at, r.reply_id))
    return {i: (len(rs), tuple(reply_id for _, reply_id in sorted(rs))) for i, rs in got.items()}


def replay(settings: Settings, client: redis.Redis) -> dict[str, ExperienceEvent]:
    store = RedisReplayBuffer.of(settings, "default", client)
    return {
        entry_id: parse(ExperienceEvent, value.partition(b"\n")[2])
        for entry_id, value in store.raw_values(store.ids())
        if value is not None
    }


def summary(experiences: Mapping[str, ExperienceEvent]) -> Summary:
    return {i: (e.revision, tuple(e.reply_ids)) for i, e in experiences.items()}


@dataclass(frozen=True)
class Difference:
    """The differences between experiences and those of the brute-force join."""

    lost: int
    """Replies missing from their experience."""
    doubled: int
    """Replies repeated in an experience or in a wrong one."""

    @classmethod
    def of(cls, got: Summary, wanted: Summary) -> Difference:
        have = Counter((i, r) for i, (_, replies) in got.items() for r in replies)
        want = Counter((i, r) for i, (_, replies) in wanted.items() for r in replies)
        return cls((want - have).total(), (have - want).total())


def check_published(records: Iterable[Any], wanted: Mapping[str, ExperienceEvent]) -> None:
    """Asserts that the highest version in the topic equals replay, and that all records of an (id, version)
    have the same bytes."""
    assert wrongly_published(records, wanted) == set()


def wrongly_published(records: Iterable[Any], wanted: Mapping[str, ExperienceEvent]) -> set[str]:
    """Interaction ids whose record in the topic differs from replay, or whose versions are ambiguous."""
    values: dict[str, dict[int, set[bytes]]] = {}
    for record in records:
        event = parse(ExperienceEvent, record.value)
        assert record.key == event.interaction.model_id.encode()
        versions = values.setdefault(event.interaction.interaction_id, {})
        versions.setdefault(version_of(record.headers, event.revision), set()).add(event.to_bytes())
    wrong = {i for i, versions in values.items() if max(map(len, versions.values())) > 1}
    # Open without a reply, because its reply moved to another interaction: replay has no entry.
    newest = {i: min(versions[max(versions)]) for i, versions in values.items()}
    newest = {i: v for i, v in newest.items() if i in wanted or parse(ExperienceEvent, v).reply_ids}
    right = {i: event.to_bytes() for i, event in wanted.items()}
    return wrong | {i for i in newest.keys() | right.keys() if newest.get(i) != right.get(i)}


@contextlib.asynccontextmanager
async def joining(settings: Settings, **changes: Any) -> AsyncIterator[JoinerApp]:
    """A joiner in this process, which starts in a tenth of the time of a separate process."""
    settings = settings.model_copy(update=changes)
    app = create_app(settings, Worker("joiner", settings))
    await app.start()
    try:
        yield app
    finally:
        await app.stop()


@contextlib.asynccontextmanager
async def other_member(settings: Settings) -> AsyncIterator[AIOKafkaConsumer]:
    """Another member of the joiners' group that owns some partitions and commits nothing."""
    topics = Topics.of(settings)
    consumer = AIOKafkaConsumer(
        topics.interactions,
        topics.replies,
        bootstrap_servers=settings.kafka_address,
        group_id=settings.joiner_group,
        partition_assignment_strategy=[RangePartitionAssignor],
        enable_auto_commit=False,
        heartbeat_interval_ms=200,
    )
    async with started(consumer):
        await async_wait_for(consumer.assignment, "the other member's assignment")
        yield consumer


def partitions(joiner: WorkerProcess) -> set[tuple[str, str]]:
    """The (topic, partition) pairs that a joiner owns, from its metric for the lag."""
    lag_series = r'^cortex_joiner_lag{partition="(.*?)",topic="(.*?)"}'
    found = re.findall(lag_series, joiner.get("/metrics").text, re.M)
    return {(topic, partition) for partition, topic in found}


def quick(settings: Settings) -> Settings:
    """Settings with a session timeout of a second: a killed joiner's partitions are reassigned soon."""
    return settings.model_copy(update={"session_timeout_s": 1.0})


async def all_committed(settings: Settings) -> bool:
    """Whether the joiners have committed everything sent so far."""
    topics = Topics.of(settings)
    await asyncio.sleep(0.1)  # limits the load of these queries
    try:
        lags = [await lag(settings, settings.joiner_group, t) for t in (topics.interactions, topics.replies)]
    except GroupCoordinatorNotAvailableError:  # a new broker, before its first group
        return False
    return lags == [0, 0]
