"""The wire format of weights versions on the compacted topic: encoding, and assembly from records."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from aiokafka import AIOKafkaProducer
from pydantic import ValidationError

from cortex_core.errors import WeightsError, shown
from cortex_core.weights import MAX_CHUNK, WeightsManifest, WeightsSnapshot
from streams.events import MAX_ID, describe
from streams.kafka.topics import Topics
from streams.settings import Settings

MANIFEST = "manifest"
SPARE_SLOTS = 2
MAX_PAYLOAD = 64_000_000
"""Bytes of a snapshot; 3 million for embeddings of dimension 384, 15 million for dimension 4,096."""
MAX_BUFFERED = 128_000_000
"""Bytes of buffered chunks without a manifest; above this, the oldest are dropped."""
MAX_MANIFEST = 100_000
"""Bytes of a manifest."""
CHUNK_OVERHEAD = 500
"""Bytes that a buffered chunk counts for in addition to its size."""
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
        and (part == MANIFEST or (type(part) is int and 0 <= part < MAX_PARTS))
    ):
        raise WeightsError(f"the key {shown(raw)} is not of the form [model_id, slot, part]")
    return model_id, slot, part


def encode(
    snapshot: WeightsSnapshot, weights_kept: int, resume: bytes = b""
) -> list[tuple[bytes, bytes, list[tuple[str, bytes]]]]:
    """The records of a version as (key, value, headers), in the order to send them."""
    manifest = snapshot.manifest
    slot = manifest.version % (weights_kept + SPARE_SLOTS)
    version = ("version", str(manifest.version).encode())
    records: list[tuple[bytes, bytes, list[tuple[str, bytes]]]] = [
        (encode_key(manifest.model_id, slot, i), chunk, [version]) for i, chunk in enumerate(snapshot.split())
    ]
    headers = [version, *([("resume", resume)] if resume else [])]
    records.append(
        (encode_key(manifest.model_id, slot, MANIFEST), manifest.model_dump_json().encode(), headers)
    )
    return records


async def publish(
    producer: AIOKafkaProducer, settings: Settings, snapshot: WeightsSnapshot, resume: bytes = b""
) -> None:
    """Sends a version within the caller's open transaction; readers see it once that is committed.

    Raises:
        KafkaError: abort the transaction.
    """
    topic = Topics.of(settings).weights
    sent = [
        await producer.send(topic, value=value, key=key, partition=0, headers=headers)
        for key, value, headers in encode(snapshot, settings.weights_kept, resume)
    ]
    await asyncio.gather(*sent)


@dataclass(slots=True)
class _Parts:
    """The buffered chunks of one version."""

    version: int
    first_offset: int
    chunks: dict[int, bytes] = field(default_factory=dict)


class IncompleteError(WeightsError):
    """Chunks of a version are missing: it was published incompletely, or has been overwritten."""

    reason = "incomplete"


class Assembler:
    """Assembles versions from records, in order. Pure: no Kafka, no torch, no clock.

    Buffers at most `MAX_BUFFERED` bytes, for any records.
    """

    def __init__(self) -> None:
        # No LRUCache: entries grow while their parts arrive.
        self._parts: OrderedDict[tuple[str, int], _Parts] = OrderedDict()
        self._buffered = 0

    @property
    def buffered(self) -> int:
        """Bytes of chunks whose manifest has not been read."""
        return self._buffered

    def add(self, record: Any) -> tuple[WeightsSnapshot, int, int] | None:
        """Adds a record; returns the version that it completes, with its slot and its first record's offset.

        The snapshot is verified by its sha256 only.

        Raises:
            WeightsError: an invalid key, header or manifest, or an incomplete or damaged version. Other
                versions are not affected.
        """
        model_id, slot, part = decode_key(record.key)
        if record.value is None:
            self._remove((model_id, slot))
            return None
        version = _version(record)
        if isinstance(part, int):
            self._add_chunk((model_id, slot), version, part, record)
            return None
        parts = self._remove((model_id, slot))
        if len(record.value) > MAX_MANIFEST:
            raise WeightsError(
                f"weights {model_id} v{version}: the manifest has {len(record.value)} bytes, the maximum is "
                f"{MAX_MANIFEST}"
            )
        try:
            manifest = WeightsManifest.model_validate_json(record.value)
        except ValidationError as error:
            raise WeightsError(
                f"weights {model_id} v{version}: invalid manifest: {describe(error)}"
            ) from error
        if (manifest.model_id, manifest.version) != (model_id, version):
            raise WeightsError(
                f"a manifest of {manifest.model_id} v{manifest.version} has the key of {model_id} v{version}"
            )
        if manifest.bytes > MAX_PAYLOAD:
            raise WeightsError(
                f"weights {model_id} v{version} declare {manifest.bytes} bytes, the maximum is {MAX_PAYLOAD}"
            )
        chunks = parts.chunks if parts is not None and parts.version == version else {}
        # Compared by number first: a manifest can declare any number, for which no set must be built.
        if len(chunks) != manifest.chunks or set(chunks) != set(range(len(chunks))):
            raise IncompleteError(
                f"weights {model_id} v{version} are incomplete: {len(chunks)} of {manifest.chunks} chunks"
            )
        assert parts is not None
        snapshot = WeightsSnapshot.join(manifest, [chunks[i] for i in range(manifest.chunks)])
        return snapshot, slot, parts.first_offset

    def _add_chunk(self, key: tuple[str, int], version: int, part: int, record: Any) -> None:
        if len(record.value) > MAX_CHUNK:
            raise WeightsError(
                f"chunk {part} of {key[0]} v{version} has {len(record.value)} bytes, the maximum is "
                f"{MAX_CHUNK}"
            )
        parts = self._parts.get(key)
        if parts is None or parts.version != version:
            self._remove(key)
            parts = self._parts[key] = _Parts(version, record.offset)
        replaced = parts.chunks.get(part)
        self._buffered += _size(record.value) - (0 if replaced is None else _size(replaced))
        parts.chunks[part] = record.value
        self._parts.move_to_end(key)
        while self._buffered > MAX_BUFFERED:
            self._remove(next(iter(self._parts)))

    def _remove(self, key: tuple[str, int]) -> _Parts | None:
        parts = self._parts.pop(key, None)
        if parts is not None:
            self._buffered -= sum(map(_size, parts.chunks.values()))
        return parts


def _size(chunk: bytes) -> int:
    return len(chunk) + CHUNK_OVERHEAD


def _version(record: Any) -> int:
    header = dict(record.headers).get("version") or b""
    if not header.isdigit() or len(header) > 15:
        raise WeightsError(
            f"the record at offset {record.offset} has version header {shown(header)}, expected a number of "
            "at most 15 digits"
        )
    return int(header)
