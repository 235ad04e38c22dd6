"""The weights log: versions of models on a compacted topic, published whole or not at all.

Records of one version, in this order, all on partition 0 (so that readers see one order for all models):

    key                        value       headers
    ["<model_id>", slot, 0]    chunk 0     version
    ["<model_id>", slot, 1]    chunk 1     version
    …
    ["<model_id>", slot, "manifest"]       WeightsManifest as JSON; version, resume

`slot` = version modulo (`weights_kept` + 2): a ring. Compaction keeps the newest record of each key, so the
last `weights_kept` versions stay readable however long the topic has run; the two spare slots give an
operator's pin time to reach the trainer before the version pinned is overwritten.

The manifest comes last and carries the sha256 of all chunks: a version counts when every chunk of that very
version was read before its manifest and the whole verifies. `resume` is the trainer's own, see
`learning.py`. Nothing here decides what is learned or served.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    """No model can be made of a version that came whole."""

    reason = "unusable"


class _UnrelatedError(WeightsError):
    """A version is far from the newest one and does not follow from one that is known."""

    reason = "unrelated"


@dataclass(frozen=True, slots=True)
class _Kept:
    """A version that was read whole, and where its records stand."""

    manifest: WeightsManifest
    slot: int
    first_offset: int
    last_offset: int


class WeightsFollower(StateFollower):
    """Knows the newest complete, valid version of every model, and tells when a newer one comes.

    Versions of a model only ever grow; an older or equal one is ignored. A version that is incomplete,
    damaged, forged, not finite, of an architecture that this process cannot run, or far from the newest one
    and following from none, is refused, and what is served stays. Decoding runs in a thread.

        async def swap(snapshot, model): ...
        follower = WeightsFollower(settings, swap)
        await follower.start()
        await follower.until_caught_up()
        ...
        await follower.stop()

    Payloads are not kept here: `on_version` gets each, and `fetch` reads a kept one again.
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
            on_version: awaited for each new version, with the model built from it, in evaluation mode; until
                reading has caught up, for none, then once for each model's newest. What it raises is logged.
            on_state: told why Kafka does not answer, or None when it does; for `/readyz`.
            keep_resume: whether `resume` is to be kept; for trainers.
            is_own: whether this process published a version: no model is built to check it, none handed over.
        """
        super().__init__(settings, Topics.of(settings).weights, on_state)
        self._on_version = on_version
        self._keep_resume = keep_resume
        self._is_own = is_own or (lambda _: False)
        self._kept: dict[str, list[_Kept]] = {}
        self._resume: dict[str, bytes] = {}
        self._ring = settings.weights_kept + SPARE_SLOTS
        self._unrelated: dict[str, int] = {}
        """Model → the last version that was far from the newest"""
        self._waiting: dict[str, tuple[WeightsSnapshot, CortexModel]] = {}
        self._telling = asyncio.Lock()
        self._assembler = Assembler()

    def models(self) -> list[str]:
        """Ids of the models that have a version."""
        return sorted(self._kept)

    def newest(self, model_id: str) -> WeightsManifest | None:
        """The manifest of the model's newest valid version; None where there is none yet."""
        kept = self._kept.get(model_id)
        return kept[-1].manifest if kept else None

    def history(self, model_id: str) -> list[WeightsManifest]:
        """The last `weights_kept` versions, oldest first: what a rollback or a pin may name."""
        return [k.manifest for k in self._kept.get(model_id, [])]

    def resume(self, model_id: str) -> bytes:
        """What the trainer of the newest version left with it; empty where nothing is known."""
        return self._resume.get(model_id, b"")

    async def fetch(self, model_id: str, version: int) -> WeightsSnapshot:
        """Reads a kept version again.

        Raises:
            WeightsError: it is not kept (any more).
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
                        # What was refused when it was followed is refused again.
                        with contextlib.suppress(WeightsError):
                            whole = assembler.add(record)
                    if whole is not None and whole[0].manifest == kept.manifest:
                        return whole[0]
        raise WeightsError(f"weights {model_id} v{version} were overwritten meanwhile; take a newer version")

    async def _start(self) -> None:
        await super()._start()
        waiting, self._waiting = self._waiting, {}
        for snapshot, model in waiting.values():
            await self._tell(snapshot, model)
        log.info("weights log read", models=len(self._kept), refused=dict(self.refused))

    async def _add(self, record: Any) -> None:
        whole = self._assembler.add(record)
        if whole is not None:
            await self._admit(record, *whole)
        elif record.value is None:
            self._forget(record)

    def _is_usual(self, reason: str) -> bool:
        # While a compacted topic is read from its start, holes in overwritten versions are its normal state.
        return reason == IncompleteError.reason and not self.caught_up.is_set()

    async def _admit(self, record: Any, snapshot: WeightsSnapshot, slot: int, first_offset: int) -> None:
        manifest, model_id = snapshot.manifest, snapshot.manifest.model_id
        kept, newest = self._kept.get(model_id, []), self.newest(model_id)
        if newest is not None and abs(manifest.version - newest.version) > self._ring:
            self._expect_successor(manifest, newest)
            kept = []  # a ring was missed, and with it all that was kept
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
            self._waiting.pop(manifest.model_id, None)
        elif self.caught_up.is_set():
            await self._tell(snapshot, model)
        else:
            self._waiting[manifest.model_id] = snapshot, model

    def _expect_successor(self, manifest: WeightsManifest, newest: WeightsManifest) -> None:
        """Lets a far version pass where it follows from the one before, which was far as well.

        A reader that was away for long finds a whole ring of versions that follow from each other; what was
        forged, or written by mistake, stands alone: trainers go on from the version that is served.
        """
        before = self._unrelated.get(manifest.model_id)
        self._unrelated[manifest.model_id] = manifest.version
        if before is None or manifest.parent != before:
            raise _UnrelatedError(
                f"weights {manifest.model_id} v{manifest.version} (parent {manifest.parent}) follow neither "
                f"from the newest, v{newest.version}, nor from a version after it"
            )

    def _build(self, snapshot: WeightsSnapshot) -> CortexModel:
        text_dim = snapshot.manifest.architecture.get("text_dim")
        if text_dim != self.settings.text_dim:
            raise _UnusableError(
                f"weights {snapshot.manifest.model_id} v{snapshot.manifest.version} are for embeddings of "
                f"{text_dim} numbers, this worker's have {self.settings.text_dim} (CORTEX_TEXT_DIM)"
            )
        try:
            return snapshot.to_model().freeze()
        except CortexError as error:
            raise _UnusableError(str(error)) from error
        except Exception as error:  # an architecture out of bounds fails anywhere inside torch
            raise _UnusableError(
                f"weights {snapshot.manifest.model_id} v{snapshot.manifest.version}: no model can be built "
                f"from their architecture ({type(error).__name__}: {error})"
            ) from error

    def _forget(self, record: Any) -> None:
        """A tombstone: that version can no longer be read. What is served stays served."""
        model_id, slot, _ = decode_key(record.key)
        kept = self._kept.get(model_id, [])
        rest = [k for k in kept if k.slot != slot or k is kept[-1]]
        if kept:
            self._kept[model_id] = rest

    async def _tell(self, snapshot: WeightsSnapshot, model: CortexModel) -> None:
        if self._on_version is None:
            return
        manifest = snapshot.manifest
        async with self._telling:  # one at a time, so that nobody swaps an older version in last
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
