"""A batch on its way through the agent: tried until its offsets are committed, or dropped.

    async for attempt in batch.attempts():
        async with attempt as part:
            ...                     # the effects of part.records, all of them repeatable
            await part.commit()

An attempt that fails while Redis or Kafka are unavailable is repeated, with backoff. One that fails for
another reason is repeated record by record, so that one record cannot hold up the others; a record that fails
alone becomes a dead letter. A batch is dropped when its partitions were revoked before an attempt began, or
before it ended in time: whoever owns the partitions next reads it again.
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
"""What committing raises when the partitions are another member's by now."""


class Owner(Protocol):
    """Whoever fetched a batch, and commits its offsets."""

    settings: Settings

    def owns(self, batch: Batch) -> bool:
        """Whether an attempt at the batch may begin."""

    def attempt_begins(self, limit: asyncio.Timeout) -> None:
        """An attempt begins; rescheduling `limit` ends it."""

    def attempt_ended(self, batch: Batch, error: Exception | None) -> None:
        """An attempt at the batch has ended, with this error."""

    def unavailable(self, server: str, why: str) -> None:
        """The batch waits for "kafka" or "redis"."""

    async def commit_done(self, offsets: Mapping[TopicPartition, int]) -> None:
        """Commits offsets whose effects are all done; raises one of `REVOKED`."""


@dataclass(slots=True, eq=False)
class Part:
    """Records that are handled together: all of a batch, or a single one."""

    batch: Batch
    records: Sequence[Any]
    """aiokafka's; interactions first, so that fewer replies have to wait, then in the order of offsets."""
    refused: str | None = None
    """Why its one record goes to the dead letters unread."""
    dead_letters: list[DeadLetter] = field(default_factory=list)
    error: Exception | None = None
    """How the last attempt ended."""

    @property
    def readable(self) -> Sequence[Any]:
        """The records to read."""
        return () if self.refused else self.records

    def refuse(self, record: Any, reason: str) -> None:
        """Makes a dead letter of a record that cannot be joined."""
        self.dead_letters.append(dead_letter(record, reason))

    async def commit(self) -> None:
        """Commits the offsets behind its records: call it when all their effects are done."""
        await self.batch.owner.commit_done(
            {TopicPartition(r.topic, r.partition): r.offset + 1 for r in self.records}
        )


@dataclass(slots=True, eq=False)
class Batch:
    """The records of one fetch."""

    owner: Owner
    generation: int
    """Of the assignment that it was fetched under."""
    records: Sequence[Any]
    event_time: Mapping[int, float]
    """For each partition: all that was sent before this (Unix seconds) is in this batch or an earlier one."""
    done: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it was committed or dropped."""

    async def attempts(self) -> AsyncIterator[AbstractAsyncContextManager[Part]]:
        """Attempts at its records, one after the other, until all are committed or the batch is dropped.

        Raises:
            ConfigError: a server refuses this configuration.
            Exception: a dead letter cannot be written, for a reason of its own.
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
                        if part.error is None or not await self._waits(part.error):
                            break
                    if part.error is None:
                        continue
                    if part.refused:
                        raise part.error
                    if len(part.records) > 1:
                        log.warning("a batch fails; trying its records one by one", error=str(part.error))
                        parts.extend(Part(self, [record]) for record in part.records)
                    else:
                        log.error("a record cannot be joined", exc_info=part.error)
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

    async def _waits(self, error: Exception) -> bool:
        """Whether to try the same again: a server is unavailable, or the batch is no longer this one's."""
        if not self.owner.owns(self):
            log.info("a batch is dropped, and read again by its partitions' owner", error=repr(error))
            return True
        meaning = await explain(error, self.owner.settings)
        if meaning is None:
            return False
        if not isinstance(meaning, UnavailableError):
            raise meaning from error
        RETRIES.inc()
        log.warning("trying again", why=str(meaning))
        self.owner.unavailable("redis" if is_redis(error) else "kafka", str(meaning))
        return True
