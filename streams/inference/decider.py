"""From a request to a decision and its event: encodes texts, runs the model, builds the InteractionEvent.

Used by inference workers and in-process clients; independent of HTTP and Kafka. Encoding, loading models and
deciding run in small thread pools, not on the event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
import structlog
from prometheus_client import Histogram

from cortex_core.arrays import FloatArray
from cortex_core.errors import ConfigError
from cortex_core.metadata import metadata_features
from cortex_core.model import CortexModel, ModelDecision
from cortex_core.text_encoder import TextEncoder
from cortex_core.weights import WeightsManifest
from streams.events import Float16Array, InteractionEvent, utc_now
from streams.inference.api import (
    DecideRequest,
    DecideResponse,
    Memory,
    RequestError,
    RetrievedMemory,
    StrategyChoice,
    unit_vector,
)
from streams.inference.embedder import Embedder, rounded
from streams.inference.models import Models, Served
from streams.settings import Settings

log = structlog.get_logger(__name__)


MODEL_S = Histogram(
    "cortex_model_seconds",
    "Duration of the model's decision, without encoding and Kafka",
    buckets=(0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 1.0),
)


@dataclass(frozen=True, slots=True)
class Decided:
    """A decision: the response, and the event that must be in Kafka first."""

    response: DecideResponse
    event: bytes
    """the encoded InteractionEvent"""


class Decider:
    """Makes decisions. `close` ends its threads."""

    def __init__(self, settings: Settings, encoder: TextEncoder, models: Models) -> None:
        """
        Raises:
            ConfigError: the encoder's dimension is not `settings.text_dim`.
        """
        if encoder.dim != settings.text_dim:
            raise ConfigError(
                f"encoder {encoder.name} has {encoder.dim} dimensions, CORTEX_TEXT_DIM is "
                f"{settings.text_dim}: set it to {encoder.dim}, also for trainers"
            )
        self.settings = settings
        self.models = models
        self.embedder = Embedder(encoder, settings.text_cache)
        self.strategies = models.config.strategies
        """The strategies to choose among; a model may have learned others before."""
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="decide")

    async def decide(self, request: DecideRequest, interaction_id: str) -> Decided:
        """Decides with the newest weights. The same id, request and weights give the same decision.

        Raises:
            RequestError: a text, number or dimension exceeds a limit, or the model is of another encoder.
            WeightsError, KafkaError, OSError, TimeoutError: the model could not be loaded from Kafka.
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
        if served.manifest is not None and (why := self.refusal(served.manifest)):
            raise RequestError(why, {"model_id": why})
        return await asyncio.get_running_loop().run_in_executor(
            self._pool, self._decide, request, interaction_id, served, rows[:turns], metadata, memories
        )

    def refusal(self, manifest: WeightsManifest) -> str:
        """Why this worker does not serve a model; empty if it does."""
        if manifest.encoder in ("", self.embedder.name):
            return ""
        return (
            f"model {manifest.model_id!r} has learned from text encoder {manifest.encoder!r}, and this "
            f"worker has {self.embedder.name!r}: set CORTEX_ENCODER to the former, or use another model_id"
        )

    def warm_up(self) -> None:
        """Makes a trial encoding and a trial decision: torch takes half a second for the first of each."""
        self.embedder.encoder.inner.encode("How do I deploy?")
        CortexModel.create(self.models.config).freeze()

    async def embed(self, text: str) -> Float16Array:
        """(D,) embedding of a text, as it is logged."""
        [row] = await self.embedder.encode([text])
        return row.astype(np.float16)

    def check(self, request: DecideRequest) -> None:
        """Checks the limits that depend on settings.

        Raises:
            RequestError: names every field that exceeds a limit.
        """
        most, dim, fields = self.settings.max_text_chars, self.embedder.dim, dict[str, str]()
        if len(request.memories) > self.settings.max_memories:
            fields["memories"] = (
                f"{len(request.memories)} memories, expected at most {self.settings.max_memories}"
            )
        if len(request.history) > self.settings.max_memories:
            fields["history"] = (
                f"{len(request.history)} messages, expected at most {self.settings.max_memories}"
            )
        texts = [("message", request.message)]
        texts += [(f"history.{i}", text) for i, text in enumerate(request.history)]
        for i, memory in enumerate(request.memories):
            if memory.text is not None:
                texts.append((f"memories.{i}.text (id {memory.id!r})", memory.text))
            if memory.embedding is not None and memory.embedding.shape != (dim,):
                fields[f"memories.{i}.embedding (id {memory.id!r})"] = (
                    f"{len(memory.embedding)} numbers, expected {dim} as from encoder {self.embedder.name}"
                )
            if len(fields) > 20:
                break
        fields |= {
            name: f"{len(text)} characters, expected at most {most}"
            for name, text in texts
            if len(text) > most
        }
        if fields:
            raise RequestError("; ".join(f"{name}: {problem}" for name, problem in fields.items()), fields)

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
        # Rounded before deciding, so that the logged values are those that the model used. Encoded texts are
        # already rounded.
        message = np.array(turns[0])  # torch requires writable memory
        history = (
            rounded(unit_vector(np.mean(turns[1:], axis=0))) if len(turns) > 1 else np.zeros_like(message)
        )
        candidates = np.stack(memories) if memories else np.zeros((0, len(message)), np.float32)
        own = [i for i, memory in enumerate(request.memories) if memory.embedding is not None]
        candidates[own] = rounded(candidates[own])
        # The id is the seed, so that a retry at another worker gives the same decision.
        # The same memory under several ids takes one place in the slate, and is learned from once.
        distinct = _distinct(candidates, request.memories)
        candidates, ids = candidates[distinct], [request.memories[i].id for i in distinct]
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
            strategies=self.strategies,
            rng=rng,
        )
        MODEL_S.observe(time.perf_counter() - started)
        logged = decision.memory_indices + self._negatives(len(ids), decision.memory_indices, rng)
        probabilities = self._chosen_among(served, decision)
        if not request.explore:  # the choice was deterministic: its propensity is 1
            probabilities = {id_: float(id_ == decision.strategy_id) for id_ in probabilities}
        event = InteractionEvent(
            occurred_at=utc_now(),
            interaction_id=interaction_id,
            conversation_id=request.conversation_id,
            model_id=request.model_id,
            agent_id=request.agent_id,
            weights_version=served.version,
            encoder=self.embedder.name,
            message=message,
            history=history,
            metadata=metadata.tolist(),
            situation=decision.situation,
            memories=candidates[logged],
            memory_ids=[ids[i] for i in logged],
            memory_scores=decision.memory_scores,
            memory_propensities=decision.memory_propensities,
            strategy_id=decision.strategy_id,
            strategy_ids=list(probabilities),
            probabilities=list(probabilities.values()),
            context=decision.context,
            confidence=decision.confidence,
            text=request.message if self.settings.store_text else None,
        )
        return Decided(self._response(request, interaction_id, served, decision, ids), event.to_bytes())

    def _negatives(self, candidates: int, retrieved: list[int], rng: np.random.Generator) -> list[int]:
        others = sorted(set(range(candidates)) - set(retrieved))
        count = min(self.settings.logged_negatives, len(others))
        return [others[i] for i in rng.choice(len(others), count, replace=False)] if count else []

    def _chosen_among(self, served: Served, decision: ModelDecision) -> dict[str, float]:
        every = zip(served.model.registry.ids, decision.probabilities.tolist(), strict=True)
        return {id_: p for id_, p in every if id_ in self.strategies}

    def _response(
        self,
        request: DecideRequest,
        interaction_id: str,
        served: Served,
        decision: ModelDecision,
        ids: list[str],
    ) -> DecideResponse:
        registry = served.model.registry
        return DecideResponse(
            interaction_id=interaction_id,
            conversation_id=request.conversation_id,
            model_id=request.model_id,
            weights_version=served.version,
            strategy=StrategyChoice(**asdict(registry[decision.strategy_index])),
            probabilities=self._chosen_among(served, decision),
            memories=[
                RetrievedMemory(id=ids[i], score=score)
                for i, score in zip(decision.memory_indices, decision.memory_scores, strict=True)
            ],
            confidence=decision.confidence,
            action=decision.action,
        )


def _distinct(candidates: FloatArray, memories: Sequence[Memory]) -> list[int]:
    """Rows of candidates without those whose embedding, or text, came before."""
    first: dict[bytes | str, int] = {}
    for i, (row, memory) in enumerate(zip(candidates, memories, strict=True)):
        # All texts that say nothing to the encoder share the zero vector; they are told apart by their words.
        first.setdefault(row.tobytes() if row.any() else memory.text or "", i)
    return list(first.values())
