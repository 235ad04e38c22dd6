"""Attempts at a batch, without Kafka: retried, split, failed, dropped."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import redis
from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.errors import CommitFailedError, NotLeaderForPartitionError

from cortex_core.errors import ConfigError
from streams.events import DeadLetter
from streams.joiner.batch import Batch, Part
from streams.settings import Settings

SETTINGS = Settings.load(kafka="127.0.0.1:1", redis_url="redis://127.0.0.1:1/0")


def record(topic: str, offset: int) -> ConsumerRecord[bytes, bytes]:
    return ConsumerRecord(topic, 0, offset, 1000, 0, b"key", b"value", None, 0, 0, ())


RECORDS = [record("interactions", 7), record("interactions", 8), record("replies", 3)]


@dataclass
class Group:
    """A fake consumer that records the calls."""

    settings: Settings = SETTINGS
    owned: bool = True
    committed: list[dict[TopicPartition, int]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    limit: asyncio.Timeout | None = None

    def owns(self, batch: Batch) -> bool:
        return self.owned

    def attempt_begins(self, limit: asyncio.Timeout) -> None:
        self.limit = limit

    def attempt_ended(self, batch: Batch, error: Exception | None) -> None:
        self.limit = None
        self.owned = self.owned and not isinstance(error, CommitFailedError)

    def unavailable(self, server: str, reason: str) -> None:
        self.missing.append(server)

    async def commit_done(self, part: Part) -> None:
        self.committed.append(part.offsets)


async def handle(group: Group, work: Callable[[Part], None]) -> Batch:
    """An agent with the effects `work`."""
    batch = Batch(group, (0, 0), RECORDS, {})
    async for attempt in batch.attempts():
        async with attempt as part:
            work(part)
            await asyncio.sleep(0)
            await part.commit()
    return batch


async def test_exactly_the_processed_records_are_committed() -> None:
    group = Group()
    seen: list[list[int]] = []
    batch = await handle(group, lambda part: seen.append([r.offset for r in part.readable]))
    assert seen == [[7, 8, 3]]
    assert group.committed == [{TopicPartition("interactions", 0): 9, TopicPartition("replies", 0): 4}]
    assert batch.done.is_set()


@pytest.mark.parametrize(
    ("error", "server"),
    [(redis.ConnectionError("refused"), "redis"), (NotLeaderForPartitionError(), "kafka")],
)
async def test_while_a_server_is_unavailable_the_whole_batch_is_retried(
    error: Exception, server: str
) -> None:
    group, failures = Group(), [error, error]

    def work(part: Part) -> None:
        assert len(part.records) == 3
        if failures:
            raise failures.pop()

    await handle(group, work)
    assert group.missing == [server, server]
    assert len(group.committed) == 1


async def test_a_record_that_makes_a_batch_fail_becomes_a_dead_letter_and_the_others_are_joined() -> None:
    group = Group()
    joined: list[int] = []
    letters: list[DeadLetter] = []

    def work(part: Part) -> None:
        if any(r.offset == 8 for r in part.readable):
            raise ValueError("this one")
        joined.extend(r.offset for r in part.readable)
        letters.extend(part.dead_letters)

    await handle(group, work)
    assert joined == [7, 3]
    assert [(letter.offset, letter.reason) for letter in letters] == [
        (8, "joining it failed: ValueError: this one")
    ]
    first, second = TopicPartition("interactions", 0), TopicPartition("replies", 0)
    assert group.committed == [{first: 8}, {first: 9}, {second: 4}]


async def test_a_record_whose_dead_letter_fails_too_ends_the_agent_without_a_commit() -> None:
    group = Group()

    def work(part: Part) -> None:
        raise ValueError("nothing works")

    with pytest.raises(ValueError, match="nothing works"):
        await handle(group, work)
    assert not group.committed


async def test_a_refused_configuration_ends_the_agent_without_a_commit() -> None:
    group = Group()

    def work(part: Part) -> None:
        raise redis.AuthenticationError("invalid password")

    with pytest.raises(ConfigError, match="CORTEX_REDIS_URL"):
        await handle(group, work)
    assert not group.committed


async def test_a_batch_whose_partitions_are_revoked_before_an_attempt_is_dropped() -> None:
    group = Group(owned=False)
    batch = await handle(group, lambda part: pytest.fail("an attempt began"))
    assert batch.done.is_set()
    assert not group.committed


async def test_a_batch_whose_attempt_exceeds_its_deadline_is_dropped() -> None:
    group = Group()
    batch = Batch(group, (0, 0), RECORDS, {})
    async for attempt in batch.attempts():
        async with attempt as part:
            assert group.limit is not None
            group.owned = False  # revoked
            group.limit.reschedule(asyncio.get_running_loop().time())
            await asyncio.Event().wait()
            await part.commit()
    assert batch.done.is_set()
    assert not group.committed


async def test_a_commit_that_the_group_refuses_drops_the_batch() -> None:
    group = Group()

    def work(part: Part) -> None:
        raise CommitFailedError("the group has rebalanced")

    batch = await handle(group, work)
    assert batch.done.is_set()
    assert not group.committed
