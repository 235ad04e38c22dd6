"""Follows the weights topic: versions of models on a compacted topic, each published in one transaction.

The records of one version, in this order, all on partition 0, so that the versions of all models are ordered:

    key                        value       headers
    ["<model_id>", slot, 0]    chunk 0     version
    ["<model_id>", slot, 1]    chunk 1     version
    …
    ["<model_id>", slot, "manifest"]       WeightsManifest as JSON; version, resume

`slot` = version modulo (`weights_kept` + 2): a ring buffer. Compaction keeps the newest record of each key,
so that the last `weights_kept` versions always remain readable; with the two spare slots, an operator's pin
reaches the trainer before the pinned version is overwritten.

The manifest comes last and contains the sha256 of all chunks: a version is valid if all its chunks were read
before its manifest and match the sha256. `resume` is for trainers, see `streams/trainer/learner.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import prometheus_client
import structlog
from aiokafka import TopicPartition

from cortex_core.errors import CortexError, WeightsError
from cortex_core.weights import WeightsManifest, WeightsSnapshot
from streams.kafka.follower import StateFollower
from streams.kafka.reader import reading
from streams.kafka.topics import Topics
from streams.settings import Settings
from streams.weights.records import MANIFEST, SPARE_SLOTS, Assembler, IncompleteError, decode_key, encode_key

if TYPE_CHECKING:
    from cortex_core.model import CortexModel

log = structlog.get_logger(__name__)


OnVersion = Callable[[WeightsSnapshot, "CortexModel"], Awaitable[None]]


class _UnusableError(WeightsError):
    """A complete version from which this process cannot build a model."""

    reason = "unusable"


class _UnrelatedError(WeightsError):
    """A version that is far from the newest one and has an unknown parent."""

    reason = "unrelated"


FORKS = prometheus_client.Counter(
    "cortex_weights_forks",
    "Versions that do not follow the newest one of their model, as an audit counts",
)


def _is_fork(manifest: WeightsManifest, newest: WeightsManifest) -> bool:
    """Whether a version does not follow its model's newest one, or has consumed less; as an audit judges."""
    back = any(offset < newest.consumed.get(name, 0) for name, offset in manifest.consumed.items())
    parent = -1 if manifest.parent is None else manifest.parent
    return manifest.version <= newest.version or parent < newest.version or back


@dataclass(frozen=True, slots=True)
class _Kept:
    """A complete version, and the position of its records."""

    manifest: WeightsManifest
    slot: int
    first_offset: int
    last_offset: int


