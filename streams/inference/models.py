"""The served models, and the swap to a newer version between two requests."""

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
"""Number of applied versions kept per model, for `GET /v1/models/{id}`."""


MODEL_VERSION = Gauge("cortex_model_version", "Weights version served, of models in memory", ["model_id"])


SWAPS = Counter("cortex_model_swaps_total", "Weights versions swapped in")


REPLY_TO_WEIGHTS = Histogram(
    "cortex_reply_to_weights_seconds",
    "Time from the oldest reply that a version, but not its parent, has learned from, until it serves here",
    buckets=(0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 120.0, 600.0),
)


@dataclass(frozen=True, slots=True)
class Served:
    """One version of a model; a request uses the same one throughout."""

    model_id: str
    version: int
    model: CortexModel
    manifest: WeightsManifest | None = None
    """None for untrained weights (version 0)"""


Fetch = Callable[[str], Awaitable[tuple[WeightsSnapshot, CortexModel] | None]]
"""Loads the version of a model to serve; None if it has none."""
Pinned = Callable[[str], int | None]
"""The only version of a model that may be served; None: the newest."""


class Models:
    """LRU cache of at most `capacity` loaded models; others are loaded on demand.

    All methods run on one event loop, and a swap is one assignment, so that it is atomic between two
    requests.
    """

    def __init__(
        self, config: ModelConfig, capacity: int, fetch: Fetch, pinned: Pinned = lambda _: None
    ) -> None:
        self.config = config
        self.capacity = capacity
        self._fetch = fetch
        self._pinned = pinned
        # No LRUCache: listing the models must not count as their use.
        self._ready: OrderedDict[str, Served] = OrderedDict()
        self._versions: dict[str, deque[AppliedVersion]] = {}
        self._loading: dict[str, asyncio.Task[Served]] = {}

    async def get(self, model_id: str) -> Served:
        """The pinned or the newest version of a model, or an untrained model if it has none.

        Raises:
            WeightsError, KafkaError, OSError, TimeoutError: it could not be loaded from Kafka.
        """
        served = self._ready.get(model_id)
        if served is not None and self._may_serve(model_id, served.version):
            self._ready.move_to_end(model_id)
            return served
        loading = self._loading.get(model_id)
        if loading is None:
            loading = self._loading[model_id] = asyncio.create_task(self._load(model_id))
            loading.add_done_callback(lambda _: self._loading.pop(model_id, None))
        return await asyncio.shield(loading)

    async def reload(self, model_id: str) -> None:
        """Loads the version to serve of a model in memory, after it was pinned or unpinned.

        Raises:
            WeightsError, KafkaError, OSError, TimeoutError: as `get`; the version in memory stays.
        """
        if model_id in self._ready:
            await self._load(model_id)

    def put(self, snapshot: WeightsSnapshot, model: CortexModel) -> None:
        """Swaps in a version. A model that was not requested yet is added only if there is room."""
        model_id = snapshot.manifest.model_id
        if not self._may_serve(model_id, snapshot.manifest.version):
            return
        if model_id in self._ready or model_id in self._loading or len(self._ready) < self.capacity:
            self._swap(Served(model_id, snapshot.manifest.version, model, snapshot.manifest))

    def summary(self, model_id: str, newest: WeightsManifest | None) -> ModelSummary:
        """The summary of a model; `newest` is its newest version in Kafka."""
        served = self._ready.get(model_id)
        manifest = served.manifest if served else newest
        return ModelSummary(
            model_id=model_id,
            version=manifest.version if manifest else 0,
            in_memory=served is not None,
            pinned=self._pinned(model_id),
            updates=manifest.updates if manifest else 0,
            interactions=manifest.interactions if manifest else 0,
            ema_loss=manifest.ema_loss if manifest else None,
            encoder=manifest.encoder if manifest else "",
        )

    def detail(self, model_id: str, newest: WeightsManifest | None) -> ModelDetail:
        """The summary of a model and its applied versions."""
        summary = self.summary(model_id, newest)
        return ModelDetail(**summary.model_dump(), versions=list(self._versions.get(model_id, ())))

    def ids(self) -> list[str]:
        """Ids of the loaded models, in the order of their last use."""
        return list(self._ready)

    def _may_serve(self, model_id: str, version: int) -> bool:
        return self._pinned(model_id) in (None, version)

    async def _load(self, model_id: str) -> Served:
        while True:
            fetched = await self._fetch(model_id)
            if fetched is None:
                model = await asyncio.to_thread(lambda: CortexModel.create(self.config, model_id).freeze())
                return self._swap(Served(model_id, 0, model))
            snapshot, model = fetched
            if self._may_serve(model_id, snapshot.manifest.version):  # not pinned meanwhile
                return self._swap(Served(model_id, snapshot.manifest.version, model, snapshot.manifest))

    def _swap(self, served: Served) -> Served:
        model_id, manifest = served.model_id, served.manifest
        old = self._ready.get(model_id)
        if old is not None and old.version >= served.version and self._may_serve(model_id, old.version):
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
            evicted, _ = self._ready.popitem(last=False)
            self._versions.pop(evicted, None)
            MODEL_VERSION.remove(evicted)
        return served

    @staticmethod
    def _observe_latency(manifest: WeightsManifest, now: datetime, *, fresh: bool) -> None:
        # A version loaded at start or after eviction was trained earlier: not a measurement of the latency.
        if fresh and manifest.oldest_reply_at is not None:
            REPLY_TO_WEIGHTS.observe(max(0.0, (now - manifest.oldest_reply_at).total_seconds()))
