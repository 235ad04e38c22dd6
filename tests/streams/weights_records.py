"""Versions of weights as records, whole and forged."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cortex_core.model import CortexModel, ModelConfig
from cortex_core.weights import WeightsSnapshot
from streams.weights.records import MANIFEST, SPARE_SLOTS, encode_key

CONFIG = ModelConfig(text_dim=384)


@dataclass
class Record:
    """What the assembler reads of a consumer's record."""

    key: bytes
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]
    offset: int = 0
    partition: int = 0


@functools.cache
def snapshot(version: int, model_id: str = "m", *, fill: float | None = None) -> WeightsSnapshot:
    model = CortexModel.create(CONFIG, model_id)
    if fill is not None:
        with torch.no_grad():
            next(model.gate.parameters()).fill_(fill)
    return WeightsSnapshot.of(model, model_id=model_id, version=version, parent=version - 1 or None)


def records_of(
    version: WeightsSnapshot, first_offset: int = 0, kept: int = 4, resume: bytes = b""
) -> list[Record]:
    """All records on the weights topic, as before there was a topic of payloads."""
    manifest = version.manifest
    slot, number = manifest.version % (kept + SPARE_SLOTS), ("version", str(manifest.version).encode())
    parts: list[tuple[int | str, bytes]] = [*enumerate(version.split())]
    parts.append((MANIFEST, manifest.model_dump_json().encode()))
    headers = {MANIFEST: [number, ("resume", resume)]}
    return [
        Record(
            encode_key(manifest.model_id, slot, part),
            value,
            headers.get(str(part), [number]),
            first_offset + i,
        )
        for i, (part, value) in enumerate(parts)
    ]
