"""The wire format of weights versions on the compacted topics: keys, encoding, publishing.

A version is published in one transaction, its manifest last:

    topic      key                               value                      headers
    payloads   ["<model_id>", slot, 0]           chunk 0                    version
               ["<model_id>", slot, 1]           chunk 1                    version
               …
               ["<model_id>", slot, "resume"]    what the next owner needs  version
    weights    ["<model_id>", slot, "manifest"]  WeightsManifest as JSON    version, payload, resume

`slot` = version modulo (`weights_kept` + 2): a ring buffer. Compaction keeps the newest record of each key,
so that the last `weights_kept` versions always remain readable; with the two spare slots, an operator's pin
reaches the trainer before the pinned version is overwritten.

Both topics are partitioned by model. The header `payload` is "partition:first offset:last offset" in the
topic of payloads, so that a reader of manifests, which are small, can read the payload of any of them. The
header `resume` is the first line of that record. Before there were payloads, the chunks preceded their
manifest on the weights topic, and this header was the whole: such versions are read, too.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from aiokafka import AIOKafkaProducer
from pydantic import ValidationError

from cortex_core.errors import WeightsError, shown
from cortex_core.weights import MAX_CHUNK, WeightsManifest, WeightsSnapshot
from streams.events import MAX_ID, describe
from streams.kafka.topics import Topics, partition_of
from streams.settings import Settings

MANIFEST = "manifest"
RESUME = "resume"
SPARE_SLOTS = 2
MAX_PAYLOAD = 64_000_000
"""Bytes of a snapshot; 3 million for embeddings of dimension 384, 15 million for dimension 4,096."""
MAX_MANIFEST = 100_000
"""Bytes of a manifest."""
MAX_SLOTS = MAX_PARTS = 10_000

Key = tuple[str, int, int | str]


def encode_key(model_id: str, slot: int, part: int | str) -> bytes:
    """A record's key; JSON, so that different model ids never have equal keys."""
    return json.dumps([model_id, slot, part], ensure_ascii=False, separators=(",", ":")).encode()


def decode_key(raw: bytes | None) -> Key:
    """The inverse of `encode_key`.

    Raises:
        WeightsError: the key is invalid.
    """
    try:
        model_id, slot, part = json.loads(raw or b"")
    except (ValueError, TypeError, RecursionError) as error:
        raise WeightsError(f"the key {shown(raw)} is not of the form [model_id, slot, part]") from error
    if not (
        isinstance(model_id, str)
        and 0 < len(model_id) <= MAX_ID
        and type(slot) is int
        and 0 <= slot < MAX_SLOTS
        and (part in (MANIFEST, RESUME) or (type(part) is int and 0 <= part < MAX_PARTS))
    ):
        raise WeightsError(f"the key {shown(raw)} is not of the form [model_id, slot, part]")
    return model_id, slot, part


class UnusableError(WeightsError):
    """A version from which this process cannot build a model."""

    reason = "unusable"


class Location(NamedTuple):
    """Where the payload of a version is."""

    topic: str
    partition: int
    first: int
    """Offset of its first record."""
    last: int


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """A manifest as it was read, and where its payload is."""

    manifest: WeightsManifest
    slot: int
    partition: int
    """Of the manifest."""
    location: Location
    resume: bytes
    """The header; see the module's description."""

    @property
    def name(self) -> str:
        return f"weights {self.manifest.model_id} v{self.manifest.version}"

    def key(self, part: int | str) -> bytes:
        """The key of one of its records."""
        return encode_key(self.manifest.model_id, self.slot, part)


def decode_manifest(record: Any, topics: Topics, first_chunk: int | None = None) -> StoredVersion:
    """A version from the record of its manifest.

    Args:
        first_chunk: offset of the first chunk that precedes it on its own topic, if any does.

    Raises:
        WeightsError: an invalid key, header or manifest.
    """
    model_id, slot, _ = decode_key(record.key)
    version, headers = version_in(record), dict(record.headers)
    if len(record.value) > MAX_MANIFEST:
        raise WeightsError(
            f"weights {model_id} v{version}: the manifest has {len(record.value)} bytes, the maximum is "
            f"{MAX_MANIFEST}"
        )
    try:
        manifest = WeightsManifest.model_validate_json(record.value)
    except ValidationError as error:
        raise WeightsError(f"weights {model_id} v{version}: invalid manifest: {describe(error)}") from error
    if (manifest.model_id, manifest.version) != (model_id, version):
        raise WeightsError(
            f"a manifest of {manifest.model_id} v{manifest.version} has the key of {model_id} v{version}"
        )
    if manifest.bytes > MAX_PAYLOAD:
        raise WeightsError(
            f"weights {model_id} v{version} declare {manifest.bytes} bytes, the maximum is {MAX_PAYLOAD}"
        )
    chunks = max(1, math.ceil(manifest.bytes / MAX_CHUNK))
    if manifest.chunks != chunks:
        raise WeightsError(
            f"weights {model_id} v{version} declare {manifest.chunks} chunks, their {manifest.bytes} bytes "
            f"have {chunks}"
        )
    if "payload" in headers:
        location = _location(headers["payload"], topics)
    else:
        first = record.offset if first_chunk is None else first_chunk
        location = Location(topics.weights, record.partition, first, record.offset)
    return StoredVersion(manifest, slot, record.partition, location, headers.get(RESUME) or b"")


