"""The wire format of weights versions on the compacted topic: encoding, and putting versions together."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from aiokafka import AIOKafkaProducer
from pydantic import ValidationError

from cortex_core.errors import WeightsError
from cortex_core.weights import WeightsManifest, WeightsSnapshot
from streams.events import describe
from streams.kafka.topics import Topics
from streams.settings import Settings

MANIFEST = "manifest"


SPARE_SLOTS = 2


MAX_PAYLOAD = 256_000_000
"""Bytes of a snapshot that a follower will put together; a model of this project has about three million."""


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
    except (ValueError, TypeError) as error:
        raise WeightsError(f"the key {raw!r} is no [model_id, slot, part]") from error
    ok = isinstance(model_id, str) and type(slot) is int and (part == MANIFEST or type(part) is int)
    if not ok:
        raise WeightsError(f"the key {raw!r} is no [model_id, slot, part]")
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


class Assembler:
    """Puts versions together from records, in order. Pure: no Kafka, no torch, no clock."""

    def __init__(self) -> None:
        self._parts: dict[tuple[str, int], _Parts] = {}

    def add(self, record: Any) -> tuple[WeightsSnapshot, int, int] | None:
        """A version that this record completes, with its slot and the offset of its first record.

        What the snapshot holds is verified by sha256, and by nothing else.

        Raises:
            WeightsError: a key, header or manifest that cannot be read, or a version that is incomplete or
                damaged. It costs that version alone.
        """
        model_id, slot, part = decode_key(record.key)
        if record.value is None:
            self._parts.pop((model_id, slot), None)
            return None
        version = _version(record)
        if isinstance(part, int):
            parts = self._parts.get((model_id, slot))
            if parts is None or parts.version != version:
                parts = self._parts[model_id, slot] = _Parts(version, record.offset)
            parts.chunks[part] = record.value
            return None
        parts = self._parts.pop((model_id, slot), None)
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
        if set(chunks) != set(range(manifest.chunks)):
            raise IncompleteError(
                f"weights {model_id} v{version} are incomplete: {len(chunks)} of {manifest.chunks} chunks"
            )
        assert parts is not None
        snapshot = WeightsSnapshot.join(manifest, [chunks[i] for i in range(manifest.chunks)])
        return snapshot, slot, parts.first_offset


def _version(record: Any) -> int:
    header = dict(record.headers).get("version", b"")
    if not header.isdigit():
        raise WeightsError(
            f"the record at offset {record.offset} has version header {header!r}, wanted a number"
        )
    return int(header)
