"""From a request to a logged decision: texts to embeddings, a model, its choice, the event that records it.

Inference workers and in-process clients both decide here. It knows neither HTTP nor Kafka. Encoding, building
models and deciding run in small thread pools, never on the event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime

import numpy as np
import structlog
from prometheus_client import Counter, Gauge, Histogram

from cortex_core.errors import ConfigError
from cortex_core.metadata import metadata_features
from cortex_core.model import CortexModel, ModelConfig
from cortex_core.model import Decision as ModelDecision
from cortex_core.replay_buffer import FloatArray
from cortex_core.text_encoder import TextEncoder
from cortex_core.weights import WeightsManifest, WeightsSnapshot
from streams.events import Float16Array, InteractionEvent, utc_now
from streams.inference.api import (
    AppliedVersion,
    DecideRequest,
    DecideResponse,
    ModelDetail,
    ModelSummary,
    RequestError,
    RetrievedMemory,
    StrategyChoice,
    unit,
)
from streams.inference.embedder import Embedder, rounded
from streams.settings import Settings

log = structlog.get_logger(__name__)

VERSIONS_KEPT = 1_000
"""Applied versions remembered for each model."""

MODEL_S = Histogram(
    "cortex_model_seconds",
    "The model's decision alone, without encoding and Kafka",
    buckets=(0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 1.0),
)
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
            model = await asyncio.to_thread(CortexModel.create, self.config, model_id)
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


@dataclass(frozen=True, slots=True)
class Decided:
    """A decision: what the agent is told, and the event that must be in Kafka before."""

    response: DecideResponse
    event: bytes
    """the InteractionEvent as it goes to Kafka"""
    message: Float16Array
    """(D,) of the user's message"""


