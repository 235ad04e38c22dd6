"""Reads the payloads of versions on demand."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from aiokafka import TopicPartition

from cortex_core.errors import WeightsError
from cortex_core.weights import MAX_CHUNK, WeightsSnapshot
from streams.kafka.reader import reading
from streams.settings import Settings
from streams.weights.records import MANIFEST, RESUME, StoredVersion, version_in

READ_S = 30.0
FETCH_BYTES = 3_000_000
"""Bytes per fetch: about one payload."""
MAX_RECORDS = 100_000
"""Records between the first and the last one of a version: its own, and those written at the same time."""


class IncompleteError(WeightsError):
    """Chunks of a version are missing: it was published incompletely, or has been overwritten."""

    reason = "incomplete"


class Payloads:
    """One connection, opened with the first read. Reads one payload at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._open = contextlib.AsyncExitStack()
        self._consumer: Any = None
        self._topics: set[str] = set()
        self._lock = asyncio.Lock()

    async def read(self, version: StoredVersion) -> tuple[WeightsSnapshot, bytes]:
        """The snapshot, verified by its sha256 only, and its whole `resume` record; empty if it has none.

        Raises:
            WeightsError: incomplete, overwritten or damaged.
            KafkaError, OSError (TimeoutError too): the broker does not answer.
        """
        async with self._lock:
            try:
                async with asyncio.timeout(READ_S):
                    parts = await self._parts(version)
            except WeightsError:
                raise
            except BaseException:
                await self.close()
                raise
        manifest, resume = version.manifest, parts.pop(RESUME, b"")
        chunks = [parts[i] for i in range(manifest.chunks) if i in parts]
        if len(chunks) != manifest.chunks:
            raise IncompleteError(f"{version.name}: {len(chunks)} of {manifest.chunks} chunks are left")
        snapshot = await asyncio.to_thread(WeightsSnapshot.join, manifest, chunks)
        return snapshot, resume

    async def _parts(self, version: StoredVersion) -> dict[int | str, bytes]:
        at = version.location
        if not 0 <= at.last - at.first < MAX_RECORDS:
            raise WeightsError(f"{version.name}: the payload cannot be at {at}")
        if self._consumer is None:
            # Its manifest was read, so it is committed: there is no need to wait for other transactions.
            client = reading(self._settings, committed_only=False, fetch_bytes=FETCH_BYTES)
            self._consumer = await self._open.enter_async_context(client)
        consumer, partition = self._consumer, TopicPartition(at.topic, at.partition)
        if at.topic not in self._topics:  # asked for one partition, the client learns of all
            await consumer.end_offsets([TopicPartition(at.topic, 0)])
            self._topics.add(at.topic)
        if at.partition not in consumer.partitions_for_topic(at.topic):
            raise WeightsError(f"{version.name}: {at.topic} has no partition {at.partition}")
        consumer.assign([partition])
        end = min(at.last + 1, (await consumer.end_offsets([partition]))[partition])
        keys = {version.key(part): part for part in (*range(version.manifest.chunks), RESUME)}
        keys[version.key(MANIFEST)] = (
            MANIFEST  # before there were payloads, it had the resume record as header
        )
        parts: dict[int | str, bytes] = {}
        consumer.seek(partition, at.first)
        while await consumer.position(partition) < end:
            for record in (await consumer.getmany(partition, timeout_ms=200)).get(partition, []):
                part = keys.get(record.key or b"")
                if part is None or record.value is None or record.offset >= end:
                    continue
                with contextlib.suppress(WeightsError):
                    if version_in(record) != version.manifest.version:
                        continue
                    if part == MANIFEST:
                        parts[RESUME] = dict(record.headers).get(RESUME) or b""
                    elif part == RESUME or len(record.value) <= MAX_CHUNK:
                        parts[part] = record.value
        consumer.pause(partition)
        return parts

    async def close(self) -> None:
        """Closes the connection; the next read opens another."""
        self._consumer = None
        self._topics.clear()
        await self._open.aclose()
