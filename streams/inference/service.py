"""The inference service, without HTTP: makes decisions, accepts replies, follows weights and pins.

    service = Service(settings)
    await service.start()                        # returns when encoder, Kafka and weights are ready
    answer = await service.decide(request)       # its interaction is in Kafka
    await service.reply(reply)
    await service.stop()                         # what was not acknowledged was not answered

The inference worker serves it over HTTP; an in-process client owns one. The order of effects is: decide,
publish, wait for Kafka's acknowledgement, answer.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable
from typing import NoReturn

import structlog
from aiokafka.errors import KafkaError

from cortex_core.errors import InputError, UnavailableError, WeightsError
from cortex_core.model import CortexModel
from cortex_core.text_encoder import load_encoder
from cortex_core.weights import WeightsManifest, WeightsSnapshot
from streams.events import ReplyEvent, new_id, utc_now
from streams.failures import error_text
from streams.heartbeats import MODELS_REPORTED, Activity, ModelState
from streams.inference.api import (
    DecideRequest,
    DecideResponse,
    ModelDetail,
    ModelList,
    ModelSummary,
    ReplyRequest,
    ReplyResponse,
    RequestError,
    UnknownModelError,
)
from streams.inference.decider import Decider
from streams.inference.models import Models
from streams.inference.once import IdempotentPublisher, Record
from streams.kafka.publisher import Publisher
from streams.kafka.topics import Topics
from streams.settings import Settings
from streams.weights.architecture import build_model, model_config, strategies_changed
from streams.weights.control import Control, ControlFollower
from streams.weights.follower import WeightsFollower

log = structlog.get_logger(__name__)

DEPENDENCIES = ("encoder", "kafka", "weights")
"""Dependencies that must be ready before requests are answered."""


class Service:
    """Makes decisions and accepts replies; reads weights and pins from Kafka and publishes events to it."""

    def __init__(self, settings: Settings, on_state: Callable[[str, str | None], None] | None = None) -> None:
        """
        Args:
            on_state: called with (dependency, reason why it is not ready, or None) for `encoder`, `kafka` and
                `weights`.
        """
        self.settings = settings
        self.missing: dict[str, str] = dict.fromkeys(DEPENDENCIES, "not ready yet")
        """Dependency → reason, for those that are not ready; requests are answered while it is empty."""
        self._on_state = on_state or (lambda _dependency, _reason: None)
        self._topics = Topics.of(settings)
        self._publisher = Publisher(settings, lambda why: self._state("kafka", why))
        self._models = Models(model_config(settings), settings.models_in_memory, self._load, self._pinned)
        self._updating: asyncio.Task[NoReturn] | None = None
        self._follower = WeightsFollower(settings, self._models.changed, on_state=self._follower_state)
        self._controls = ControlFollower(settings, self._control, on_state=self._follower_state)
        self._decider: Decider | None = None
        self._interactions = IdempotentPublisher(DecideResponse, "interaction_id", self._publisher)
        self._replies = IdempotentPublisher(ReplyResponse, "reply_id", self._publisher)

    async def start(self) -> None:
        """Returns when everything is ready; waits for an unavailable Kafka, with backoff.

        Raises:
            ConfigError: encoder or topics do not match the settings.
        """
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._load_encoder())
                group.create_task(self._connect())
        except BaseExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        for model_id, why in self.refused_models().items():
            log.error("model not served", model_id=model_id, why=why)
        for model_id, what in self.strategies_changed().items():
            log.warning("strategies changed", model_id=model_id, what=what)

    async def stop(self) -> None:
        """Waits briefly for events in flight, then closes everything; can be called repeatedly."""
        await self._publisher.stop()
        if self._updating is not None:
            self._updating.cancel()
            await asyncio.gather(self._updating, return_exceptions=True)
        await self._controls.stop()
        await self._follower.stop()
        if self._decider is not None:
            self._decider.close()

    async def until_refused(self) -> NoReturn:
        """Waits until Kafka refuses the configuration of this process, if that ever happens.

        Raises:
            ConfigError: it happened.
        """
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._publisher.until_refused())
                group.create_task(self._follower.until_refused())
                group.create_task(self._controls.until_refused())
        except BaseExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        raise AssertionError("all wait for a refusal")

    @property
    def refused(self) -> Counter[str]:
        """Number of rejected weights versions, by reason."""
        return self._follower.refused

    async def decide(self, request: DecideRequest) -> DecideResponse:
        """Makes a decision; the interaction is in Kafka when this returns.

        Raises:
            UnknownModelError: its model may not be used.
            RequestError: the request is invalid, or its interaction_id was used for a different request.
            UnavailableError: retry later with the same interaction_id.
        """
        decider = self._ready()
        self._check_model(request.model_id)
        interaction_id = request.interaction_id or new_id()

        async def make() -> Record[DecideResponse]:
            try:
                decided = await decider.decide(request, interaction_id)
            except (KafkaError, OSError, WeightsError) as error:
                raise UnavailableError(f"the model cannot be loaded ({error_text(error)})") from error
            key = request.conversation_id.encode()
            return Record(decided.response, self._topics.interactions, key, decided.event)

        return await self._interactions.answer(
            interaction_id, request.conversation_id, _fingerprint(request), make
        )

    async def reply(self, request: ReplyRequest) -> ReplyResponse:
        """Accepts a reply; it is in Kafka when this returns.

        Raises:
            RequestError: the reply is invalid, or its reply_id was used for a different reply.
            UnavailableError: retry later with the same reply_id.
        """
        decider = self._ready()
        if len(request.text) > self.settings.max_text_chars:
            problem = f"{len(request.text)} characters, expected at most {self.settings.max_text_chars}"
            raise RequestError(f"text: {problem}", {"text": problem})
        interaction = self._interactions.known(request.interaction_id or "")
        if interaction is not None and interaction.conversation_id != request.conversation_id:
            raise RequestError(
                f"interaction {request.interaction_id!r} belongs to conversation "
                f"{interaction.conversation_id!r}, the reply to {request.conversation_id!r}; expected the "
                "same, because replies are joined within a conversation",
                {"conversation_id": f"expected {interaction.conversation_id!r}"},
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
            models=[self._summary(id_) for id_ in ids],
        )

    def model(self, model_id: str) -> ModelDetail:
        """One model; version 0 for untrained weights.

        Raises:
            UnknownModelError: it may not be used.
        """
        self._check_model(model_id)
        detail = self._models.detail(model_id, self._follower.newest(model_id))
        return detail.model_copy(update=self._notes(model_id))

    def refused_models(self) -> dict[str, str]:
        """Models that this worker does not serve → why; for `/readyz`."""
        return {id_: why for id_ in self._follower.models() if (why := self._refusal(id_))}

    def strategies_changed(self) -> dict[str, str]:
        """Models that have learned other strategies than the configured ones → how; for `/readyz`."""
        return {id_: what for id_ in self._follower.models() if (what := self._strategies_changed(id_))}

    def _strategies_changed(self, model_id: str) -> str:
        manifest = self._follower.newest(model_id)
        return strategies_changed(self.settings, manifest.architecture) if manifest else ""

    def _refusal(self, model_id: str) -> str:
        manifest = self._follower.newest(model_id)
        return self._decider.refusal(manifest) if self._decider and manifest else ""

    def _summary(self, model_id: str) -> ModelSummary:
        summary = self._models.summary(model_id, self._follower.newest(model_id))
        return summary.model_copy(update=self._notes(model_id))

    def _notes(self, model_id: str) -> dict[str, str]:
        return {
            "refused": self._refusal(model_id),
            "strategies_changed": self._strategies_changed(model_id),
        }

    def activity(self) -> Activity:
        """What this process serves, for its heartbeat: the models used last."""
        ids = self._models.ids()
        models = {}
        for model_id in ids[-MODELS_REPORTED:]:
            control = self._controls.of(model_id)
            version = self._models.summary(model_id, None).version
            models[model_id] = ModelState(version, control.pinned, control.paused)
        return Activity(models=models, models_total=len(ids))

    def _check_model(self, model_id: str) -> None:
        try:
            self.settings.check_model(model_id)
        except InputError as error:
            raise UnknownModelError(str(error), {"model_id": str(error)}) from None

    def _ready(self) -> Decider:
        if self._decider is None or self.missing:
            raise UnavailableError("; ".join(f"{name}: {reason}" for name, reason in self.missing.items()))
        return self._decider

    def _state(self, dependency: str, reason: str | None) -> None:
        if reason is None:
            self.missing.pop(dependency, None)
        else:
            self.missing[dependency] = reason
        self._on_state(dependency, reason)

    def _follower_state(self, reason: str | None) -> None:
        # Once caught up, decisions continue with the current weights while the topic cannot be read.
        if not (self._follower.caught_up.is_set() and self._controls.caught_up.is_set()):
            self._state("weights", reason or "loading")

    async def _load_encoder(self) -> None:
        self._state("encoder", f"loading {self.settings.encoder}")
        encoder = await asyncio.to_thread(load_encoder, self.settings.encoder)
        decider = self._decider = Decider(self.settings, encoder, self._models)
        await asyncio.to_thread(decider.warm_up)
        self._state("encoder", None)

    async def _connect(self) -> None:
        await self._publisher.start()
        self._state("weights", "loading")
        self._updating = asyncio.create_task(self._models.update())
        # Pins first, so that no version but the pinned one is ever served.
        for follower in (self._controls, self._follower):
            await follower.start()
            await follower.until_caught_up()
        self._state("weights", None)

    async def _control(self, model_id: str, _control: Control) -> None:
        self._models.changed(model_id)

    def _pinned(self, model_id: str) -> int | None:
        return self._controls.of(model_id).pinned

    async def _load(self, model_id: str) -> tuple[WeightsManifest, CortexModel] | None:
        """Loads the version to serve: the pinned one, else the newest that can be used."""

        async def build(snapshot: WeightsSnapshot, _resume: bytes) -> tuple[WeightsManifest, CortexModel]:
            model = await asyncio.to_thread(self._build, snapshot)
            log.debug("weights loaded", model_id=model_id, version=snapshot.manifest.version)
            return snapshot.manifest, model

        loaded = await self._follower.use(model_id, build, self._pinned(model_id))
        if (
            loaded is None
            and self._follower.versions.has_records(model_id)
            and model_id in self._models.ids()
        ):
            raise WeightsError(f"no version of {model_id} can be used")
        return loaded

    def _build(self, snapshot: WeightsSnapshot) -> CortexModel:
        """The model with all configured strategies; a new one if it has not learned with them yet."""
        model, strategies = build_model(snapshot), self._models.config.strategies
        if not set(strategies) <= set(model.config.strategies):
            model = model.with_strategies(strategies)
        return model.freeze()


def _fingerprint(request: DecideRequest) -> bytes:
    """Digest to distinguish requests with the same interaction_id; empty if the service creates the id."""
    if request.interaction_id is None:
        return b""
    digest = hashlib.blake2b(request.model_dump_json(exclude={"memories"}).encode(), digest_size=16)
    for memory in request.memories:
        digest.update(f"{memory.id}\0{memory.text or ''}\0".encode())
        if memory.embedding is not None:
            digest.update(memory.embedding.tobytes())
    return digest.digest()
