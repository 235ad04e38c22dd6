"""The versions of all models, from the records of the weights topic. `Versions` knows no Kafka and no torch.

    versions = Versions(settings)
    for record in records:
        versions.add(record, partitions=8)
    versions.newest("default")

Holds manifests only: 5 KB of memory per version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import prometheus_client
import structlog
from cachetools import LRUCache

from cortex_core.errors import WeightsError
from streams.kafka.reader import reading, records_to_end
from streams.kafka.topics import Topics, partition_of
from streams.weights.records import (
    MANIFEST,
    RESUME,
    SPARE_SLOTS,
    Location,
    StoredVersion,
    Tombstone,
    decode_key,
    decode_manifest,
    encode_key,
    version_in,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from cortex_core.weights import WeightsManifest
    from streams.settings import Settings

log = structlog.get_logger(__name__)

CHUNKS_KNOWN = 10_000
"""Chunks on the weights topic whose manifest has not been read: the latest are known."""


FORKS = prometheus_client.Counter(
    "cortex_weights_forks",
    "Versions that do not follow the newest one of their model, as an audit counts",
)


def _is_fork(manifest: WeightsManifest, newest: WeightsManifest) -> bool:
    """Whether a version does not follow its model's newest one, or has consumed less; as an audit judges."""
    back = any(offset < newest.consumed.get(name, 0) for name, offset in manifest.consumed.items())
    parent = -1 if manifest.parent is None else manifest.parent
    return manifest.version <= newest.version or parent < newest.version or back


class UnrelatedError(WeightsError):
    """A version that is far from the newest one and has an unknown parent."""

    reason = "unrelated"


