"""The service behind an agent: decides, records, takes replies, follows weights. No HTTP.

    service = Service(settings)
    await service.start()                        # returns when encoder, Kafka and weights are there
    answer = await service.decide(request)       # its interaction stands in Kafka
    await service.reply(reply)
    await service.stop()                         # what was not acknowledged was not answered

The inference worker serves one over HTTP; an in-process client owns one. Order of effects, always: decide,
publish and wait for Kafka's acknowledgement, answer.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable

import structlog
from aiokafka.errors import KafkaError

from cortex_core.errors import UnavailableError, WeightsError
from cortex_core.model import CortexModel
from cortex_core.text_encoder import load_encoder
from cortex_core.weights import WeightsSnapshot
from streams.events import ReplyEvent, new_id, utc_now
from streams.inference.api import (
    DecideRequest,
    DecideResponse,
    ModelDetail,
    ModelList,
    ReplyRequest,
    ReplyResponse,
    RequestError,
)
from streams.inference.decider import Decider
from streams.inference.models import Models
from streams.inference.once import IdempotentPublisher, Record
from streams.kafka.publisher import Publisher
from streams.kafka.topics import Topics
from streams.settings import Settings
from streams.weights.architecture import model_config
from streams.weights.follower import WeightsFollower

log = structlog.get_logger(__name__)

NEEDS = ("encoder", "kafka", "weights")
"""What must be there before requests are answered."""


class Service:
    """Decisions and replies for agents, with weights followed from Kafka and events produced to it."""

    def __init__(self, settings: Settings, on_state: Callable[[str, str | None], None] | None = None) -> None:
        """
        Args:
            on_state: told (need, why it is not there or None) for the needs `encoder`, `kafka`, `weights`.
        """
        self.settings = settings
        self.missing: dict[str, str] = dict.fromkeys(NEEDS, "not there yet")
        """Needs that are not there, and why; requests are answered while it is empty."""
        self._on_state = on_state or (lambda _need, _why: None)
        self._topics = Topics.of(settings)
        self._publisher = Publisher(settings, lambda why: self._state("kafka", why))
        self._follower = WeightsFollower(settings, self._swap, on_state=self._follower_state)
        self._models = Models(model_config(settings), settings.models_in_memory, self._fetch)
        self._decider: Decider | None = None
        self._interactions = IdempotentPublisher(DecideResponse, "interaction_id", self._publisher)
        self._replies = IdempotentPublisher(ReplyResponse, "reply_id", self._publisher)

    async def start(self) -> None:
        """Returns when everything is there; waits for a Kafka that is away, with backoff.

        Raises:
            ConfigError: encoder or topics do not fit the settings.
        """
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._load_encoder())
                group.create_task(self._connect())
        except BaseExceptionGroup as group_error:
            raise group_error.exceptions[0] from None

    async def stop(self) -> None:
        """Waits shortly for what is under way, then closes everything; safe to call twice."""
        await self._publisher.stop()
        await self._follower.stop()
        if self._decider is not None:
            self._decider.close()

    @property
    def refused(self) -> Counter[str]:
        """Weights versions refused, by reason."""
        return self._follower.refused

    async def decide(self, request: DecideRequest) -> DecideResponse:
        """Decides; the interaction stands in Kafka when this returns.

        Raises:
            RequestError: the request is unusable, or its interaction_id stands for another one.
            UnavailableError: repeat later with the same interaction_id.
        """
        decider = self._ready()
        interaction_id = request.interaction_id or new_id()

        async def make() -> Record[DecideResponse]:
            try:
                decided = await decider.decide(request, interaction_id)
            except (KafkaError, OSError, TimeoutError, WeightsError) as error:
                raise UnavailableError(
                    f"the model cannot be read ({type(error).__name__}: {error})"
                ) from error
            key = request.conversation_id.encode()
            return Record(decided.response, self._topics.interactions, key, decided.event)

        return await self._interactions.answer(
            interaction_id, request.conversation_id, _fingerprint(request), make
        )

    async def reply(self, request: ReplyRequest) -> ReplyResponse:
        """Takes a reply; it stands in Kafka when this returns.

        Raises:
            RequestError: the reply is unusable, or its reply_id stands for another one.
            UnavailableError: repeat later with the same reply_id.
        """
        decider = self._ready()
        if len(request.text) > self.settings.max_text_chars:
            what = f"{len(request.text)} characters, at most {self.settings.max_text_chars}"
            raise RequestError(f"text: {what}", {"text": what})
        interaction = self._interactions.known(request.interaction_id or "")
        if interaction is not None and interaction.conversation_id != request.conversation_id:
            raise RequestError(
                f"interaction {request.interaction_id!r} is of conversation {interaction.conversation_id!r}, "
                f"the reply names {request.conversation_id!r}: replies are joined within one conversation",
                {"conversation_id": f"wanted {interaction.conversation_id!r}"},
            )
        reply_id = request.reply_id or new_id()

        async def make() -> Record[ReplyResponse]:
            event = ReplyEvent(
                occurred_at=utc_now(),
                reply_id=reply_id,
                conversation_id=request.conversation_id,
                interaction_id=request.interaction_id,
                kind=request.kind,
                text=request.text,
                rating=request.rating,
                embedding=await decider.embed(request.text) if request.text.strip() else None,
            )
            return Record(
                ReplyResponse(reply_id=reply_id, occurred_at=event.occurred_at),
                self._topics.replies,
                request.conversation_id.encode(),
                event.to_bytes(),
            )

        return await self._replies.answer(
            reply_id,
            request.conversation_id,
            hashlib.blake2b(request.model_dump_json().encode(), digest_size=16).digest(),
            make,
        )

    def models(self) -> ModelList:
        """All models that have weights or are in memory."""
        decider = self._ready()
        ids = sorted({*self._models.ids(), *self._follower.models()})
        return ModelList(
            encoder=decider.embedder.name,
            dim=decider.embedder.dim,
            models=[self._models.summary(id_, self._follower.newest(id_)) for id_ in ids],
        )

    def model(self, model_id: str) -> ModelDetail:
        """One model; version 0 where nothing was learned yet."""
        return self._models.detail(model_id, self._follower.newest(model_id))

    def _ready(self) -> Decider:
        if self._decider is None or self.missing:
            raise UnavailableError("; ".join(f"{need}: {why}" for need, why in self.missing.items()))
        return self._decider

    def _state(self, need: str, why: str | None) -> None:
        if why is None:
            self.missing.pop(need, None)
        else:
            self.missing[need] = why
        self._on_state(need, why)

    def _follower_state(self, why: str | None) -> None:
        # Once caught up, old weights go on deciding while the log cannot be read: better than no answer.
        if not self._follower.caught_up.is_set():
            self._state("weights", why or "being read")

    async def _load_encoder(self) -> None:
        self._state("encoder", f"{self.settings.encoder} is being loaded")
        encoder = await asyncio.to_thread(load_encoder, self.settings.encoder)
        decider = self._decider = Decider(self.settings, encoder, self._models)
        await asyncio.to_thread(decider.warm_up)
        self._state("encoder", None)

    async def _connect(self) -> None:
        await self._publisher.start()
        self._state("weights", "being read")
        await self._follower.start()
        await self._follower.until_caught_up()
        self._state("weights", None)

    async def _swap(self, snapshot: WeightsSnapshot, model: CortexModel) -> None:
        self._models.put(snapshot, model)
        log.debug("weights swapped", model_id=snapshot.manifest.model_id, version=snapshot.manifest.version)

    async def _fetch(self, model_id: str) -> tuple[WeightsSnapshot, CortexModel] | None:
        """Reads a model's newest version that is no longer in memory."""
        manifest = self._follower.newest(model_id)
        if manifest is None:
            return None
        snapshot = await self._follower.fetch(model_id, manifest.version)
        return snapshot, await asyncio.to_thread(snapshot.to_model)


def _fingerprint(request: DecideRequest) -> bytes:
    """Tells requests apart under one interaction_id; empty where the id is the service's own."""
    if request.interaction_id is None:
        return b""
    digest = hashlib.blake2b(request.model_dump_json(exclude={"memories"}).encode(), digest_size=16)
    for memory in request.memories:
        digest.update(f"{memory.id}\0{memory.text or ''}\0".encode())
        if memory.embedding is not None:
            digest.update(memory.embedding.tobytes())
    return digest.digest()