class WeightsFollower(StateFollower):
    """Follows the newest valid version of every model, and calls back for each newer one.

    The version numbers of a model increase; an older or equal one is ignored. A version is refused, and the
    previous one remains in use, if it is incomplete, damaged, forged, not finite, of an architecture that
    this process cannot run, or far from the newest one without a known parent. Decoding runs in a thread.

        async def swap(snapshot, model): ...
        follower = WeightsFollower(settings, swap)
        await follower.start()
        await follower.until_caught_up()
        ...
        await follower.stop()

    Keeps no payloads: `on_version` gets each of them, and `fetch` reads one of the kept versions again.
    """

    def __init__(
        self,
        settings: Settings,
        on_version: OnVersion | None = None,
        *,
        on_state: Callable[[str | None], None] | None = None,
        keep_resume: bool = False,
        is_own: Callable[[WeightsManifest], bool] | None = None,
    ) -> None:
        """
        Args:
            on_version: awaited with each new version and its model, in evaluation mode. Not called until the
                follower has caught up, and then once with the newest version of each model. Its errors are
                logged.
            on_state: called with the reason why Kafka is unavailable, or None if it is available.
            keep_resume: whether to keep `resume`; for trainers.
            is_own: whether this process published a version; then no model is built, and `on_version` is not
                called.
        """
        super().__init__(settings, Topics.of(settings).weights, on_state)
        self._on_version = on_version
        self._keep_resume = keep_resume
        self._is_own = is_own or (lambda _: False)
        self._kept: dict[str, list[_Kept]] = {}
        self._resume: dict[str, bytes] = {}
        self._ring = settings.weights_kept + SPARE_SLOTS
        self._unrelated: dict[str, int] = {}
        """Model → its last version that was refused as unrelated."""
        self._pending: dict[str, tuple[WeightsSnapshot, CortexModel]] = {}
        self._notifying = asyncio.Lock()
        self._assembler = Assembler()

    def models(self) -> list[str]:
        """Ids of the models with at least one version."""
        return sorted(self._kept)

    def newest(self, model_id: str) -> WeightsManifest | None:
        """The manifest of the model's newest valid version; None if it has no version."""
        kept = self._kept.get(model_id)
        return kept[-1].manifest if kept else None

    def history(self, model_id: str) -> list[WeightsManifest]:
        """The last `weights_kept` versions, oldest first: the choices for a rollback or a pin."""
        return [k.manifest for k in self._kept.get(model_id, [])]

    def resume(self, model_id: str) -> bytes:
        """The encoded `Resume` of the newest version; empty if unknown."""
        return self._resume.get(model_id, b"")

    async def fetch(self, model_id: str, version: int) -> WeightsSnapshot:
        """Reads a kept version again.

        Raises:
            WeightsError: the version is not kept.
            KafkaError, OSError, TimeoutError: the broker does not answer.
        """
        kept = next((k for k in self._kept.get(model_id, []) if k.manifest.version == version), None)
        if kept is None:
            have = ", ".join(str(m.version) for m in self.history(model_id)) or "none"
            raise WeightsError(f"weights {model_id} v{version} are not kept; kept are: {have}")
        partition = TopicPartition(Topics.of(self.settings).weights, 0)
        assembler, wanted = Assembler(), {encode_key(model_id, kept.slot, MANIFEST)}
        wanted |= {encode_key(model_id, kept.slot, i) for i in range(kept.manifest.chunks)}
        async with (
            asyncio.timeout(30.0),
            reading(self.settings, start={partition: kept.first_offset}) as consumer,
        ):
            while await consumer.position(partition) <= kept.last_offset:
                for record in (await consumer.getmany(partition, timeout_ms=200)).get(partition, []):
                    whole = None
                    if record.key in wanted:
                        # Records that were refused the first time are refused again.
                        with contextlib.suppress(WeightsError):
                            whole = assembler.add(record)
                    if whole is not None and whole[0].manifest == kept.manifest:
                        return whole[0]
        raise WeightsError(f"weights {model_id} v{version} have been overwritten; use a newer version")

    async def _start(self) -> None:
        await super()._start()
        waiting, self._pending = self._pending, {}
        for snapshot, model in waiting.values():
            await self._notify(snapshot, model)
        log.info("weights log read", models=len(self._kept), refused=dict(self.refused))

    async def _add(self, record: Any) -> None:
        whole = self._assembler.add(record)
        if whole is not None:
            await self._accept(record, *whole)
        elif record.value is None:
            self._delete(record)

    def _is_expected(self, reason: str) -> bool:
        # In a compacted topic, the overwritten versions are normally incomplete.
        return reason == IncompleteError.reason and not self.caught_up.is_set()

    async def _accept(self, record: Any, snapshot: WeightsSnapshot, slot: int, first_offset: int) -> None:
        manifest, model_id = snapshot.manifest, snapshot.manifest.model_id
        kept, newest = self._kept.get(model_id, []), self.newest(model_id)
        if newest is not None and _is_fork(manifest, newest):
            FORKS.inc()
            log.warning("fork", model_id=model_id, version=manifest.version, newest=newest.version)
        if newest is not None and abs(manifest.version - newest.version) > self._ring:
            self._expect_successor(manifest, newest)
            kept = []  # so many versions were missed that all kept ones have been overwritten
        elif newest is not None and manifest.version <= newest.version:
            log.info("older version ignored", model_id=model_id, version=manifest.version)
            return
        model: CortexModel | None = None
        if not self._is_own(manifest):
            model = await asyncio.to_thread(self._build, snapshot)
        self._unrelated.pop(model_id, None)
        kept = [k for k in kept if k.slot != slot]
        kept.append(_Kept(manifest, slot, first_offset, record.offset))
        self._kept[manifest.model_id] = kept[-self.settings.weights_kept :]
        if self._keep_resume:
            self._resume[manifest.model_id] = dict(record.headers).get("resume", b"")
        if model is None:
            self._pending.pop(manifest.model_id, None)
        elif self.caught_up.is_set():
            await self._notify(snapshot, model)
        else:
            self._pending[manifest.model_id] = snapshot, model

    def _expect_successor(self, manifest: WeightsManifest, newest: WeightsManifest) -> None:
        """Accepts a far version only if its parent is the version before it, which was refused as far, too.

        A reader that was disconnected for long finds a ring of versions of which each is the parent of the
        next. A version that was forged or written by mistake has no such child: trainers continue from the
        valid version.
        """
        before = self._unrelated.get(manifest.model_id)
        self._unrelated[manifest.model_id] = manifest.version
        if before is None or manifest.parent != before:
            raise _UnrelatedError(
                f"weights {manifest.model_id} v{manifest.version}: the parent, {manifest.parent}, is neither "
                f"the newest version, v{newest.version}, nor one after it"
            )

    def _build(self, snapshot: WeightsSnapshot) -> CortexModel:
        text_dim = snapshot.manifest.architecture.get("text_dim")
        if text_dim != self.settings.text_dim:
            raise _UnusableError(
                f"weights {snapshot.manifest.model_id} v{snapshot.manifest.version} are for embeddings of "
                f"dimension {text_dim}, this worker's have {self.settings.text_dim} (CORTEX_TEXT_DIM)"
            )
        try:
            return snapshot.to_model().freeze()
        except CortexError as error:
            raise _UnusableError(str(error)) from error
        except Exception as error:  # an invalid architecture can fail anywhere in torch
            raise _UnusableError(
                f"weights {snapshot.manifest.model_id} v{snapshot.manifest.version}: no model can be built "
                f"from their architecture ({type(error).__name__}: {error})"
            ) from error

    def _delete(self, record: Any) -> None:
        """Handles a tombstone: removes the version from the kept ones, unless it is the newest."""
        model_id, slot, _ = decode_key(record.key)
        kept = self._kept.get(model_id, [])
        rest = [k for k in kept if k.slot != slot or k is kept[-1]]
        if kept:
            self._kept[model_id] = rest

    async def _notify(self, snapshot: WeightsSnapshot, model: CortexModel) -> None:
        if self._on_version is None:
            return
        manifest = snapshot.manifest
        async with self._notifying:  # one at a time, so that an older version never replaces a newer one
            if self.newest(manifest.model_id) != manifest:
                return
            try:
                await self._on_version(snapshot, model)
            except Exception as error:
                log.exception(
                    "on_version failed",
                    model_id=manifest.model_id,
                    version=manifest.version,
                    error=str(error),
                )
