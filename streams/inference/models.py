"""The models in memory, and the swap to a newer version between two requests."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import NoReturn

import structlog
from prometheus_client import Counter, Gauge, Histogram

from cortex_core.errors import WeightsError
from cortex_core.model import CortexModel, ModelConfig
from cortex_core.weights import WeightsManifest
from streams.events import utc_now
from streams.failures import error_text
from streams.inference.api import AppliedVersion, ModelDetail, ModelSummary

log = structlog.get_logger(__name__)

RETRY_S = 1.0
"""Seconds after which the load of a changed model is tried again, if Kafka did not answer."""
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


Load = Callable[[str], Awaitable[tuple[WeightsManifest, CortexModel] | None]]
"""Loads the version of a model to serve; None if it has none."""
Pinned = Callable[[str], int | None]
"""The only version of a model that may be served; None: the newest."""


class Models:
    """LRU cache of at most `capacity` models; a requested model is loaded, and then kept up to date.

    All methods run on one event loop, and a swap is one assignment, so that it is atomic between two
    requests. Of the changes while a version is being loaded, only the last is loaded.
    """

    def __init__(
        self, config: ModelConfig, capacity: int, load: Load, pinned: Pinned = lambda _: None
    ) -> None:
        self.config = config
        self.capacity = capacity
        self._load_version = load
        self._pinned = pinned
        # No LRUCache: neither listing the models nor their updates must count as their use.
        self._ready: OrderedDict[str, Served] = OrderedDict()
        self._versions: dict[str, deque[AppliedVersion]] = {}
        self._loading: dict[str, asyncio.Task[Served]] = {}
        self._changed: dict[str, None] = {}
        """Models in memory whose version to serve is another one by now; in order."""
        self._any_changed = asyncio.Event()

    async def get(self, model_id: str) -> Served:
        """The pinned or the newest version of a model, or an untrained model if it has none.

        Raises:
            WeightsError, KafkaError, OSError, TimeoutError: it could not be loaded from Kafka.
        """
        served = self._ready.get(model_id)
        if served is not None and self._may_serve(model_id, served.version):
            self._ready.move_to_end(model_id)
            return served
        return await asyncio.shield(self._start_loading(model_id))

    def changed(self, model_id: str) -> None:
        """Notes that a model in memory has another version to serve: `update` loads it."""
        if model_id in self._ready or model_id in self._loading:
            self._changed[model_id] = None
            self._any_changed.set()

    async def update(self) -> NoReturn:
        """Loads the changed models, one after another, until it is cancelled."""
        while True:
            await self._any_changed.wait()
            failed = False
            for model_id in list(self._changed):
                failed |= not await self._update(model_id)
            if not self._changed:
                self._any_changed.clear()
            elif failed:
                await asyncio.sleep(RETRY_S)

    async def _update(self, model_id: str) -> bool:
        if model_id in self._loading:  # possibly of the version before
            await asyncio.wait([self._loading[model_id]])
        self._changed.pop(model_id, None)
        served = self._ready.get(model_id)
        if served is None or self._pinned(model_id) == served.version:
            return True
        try:
            await self._start_loading(model_id)
        except Exception as error:
            log.warning("keeping the version in memory", model_id=model_id, error=error_text(error))
            # A pinned version that is not kept any more is not going to come back.
            if not isinstance(error, WeightsError):
                self._changed[model_id] = None
                return False
        return True

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

    def _start_loading(self, model_id: str) -> asyncio.Task[Served]:
        # One at a time for each model, so that an older version never replaces a newer one.
        loading = self._loading.get(model_id)
        if loading is None:
            loading = self._loading[model_id] = asyncio.create_task(self._load(model_id))
            loading.add_done_callback(lambda _: self._loading.pop(model_id, None))
        return loading

    async def _load(self, model_id: str) -> Served:
        while True:
            loaded = await self._load_version(model_id)
            if loaded is None:
                if model_id in self._ready:  # forgotten: untrained again with its next request
                    return self._evict(model_id)
                model = await asyncio.to_thread(lambda: CortexModel.create(self.config, model_id).freeze())
                return self._swap(Served(model_id, 0, model))
            manifest, model = loaded
            if self._may_serve(model_id, manifest.version):  # not pinned meanwhile
                return self._swap(Served(model_id, manifest.version, model, manifest))

    def _swap(self, served: Served) -> Served:
        model_id, manifest = served.model_id, served.manifest
        old = self._ready.get(model_id)
        if old is not None and (old.version, old.manifest) == (served.version, served.manifest):
            return old
        self._ready[model_id] = served
        MODEL_VERSION.labels(model_id).set(served.version)
        if manifest is not None:
            now = utc_now()
            SWAPS.inc()
            self._observe_latency(manifest, now, fresh=old is not None)
            self._versions.setdefault(model_id, deque(maxlen=VERSIONS_KEPT)).append(
                AppliedVersion(version=served.version, applied_at=now, consumed=manifest.consumed)
            )
        while len(self._ready) > self.capacity:
            self._evict(next(iter(self._ready)))
        return served

    def _evict(self, model_id: str) -> Served:
        self._versions.pop(model_id, None)
        MODEL_VERSION.remove(model_id)
        return self._ready.pop(model_id)

    @staticmethod
    def _observe_latency(manifest: WeightsManifest, now: datetime, *, fresh: bool) -> None:
        # A version loaded at start or after eviction was trained earlier: not a measurement of the latency.
        if fresh and manifest.oldest_reply_at is not None:
            REPLY_TO_WEIGHTS.observe(max(0.0, (now - manifest.oldest_reply_at).total_seconds()))