def _location(header: bytes | None, topics: Topics) -> Location:
    numbers = (header or b"").split(b":")
    if len(numbers) != 3 or not all(n.isdigit() and len(n) <= 18 for n in numbers):
        raise WeightsError(f"the header payload is {shown(header)}, expected partition:first:last offset")
    return Location(topics.payloads, *map(int, numbers))


def version_in(record: Any) -> int:
    """The version in a record's header.

    Raises:
        WeightsError: it has none, or one that is not a number.
    """
    header = dict(record.headers).get("version") or b""
    if not header.isdigit() or len(header) > 15:
        raise WeightsError(
            f"the record at offset {record.offset} has version header {shown(header)}, expected a number of "
            "at most 15 digits"
        )
    return int(header)


Version = tuple[WeightsSnapshot, bytes]
"""A snapshot, and what the next owner of its model needs (`streams.trainer.learner.Resume`)."""


async def publish(
    producer: AIOKafkaProducer, settings: Settings, snapshot: WeightsSnapshot, resume: bytes = b""
) -> None:
    """Sends a version within the caller's open transaction; readers see it once that is committed.

    Raises:
        KafkaError: abort the transaction.
    """
    await publish_all(producer, settings, [(snapshot, resume)])


async def publish_all(producer: AIOKafkaProducer, settings: Settings, versions: Sequence[Version]) -> None:
    """Sends versions of any models, as `publish` does."""
    topics = Topics.of(settings)
    counts = {t: len(await producer.partitions_for(t)) for t in (topics.weights, topics.payloads)}
    ring = settings.weights_kept + SPARE_SLOTS
    sending = []
    for snapshot, resume in versions:
        model_id, slot = snapshot.manifest.model_id, snapshot.manifest.version % ring
        values: list[tuple[int | str, bytes]] = [*enumerate(snapshot.split())]
        if resume:
            values.append((RESUME, resume))
        sending.append(
            [
                await producer.send(
                    topics.payloads,
                    value=value,
                    key=encode_key(model_id, slot, part),
                    partition=partition_of(model_id, counts[topics.payloads]),
                    headers=[_version_header(snapshot)],
                )
                for part, value in values
            ]
        )
    manifests = []
    for (snapshot, resume), sent in zip(versions, sending, strict=True):
        written = await asyncio.gather(*sent)
        offsets = [record.offset for record in written]
        location = f"{written[0].partition}:{min(offsets)}:{max(offsets)}"
        manifest = snapshot.manifest
        manifests.append(
            await producer.send(
                topics.weights,
                value=manifest.model_dump_json().encode(),
                key=encode_key(manifest.model_id, manifest.version % ring, MANIFEST),
                partition=partition_of(manifest.model_id, counts[topics.weights]),
                headers=[
                    _version_header(snapshot),
                    ("payload", location.encode()),
                    *([(RESUME, resume.partition(b"\n")[0])] if resume else []),
                ],
            )
        )
    await asyncio.gather(*manifests)


def _version_header(snapshot: WeightsSnapshot) -> tuple[str, bytes]:
    return "version", str(snapshot.manifest.version).encode()


Tombstone = tuple[str, int, bytes]
"""Topic, partition and key of a record to delete."""


async def delete(producer: AIOKafkaProducer, tombstones: Iterable[Tombstone]) -> None:
    """Deletes records within the caller's open transaction; readers see it once that is committed.

    Raises:
        KafkaError: abort the transaction.
    """
    sent = [
        await producer.send(topic, value=None, key=key, partition=partition)
        for topic, partition, key in tombstones
    ]
    await asyncio.gather(*sent)