class Decider:
    """Embeds, decides and records. `close` ends its threads."""

    def __init__(self, settings: Settings, encoder: TextEncoder, models: Models) -> None:
        """
        Raises:
            ConfigError: the encoder's dimension is not `settings.text_dim`.
        """
        if encoder.dim != settings.text_dim:
            raise ConfigError(
                f"encoder {encoder.name} has {encoder.dim} dimensions, CORTEX_TEXT_DIM is "
                f"{settings.text_dim}: set it to the encoder's, for trainers too"
            )
        self.settings = settings
        self.models = models
        self.embedder = Embedder(encoder, settings.text_cache)
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="decide")

    async def decide(self, request: DecideRequest, interaction_id: str) -> Decided:
        """Decides with the newest weights. The same id, request and weights give the same decision.

        Raises:
            RequestError: a text, number or dimension outside the limits.
            WeightsError, KafkaError, OSError, TimeoutError: the model had to be fetched, and could not.
        """
        self.check(request)
        metadata = metadata_features(request.metadata, request.message, request.history)
        texts = [request.message, *request.history]
        texts += [m.text for m in request.memories if m.embedding is None and m.text is not None]
        rows = await self.embedder.encode(texts)
        turns = 1 + len(request.history)
        encoded = iter(rows[turns:])
        memories = [next(encoded) if m.embedding is None else m.embedding for m in request.memories]
        served = await self.models.get(request.model_id)
        return await asyncio.get_running_loop().run_in_executor(
            self._pool, self._decide, request, interaction_id, served, rows[:turns], metadata, memories
        )

    def warm_up(self) -> None:
        """One throw-away decision: at the first, torch loads modules for half a second."""
        message = self.embedder.encoder.inner.encode("How do I deploy?")
        model = CortexModel.create(self.models.config)
        model.decide(message, None, None, message[np.newaxis], rng=np.random.default_rng(0))

    async def embed(self, text: str) -> Float16Array:
        """(D,) of one text, as it is logged."""
        [row] = await self.embedder.encode([text])
        return row.astype(np.float16)

    def check(self, request: DecideRequest) -> None:
        """The limits that depend on settings.

        Raises:
            RequestError: naming every field that is outside.
        """
        most, dim, fields = self.settings.max_text_chars, self.embedder.dim, dict[str, str]()
        if len(request.memories) > self.settings.max_memories:
            fields["memories"] = f"{len(request.memories)} memories, at most {self.settings.max_memories}"
        if len(request.history) > self.settings.max_memories:
            fields["history"] = f"{len(request.history)} messages, at most {self.settings.max_memories}"
        texts = [("message", request.message)]
        texts += [(f"history.{i}", text) for i, text in enumerate(request.history)]
        for i, memory in enumerate(request.memories):
            if memory.text is not None:
                texts.append((f"memories.{i}.text (id {memory.id!r})", memory.text))
            if memory.embedding is not None and memory.embedding.shape != (dim,):
                fields[f"memories.{i}.embedding (id {memory.id!r})"] = (
                    f"{len(memory.embedding)} numbers, wanted {dim} as encoder {self.embedder.name} gives"
                )
            if len(fields) > 20:
                break
        fields |= {
            name: f"{len(text)} characters, at most {most}" for name, text in texts if len(text) > most
        }
        if fields:
            raise RequestError("; ".join(f"{name}: {what}" for name, what in fields.items()), fields)

    def close(self) -> None:
        """Ends the threads."""
        self.embedder.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _decide(  # noqa: PLR0917 - an executor takes no keyword arguments
        self,
        request: DecideRequest,
        interaction_id: str,
        served: Served,
        turns: list[FloatArray],
        metadata: FloatArray,
        memories: list[FloatArray],
    ) -> Decided:
        # Rounded before deciding: what is logged is exactly what the model saw. Encoded texts are already.
        message = np.array(turns[0])  # torch wants memory that it could write to
        history = rounded(unit(np.mean(turns[1:], axis=0))) if len(turns) > 1 else np.zeros_like(message)
        candidates = np.stack(memories) if memories else np.zeros((0, len(message)), np.float32)
        own = [i for i, memory in enumerate(request.memories) if memory.embedding is not None]
        candidates[own] = rounded(candidates[own])
        # The id is the seed: a request that is repeated to another worker meets the same chance.
        rng = np.random.default_rng(
            int.from_bytes(hashlib.blake2b(interaction_id.encode(), digest_size=16).digest(), "little")
        )
        started = time.perf_counter()
        decision = served.model.decide(
            message,
            history,
            metadata,
            candidates,
            top_k=self.settings.top_k if request.top_k is None else request.top_k,
            explore=request.explore,
            rng=rng,
        )
        MODEL_S.observe(time.perf_counter() - started)
        logged = decision.memory_indices + self._passed_over(len(memories), decision.memory_indices, rng)
        chances = decision.probabilities.tolist()
        if not request.explore:  # what was chosen was certain to be; the learner must not correct for chance
            chances = [float(i == decision.strategy_index) for i in range(len(chances))]
        event = InteractionEvent(
            occurred_at=utc_now(),
            interaction_id=interaction_id,
            conversation_id=request.conversation_id,
            model_id=request.model_id,
            agent_id=request.agent_id,
            weights_version=served.version,
            message=message,
            history=history,
            metadata=metadata.tolist(),
            situation=decision.situation,
            memories=candidates[logged],
            memory_ids=[request.memories[i].id for i in logged],
            memory_scores=decision.memory_scores,
            memory_propensities=decision.memory_propensities,
            strategy_id=decision.strategy_id,
            strategy_ids=list(served.model.registry.ids),
            probabilities=chances,
            context=decision.context,
            confidence=decision.confidence,
            text=request.message if self.settings.store_text else None,
        )
        return Decided(
            self._response(request, interaction_id, served, decision), event.to_bytes(), event.message
        )

    def _passed_over(self, candidates: int, retrieved: list[int], rng: np.random.Generator) -> list[int]:
        left = sorted(set(range(candidates)) - set(retrieved))
        count = min(self.settings.passed_over, len(left))
        return [left[i] for i in rng.choice(len(left), count, replace=False)] if count else []

    @staticmethod
    def _response(
        request: DecideRequest, interaction_id: str, served: Served, decision: ModelDecision
    ) -> DecideResponse:
        registry = served.model.registry
        return DecideResponse(
            interaction_id=interaction_id,
            conversation_id=request.conversation_id,
            model_id=request.model_id,
            weights_version=served.version,
            strategy=StrategyChoice(**asdict(registry[decision.strategy_index])),
            probabilities=dict(zip(registry.ids, decision.probabilities.tolist(), strict=True)),
            memories=[
                RetrievedMemory(id=request.memories[i].id, score=score)
                for i, score in zip(decision.memory_indices, decision.memory_scores, strict=True)
            ],
            confidence=decision.confidence,
            action=decision.action,
        )
