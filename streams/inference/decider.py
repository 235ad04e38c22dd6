"""From a request to a logged decision: texts to embeddings, a model, its choice, the event that records it.

Inference workers and in-process clients both decide here. It knows neither HTTP nor Kafka. Encoding, building
models and deciding run in small thread pools, never on the event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
import structlog
from prometheus_client import Histogram

from cortex_core.arrays import FloatArray
from cortex_core.errors import ConfigError
from cortex_core.metadata import metadata_features
from cortex_core.model import CortexModel
from cortex_core.model import Decision as ModelDecision
from cortex_core.text_encoder import TextEncoder
from streams.events import Float16Array, InteractionEvent, utc_now
from streams.inference.api import (
    DecideRequest,
    DecideResponse,
    RequestError,
    RetrievedMemory,
    StrategyChoice,
    unit,
)
from streams.inference.embedder import Embedder, rounded
from streams.inference.models import Models, Served
from streams.settings import Settings

log = structlog.get_logger(__name__)


MODEL_S = Histogram(
    "cortex_model_seconds",
    "The model's decision alone, without encoding and Kafka",
    buckets=(0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 1.0),
)


@dataclass(frozen=True, slots=True)
class Decided:
    """A decision: what the agent is told, and the event that must be in Kafka before."""

    response: DecideResponse
    event: bytes
    """the InteractionEvent as it goes to Kafka"""


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
        """One encoding and one trial decision: torch loads modules for half a second at the first of each."""
        self.embedder.encoder.inner.encode("How do I deploy?")
        CortexModel.create(self.models.config).freeze()

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
        return Decided(self._response(request, interaction_id, served, decision), event.to_bytes())

    def _passed_over(self, candidates: int, retrieved: list[int], rng: np.random.Generator) -> list[int]:
        left = sorted(set(range(candidates)) - set(retrieved))
        count = min(self.settings.logged_negatives, len(left))
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