class Versions:
    """The newest valid version of every model, and the kept ones before it.

    The version numbers of a model increase; an older or equal one is ignored. A manifest is refused, and
    changes nothing, if it is invalid or far from the newest one without a known parent.
    """

    def __init__(
        self, settings: Settings, check: Callable[[WeightsManifest], None] = lambda _manifest: None
    ) -> None:
        """
        Args:
            check: raises `WeightsError` for a manifest to refuse.
        """
        self._topics = Topics.of(settings)
        self._weights_kept = settings.weights_kept
        self._ring = settings.weights_kept + SPARE_SLOTS
        self._check = check
        self._kept: dict[str, list[StoredVersion]] = {}
        self._highest: dict[str, int] = {}
        self._unrelated: dict[str, int] = {}
        """Model → its last version that was refused as unrelated."""
        self._first_chunk: LRUCache[tuple[str, int, int], tuple[int, int]] = LRUCache(CHUNKS_KNOWN)
        """(model, partition, slot) → version and offset of the first of its chunks on the weights topic."""
        self._places: dict[str, dict[tuple[int, int, Location], int]] = {}
        """Model → (partition and slot of a manifest, place of its payload without offsets) → chunks."""

    def models(self) -> list[str]:
        """Ids of the models with at least one version."""
        return sorted(self._kept)

    def get(self, model_id: str, version: int | None = None) -> StoredVersion | None:
        """A kept version, by default the newest; None if it is not kept."""
        kept = self._kept.get(model_id, [])
        if version is None:
            return kept[-1] if kept else None
        return next((k for k in kept if k.manifest.version == version), None)

    def newest(self, model_id: str) -> WeightsManifest | None:
        """The manifest of the model's newest version; None if it has no version."""
        newest = self.get(model_id)
        return newest.manifest if newest else None

    def history(self, model_id: str) -> list[WeightsManifest]:
        """The last `weights_kept` versions, oldest first: the choices for a rollback or a pin."""
        return [k.manifest for k in self._kept.get(model_id, [])]

    def has_records(self, model_id: str) -> bool:
        """Whether the topic has manifests of the model, usable or not."""
        return bool(self._places.get(model_id))

    def highest(self, model_id: str) -> int:
        """The highest number of all accepted versions, also of those that turned out to be unusable."""
        return self._highest.get(model_id, 0)

    def add(self, record: Any, partitions: int) -> str | None:
        """Adds a record of the weights topic; returns the model whose newest version it changed.

        Args:
            partitions: number of partitions that the topic has.

        Raises:
            WeightsError: the record is refused; other versions are not affected.
        """
        model_id, slot, part = decode_key(record.key)
        if part != MANIFEST:
            self._add_chunk(record, model_id, slot)
            return None
        if record.value is None:
            return self._delete(model_id, record.partition, slot)
        version = version_in(record)
        chunk_of, offset = self._first_chunk.pop((model_id, record.partition, slot), (0, 0))
        stored = decode_manifest(record, self._topics, offset if chunk_of == version else None)
        place = record.partition, slot, stored.location._replace(first=0, last=0)
        chunks = self._places.setdefault(model_id, {})
        chunks[place] = max(chunks.get(place, 0), stored.manifest.chunks)
        return model_id if self._accept(stored, partitions) else None

    def discard(self, version: StoredVersion) -> None:
        """Removes a version that turned out to be unusable; the one before it is the newest again."""
        model_id = version.manifest.model_id
        self._keep(model_id, [k for k in self._kept.get(model_id, []) if k != version])

    def tombstones(self, model_id: str) -> list[Tombstone]:
        """All records of the model's versions; their deletion makes every reader forget the model."""
        places = sorted(self._places.get(model_id, {}).items())
        return [
            *(t for (_, slot, at), chunks in places for t in _payload(model_id, slot, at, chunks)),
            *((self._topics.weights, p, encode_key(model_id, slot, MANIFEST)) for (p, slot, _), _ in places),
        ]

    def chunks_beside(self, model_id: str, slot: int) -> list[Tombstone]:
        """The chunks in this slot on the weights topic, from before there was a topic of payloads."""
        return [
            t
            for (_, s, at), chunks in self._places.get(model_id, {}).items()
            if s == slot and at.topic == self._topics.weights
            for t in _payload(model_id, slot, at, chunks)
        ]

    def _add_chunk(self, record: Any, model_id: str, slot: int) -> None:
        if record.value is None:
            beside = record.partition, slot, Location(self._topics.weights, record.partition, 0, 0)
            self._places.get(model_id, {}).pop(beside, None)
            return
        version, key = version_in(record), (model_id, record.partition, slot)
        if self._first_chunk.get(key, (0, 0))[0] != version:
            self._first_chunk[key] = version, record.offset

    def _accept(self, stored: StoredVersion, partitions: int) -> bool:
        manifest, model_id = stored.manifest, stored.manifest.model_id
        newest = self.get(model_id)
        kept = self._kept.get(model_id, [])
        if newest is not None and _is_fork(manifest, newest.manifest):
            FORKS.inc()
            log.warning("fork", model_id=model_id, version=manifest.version, newest=newest.manifest.version)
        if newest is not None and newest.partition != stored.partition:
            # Partitions were added: the model's versions continue in another one.
            if (
                newest.partition == partition_of(model_id, partitions)
                or manifest.version <= newest.manifest.version
            ):
                return False
        elif newest is not None and abs(manifest.version - newest.manifest.version) > self._ring:
            self._expect_successor(manifest, newest.manifest)
            kept = []  # so many versions were missed that all kept ones have been overwritten
        elif newest is not None and manifest.version <= newest.manifest.version:
            log.info("older version ignored", model_id=model_id, version=manifest.version)
            return False
        self._check(manifest)
        self._unrelated.pop(model_id, None)
        self._highest[model_id] = manifest.version
        kept = [k for k in kept if k.slot != stored.slot or k.partition != stored.partition]
        self._keep(model_id, [*kept, stored])
        return True

    def _expect_successor(self, manifest: WeightsManifest, newest: WeightsManifest) -> None:
        """Accepts a far version only if its parent is the version before it, which was refused as far, too.

        A reader that was disconnected for long finds a ring of versions of which each is the parent of the
        next. A version that was forged or written by mistake has no such child: trainers continue from the
        valid version.
        """
        before = self._unrelated.get(manifest.model_id)
        self._unrelated[manifest.model_id] = manifest.version
        if before is None or manifest.parent != before:
            raise UnrelatedError(
                f"weights {manifest.model_id} v{manifest.version}: the parent, {manifest.parent}, is neither "
                f"the newest version, v{newest.version}, nor one after it"
            )

    def _delete(self, model_id: str, partition: int, slot: int) -> str | None:
        places = self._places.get(model_id, {})
        for place in [p for p in places if p[:2] == (partition, slot)]:
            del places[place]
        kept = self._kept.get(model_id, [])
        rest = [k for k in kept if (k.partition, k.slot) != (partition, slot)]
        if len(rest) == len(kept):
            return None
        self._keep(model_id, rest)
        return model_id

    def _keep(self, model_id: str, kept: list[StoredVersion]) -> None:
        if kept:
            self._kept[model_id] = kept[-self._weights_kept :]
            return
        self._kept.pop(model_id, None)
        if not self._places.get(model_id):
            for by_model in (self._places, self._highest, self._unrelated):
                by_model.pop(model_id, None)


def _payload(model_id: str, slot: int, at: Location, chunks: int) -> list[Tombstone]:
    parts: list[int | str] = [*range(chunks), RESUME]
    return [(at.topic, at.partition, encode_key(model_id, slot, part)) for part in parts]


async def read_versions(settings: Settings) -> Versions:
    """All versions that are committed now.

    Raises:
        UnavailableError: Kafka stopped sending.
        KafkaError, OSError: the broker does not answer, or has no such topic.
    """
    versions = Versions(settings)
    async with reading(settings, [Topics.of(settings).weights]) as consumer:
        partitions = len(consumer.assignment())
        async for record in records_to_end(consumer, settings):
            try:
                versions.add(record, partitions)
            except WeightsError as error:
                log.debug("record refused", offset=record.offset, error=str(error))
    return versions
