"""A batch of records: retried until its offsets are committed, or dropped.

    async for attempt in batch.attempts():
        async with attempt as part:
            ...                     # the effects of part.records; all of them are idempotent
            await part.commit()

An attempt that fails because Redis or Kafka is unavailable is retried with backoff. After any other failure,
the records are retried one by one, so that one record cannot block the others; a record that fails alone
becomes a dead letter. A batch is dropped if its partitions are revoked before an attempt begins, or if the
attempt does not end in time after that: the next owner of the partitions reads it again. It is also dropped
if Redis has lost effects (`WritesLost`), and read again after the events of these.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog
from aiokafka import TopicPartition
from aiokafka.errors import CommitFailedError, IllegalStateError

from cortex_core.errors import UnavailableError
from streams.connections import backoff, explain
from streams.events import DeadLetter
from streams.failures import is_redis
from streams.joiner.metrics import BATCH_S, RETRIES
from streams.kafka.dead_letters import dead_letter
from streams.settings import Settings

log = structlog.get_logger(__name__)

REVOKED = (CommitFailedError, IllegalStateError)
"""Errors of a commit whose partitions have another owner by now."""


Generation = tuple[int, int]
"""The number of changes of a consumer's assignment, and of its rewinds after `WritesLost`, so far."""


class Owner(Protocol):
    """The consumer that fetched a batch and commits its offsets."""

    settings: Settings

    def owns(self, batch: Batch) -> bool:
        """Whether an attempt at the batch may begin."""

    def attempt_begins(self, limit: asyncio.Timeout) -> None:
        """Called when an attempt begins. Reschedule `limit` to give the attempt a deadline."""

    def attempt_ended(self, batch: Batch, error: Exception | None) -> None:
        """Called when an attempt has ended, with its error."""

    def unavailable(self, server: str, reason: str) -> None:
        """Called when the batch waits for "kafka" or "redis"."""

    async def commit_done(self, part: Part) -> None:
        """Commits the offsets of a part whose effects are done.

        Raises:
            CommitFailedError, IllegalStateError: the partitions have another owner (`REVOKED`).
            WritesLost: Redis has lost effects; nothing was committed.
        """


@dataclass(slots=True, eq=False)
class Part:
    """Records that are processed together: a whole batch, or one record."""

    batch: Batch
    records: Sequence[Any]
    """aiokafka records: interactions first, so that fewer replies have to wait, then by offset."""
    refused: str | None = None
    """The reason why its only record becomes a dead letter without another attempt to join it."""
    dead_letters: list[DeadLetter] = field(default_factory=list)
    error: Exception | None = None
    """The error of the last attempt."""

    @property
    def offsets(self) -> dict[TopicPartition, int]:
        """The offsets after its records."""
        return {TopicPartition(r.topic, r.partition): r.offset + 1 for r in self.records}

    @property
    def readable(self) -> Sequence[Any]:
        """The records to join."""
        return () if self.refused else self.records

    def refuse(self, record: Any, reason: str) -> None:
        """Adds a dead letter for a record that cannot be joined, unless it was published before."""
        if not self.batch.is_published(record):
            self.dead_letters.append(dead_letter(record, reason))

    async def commit(self) -> None:
        """Commits the offsets after its records. Call it when all their effects are done."""
        await self.batch.owner.commit_done(self)


@dataclass(slots=True, eq=False)
class Batch:
    """The records of one fetch."""

    owner: Owner
    generation: Generation
    """The generation in which it was fetched."""
    records: Sequence[Any]
    event_time: Mapping[int, float]
    """Of each partition, Unix seconds: all events sent before are in this batch or an earlier one. Without
    partitions whose events before `published` are not all read."""
    published: Mapping[TopicPartition, int] = field(default_factory=dict)
    """Of each partition: what follows from the events before this offset was published."""
    done: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the batch is committed or dropped."""

    def is_published(self, record: Any) -> bool:
        """Whether what follows from this record was published, and only Redis has lost it."""
        published = self.published.get(TopicPartition(record.topic, record.partition), 0)
        return bool(record.offset < published)

    async def attempts(self) -> AsyncIterator[AbstractAsyncContextManager[Part]]:
        """Yields attempts, one after another, until all records are committed or the batch is dropped.

        Raises:
            ConfigError: a server refuses the configuration.
            Exception: publishing a dead letter failed, and the error is not transient.
        """
        parts = deque([Part(self, self.records)])
        try:
            with BATCH_S.time():
                while parts:
                    part = parts.popleft()
                    async for _ in backoff():
                        if not self.owner.owns(self):
                            return
                        yield self._attempt(part)
                        if part.error is None or not await self._should_retry(part.error):
                            break
                    if part.error is None:
                        continue
                    if part.refused:
                        raise part.error
                    if len(part.records) > 1:
                        log.warning("batch failed; retrying its records one by one", error=str(part.error))
                        parts.extend(Part(self, [record]) for record in part.records)
                    else:
                        log.error("record failed", exc_info=part.error)
                        reason = f"joining it failed: {type(part.error).__name__}: {part.error}"
                        parts.appendleft(Part(self, part.records, refused=reason))
        finally:
            self.done.set()

    @contextlib.asynccontextmanager
    async def _attempt(self, part: Part) -> AsyncIterator[Part]:
        part.error, part.dead_letters = None, []
        if part.refused:
            part.refuse(part.records[0], part.refused)
        try:
            async with asyncio.timeout(None) as limit:
                self.owner.attempt_begins(limit)
                yield part
        except Exception as error:
            part.error = error
        finally:
            self.owner.attempt_ended(self, part.error)

    async def _should_retry(self, error: Exception) -> bool:
        """Whether to retry the same records: a server is unavailable. Also if the partitions were revoked:
        then `attempts` drops the batch."""
        if not self.owner.owns(self):
            log.info("batch dropped; it will be read again", why=repr(error))
            return True
        meaning = await explain(error, self.owner.settings)
        if meaning is None:
            return False
        if not isinstance(meaning, UnavailableError):
            raise meaning from error
        RETRIES.inc()
        log.warning("retrying", why=str(meaning))
        self.owner.unavailable("redis" if is_redis(error) else "kafka", str(meaning))
        return True
