"""The wire format of weights versions on the compacted topic: encoding, and putting versions together."""

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
"""Bytes of a snapshot; with embeddings of 384 numbers a model has three million, of 4,096 fifteen."""
MAX_WAITING = 128_000_000
"""Bytes of chunks that wait for their manifests; beyond, those that came first are let go."""
MAX_MANIFEST = 100_000
"""Bytes of a manifest."""
CHUNK_OVERHEAD = 500
"""Bytes that a chunk counts for beside its own."""
MAX_SLOTS = MAX_PARTS = 10_000


Key = tuple[str, int, int | str]


def encode_key(model_id: str, slot: int, part: int | str) -> bytes:
    """A record's key; JSON, so that no model_id can be mistaken for another."""
    return json.dumps([model_id, slot, part], ensure_ascii=False, separators=(",", ":")).encode()


def decode_key(raw: bytes | None) -> Key:
    """The inverse of `encode_key`.

    Raises:
        WeightsError: the key is none of this log.
    """
    try:
        model_id, slot, part = json.loads(raw or b"")
    except (ValueError, TypeError, RecursionError) as error:
        raise WeightsError(f"the key {shown(raw)} is no [model_id, slot, part]") from error
    if not (
        isinstance(model_id, str)
        and 0 < len(model_id) <= MAX_ID
        and type(slot) is int
        and 0 <= slot < MAX_SLOTS
        and (part == MANIFEST or (type(part) is int and 0 <= part < MAX_PARTS))
    ):
        raise WeightsError(f"the key {shown(raw)} is no [model_id, slot, part]")
    return model_id, slot, part


def encode(
    snapshot: WeightsSnapshot, weights_kept: int, resume: bytes = b""
) -> list[tuple[bytes, bytes, list[tuple[str, bytes]]]]:
    """A version as (key, value, headers) of its records, in the order in which they must be sent."""
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
    """Sends a version inside the caller's open transaction; it exists once that commits.

    Raises:
        KafkaError: the transaction must be aborted.
    """
    topic = Topics.of(settings).weights
    sent = [
        await producer.send(topic, value=value, key=key, partition=0, headers=headers)
        for key, value, headers in encode(snapshot, settings.weights_kept, resume)
    ]
    await asyncio.gather(*sent)


@dataclass(slots=True)
class _Parts:
    """Chunks of one version, waiting for their manifest."""

    version: int
    first_offset: int
    chunks: dict[int, bytes] = field(default_factory=dict)


class IncompleteError(WeightsError):
    """Chunks of a version are missing: it was never published whole, or has been overwritten since."""

    reason = "incomplete"


class Assembler:
    """Puts versions together from records, in order. Pure: no Kafka, no torch, no clock.

    Holds `MAX_WAITING` bytes at most, whatever the records are.
    """

    def __init__(self) -> None:
        self._parts: OrderedDict[tuple[str, int], _Parts] = OrderedDict()
        self._waiting = 0

    @property
    def waiting(self) -> int:
        """Bytes of chunks whose manifest has not come."""
        return self._waiting

    def add(self, record: Any) -> tuple[WeightsSnapshot, int, int] | None:
        """A version that this record completes, with its slot and the offset of its first record.

        What the snapshot holds is verified by sha256, and by nothing else.

        Raises:
            WeightsError: a key, header or manifest that cannot be read, or a version that is incomplete or
                damaged. It costs that version alone.
        """
        model_id, slot, part = decode_key(record.key)
        if record.value is None:
            self._take((model_id, slot))
            return None
        version = _version(record)
        if isinstance(part, int):
            self._add_chunk((model_id, slot), version, part, record)
            return None
        parts = self._take((model_id, slot))
        if len(record.value) > MAX_MANIFEST:
            raise WeightsError(
                f"weights {model_id} v{version}: the manifest has {len(record.value)} bytes, most is "
                f"{MAX_MANIFEST}"
            )
        try:
            manifest = WeightsManifest.model_validate_json(record.value)
        except ValidationError as error:
            raise WeightsError(f"weights {model_id} v{version}: no manifest: {describe(error)}") from error
        if (manifest.model_id, manifest.version) != (model_id, version):
            raise WeightsError(
                f"a manifest of {manifest.model_id} v{manifest.version} stands under the key of "
                f"{model_id} v{version}"
            )
        if manifest.bytes > MAX_PAYLOAD:
            raise WeightsError(
                f"weights {model_id} v{version} claim {manifest.bytes} bytes, most is {MAX_PAYLOAD}"
            )
        chunks = parts.chunks if parts is not None and parts.version == version else {}
        # Their number first: a manifest may claim any, and none of that is looked at.
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
                f"chunk {part} of {key[0]} v{version} has {len(record.value)} bytes, most is {MAX_CHUNK}"
            )
        parts = self._parts.get(key)
        if parts is None or parts.version != version:
            self._take(key)
            parts = self._parts[key] = _Parts(version, record.offset)
        replaced = parts.chunks.get(part)
        self._waiting += _size(record.value) - (0 if replaced is None else _size(replaced))
        parts.chunks[part] = record.value
        self._parts.move_to_end(key)
        while self._waiting > MAX_WAITING:
            self._take(next(iter(self._parts)))

    def _take(self, key: tuple[str, int]) -> _Parts | None:
        parts = self._parts.pop(key, None)
        if parts is not None:
            self._waiting -= sum(map(_size, parts.chunks.values()))
        return parts


def _size(chunk: bytes) -> int:
    return len(chunk) + CHUNK_OVERHEAD


def _version(record: Any) -> int:
    header = dict(record.headers).get("version") or b""
    if not header.isdigit() or len(header) > 15:
        raise WeightsError(
            f"the record at offset {record.offset} has version header {shown(header)}, wanted a number of at "
            "most 15 digits"
        )
    return int(header)
