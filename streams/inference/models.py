"""The models that are served, and the swap to a newer version between two requests."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime

from prometheus_client import Counter, Gauge, Histogram

from cortex_core.model import CortexModel, ModelConfig
from cortex_core.weights import WeightsManifest, WeightsSnapshot
from streams.events import utc_now
from streams.inference.api import (
    AppliedVersion,
    ModelDetail,
    ModelSummary,
)

VERSIONS_KEPT = 1_000
"""Applied versions remembered for each model."""


MODEL_VERSION = Gauge("cortex_model_version", "Weights version served, of models in memory", ["model_id"])


SWAPS = Counter("cortex_model_swaps_total", "Weights versions swapped in")


REPLY_TO_WEIGHTS = Histogram(
    "cortex_reply_to_weights_seconds",
    "From the oldest reply that a version has learned from, and its parent had not, to its being served here",
    buckets=(0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 120.0, 600.0),
)


@dataclass(frozen=True, slots=True)
class Served:
    """One version of one model, as a request uses it from beginning to end."""

    model_id: str
    version: int
    model: CortexModel
    manifest: WeightsManifest | None = None
    """None at birth, version 0"""


Fetch = Callable[[str], Awaitable[tuple[WeightsSnapshot, CortexModel] | None]]
"""Reads the newest version of a model again; None where it has none."""


class Models:
    """The models that are ready, at most `capacity`; the least recently used leaves, to be fetched on demand.

    All methods run on one event loop, and a swap is one assignment: atomic between two requests.
    """

    def __init__(self, config: ModelConfig, capacity: int, fetch: Fetch) -> None:
        self.config = config
        self.capacity = capacity
        self._fetch = fetch
        self._ready: OrderedDict[str, Served] = OrderedDict()
        self._versions: dict[str, deque[AppliedVersion]] = {}
        self._loading: dict[str, asyncio.Task[Served]] = {}

    async def get(self, model_id: str) -> Served:
        """The model to decide with: its newest version, or the model at birth where it has none.

        Raises:
            WeightsError, KafkaError, OSError, TimeoutError: it had to be fetched, and could not.
        """
        served = self._ready.get(model_id)
        if served is not None:
            self._ready.move_to_end(model_id)
            return served
        loading = self._loading.get(model_id)
        if loading is None:
            loading = self._loading[model_id] = asyncio.create_task(self._load(model_id))
            loading.add_done_callback(lambda _: self._loading.pop(model_id, None))
        return await asyncio.shield(loading)

    def put(self, snapshot: WeightsSnapshot, model: CortexModel) -> None:
        """Swaps in a version. A model that nobody has asked for is taken in only while there is room."""
        model_id = snapshot.manifest.model_id
        if model_id in self._ready or model_id in self._loading or len(self._ready) < self.capacity:
            self._swap(Served(model_id, snapshot.manifest.version, model, snapshot.manifest))

    def summary(self, model_id: str, newest: WeightsManifest | None) -> ModelSummary:
        """What is served for a model; `newest` is what Kafka holds of it."""
        served = self._ready.get(model_id)
        manifest = served.manifest if served else newest
        return ModelSummary(
            model_id=model_id,
            version=manifest.version if manifest else 0,
            in_memory=served is not None,
            updates=manifest.updates if manifest else 0,
            interactions=manifest.interactions if manifest else 0,
            ema_loss=manifest.ema_loss if manifest else None,
        )

    def detail(self, model_id: str, newest: WeightsManifest | None) -> ModelDetail:
        """The summary and the versions applied."""
        summary = self.summary(model_id, newest)
        return ModelDetail(**summary.model_dump(), versions=list(self._versions.get(model_id, ())))

    def ids(self) -> list[str]:
        """Of the models in memory."""
        return list(self._ready)

    async def _load(self, model_id: str) -> Served:
        fetched = await self._fetch(model_id)
        if fetched is None:
            model = await asyncio.to_thread(lambda: CortexModel.create(self.config, model_id).freeze())
            return self._swap(Served(model_id, 0, model))
        snapshot, model = fetched
        return self._swap(Served(model_id, snapshot.manifest.version, model, snapshot.manifest))

    def _swap(self, served: Served) -> Served:
        model_id, manifest = served.model_id, served.manifest
        old = self._ready.get(model_id)
        if old is not None and old.version >= served.version:
            return old
        self._ready[model_id] = served
        self._ready.move_to_end(model_id)
        MODEL_VERSION.labels(model_id).set(served.version)
        if manifest is not None:
            now = utc_now()
            SWAPS.inc()
            self._observe_latency(manifest, now, fresh=old is not None)
            self._versions.setdefault(model_id, deque(maxlen=VERSIONS_KEPT)).append(
                AppliedVersion(version=served.version, applied_at=now, consumed=manifest.consumed)
            )
        while len(self._ready) > self.capacity:
            gone, _ = self._ready.popitem(last=False)
            self._versions.pop(gone, None)
            MODEL_VERSION.remove(gone)
        return served

    @staticmethod
    def _observe_latency(manifest: WeightsManifest, now: datetime, *, fresh: bool) -> None:
        # A version read at start or after eviction was learned long ago and says nothing of the loop's speed.
        if fresh and manifest.oldest_reply_at is not None:
            REPLY_TO_WEIGHTS.observe(max(0.0, (now - manifest.oldest_reply_at).total_seconds()))
