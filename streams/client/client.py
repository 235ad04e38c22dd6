"""The client for agents: `decide` before answering, `reply` when the user reacts.

    async with CortexClient("http://127.0.0.1:8080") as cortex:
        decision = await cortex.decide(message, conversation_id=chat_id, history=history, memories=memories)
        ...  # answer with decision.strategy, decision.memories and decision.action
        await cortex.reply(decision, next_message)

Works over HTTP with one or several inference services, or in-process (`CortexClient.local`). A call is
retried with the same ids until it is acknowledged or times out, so that nothing is lost or counted twice.
Importing this module does not load torch; starting an in-process client does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeVar

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from cortex_core.errors import ConfigError
from cortex_core.strategy_registry import StrategyProfile
from streams.client.transport import Http, InProcess, Transport
from streams.events import new_id
from streams.inference.api import Action, DecideRequest, Memory, ReplyRequest, RequestError, describe_fields
from streams.settings import Settings

T = TypeVar("T")

__all__ = ["CortexClient", "Decision", "Memory", "Retrieved"]


@dataclass(frozen=True, slots=True)
class Retrieved:
    """A memory to put into the context."""

    id: str
    score: float
    """relevance; cosine similarity for untrained weights"""
    text: str | None
    """as passed to `decide`; None if only an embedding was passed"""


@dataclass(frozen=True, slots=True)
class Decision:
    """The decision for one message."""

    interaction_id: str
    conversation_id: str
    model_id: str
    weights_version: int
    """0 for untrained weights"""
    strategy: StrategyProfile
    probabilities: dict[str, float]
    """strategy id → probability of choosing it"""
    memories: list[Retrieved]
    confidence: float
    """predicted probability of a satisfied user, in [0, 1]"""
    action: Action
    """proceed, hedge or escalate"""


class CortexClient:
    """Client of an agent. One client can serve many conversations and tasks concurrently."""

    def __init__(
        self,
        urls: str | Iterable[str] | None = None,
        *,
        kafka: str | None = None,
        settings: Settings | None = None,
        timeout_s: float = 15.0,
        start_timeout_s: float = 60.0,
        agent_id: str = "agent",
        model_id: str = "default",
        api_key: str | None = None,
    ) -> None:
        """
        Args:
            urls: inference services, "http://host:port[,http://…]". With several, each conversation uses one
                of them, and another one while that does not answer. None, without `kafka`: the services of
                the stack that runs on this machine (`cortex up`).
            kafka: "host:port[,…]": decide in this process, without a service, with weights from this Kafka.
            settings: used with `kafka`, and to find the running stack; default: from the environment.
            timeout_s: seconds until a call that is retried raises `UnavailableError`.
            start_timeout_s: seconds that an in-process client waits for Kafka when it starts.
            agent_id, model_id: defaults for calls.
            api_key: key for the services; None: that of the settings (`CORTEX_API_KEY`), if there is one.

        Raises:
            ConfigError: invalid urls or settings, or no service found.
        """
        if urls is not None and kafka is not None:
            raise ConfigError(
                "both urls and kafka were given, expected one: a service, or decisions in-process"
            )
        self.agent_id = agent_id
        self.model_id = model_id
        self._transport: Transport
        if kafka is not None:
            settings = (
                settings.model_copy(update={"kafka": kafka}) if settings else Settings.load(kafka=kafka)
            )
            self._transport = InProcess(settings, timeout_s, start_timeout_s)
        else:
            settings = settings or Settings.load()
            authorization = (Settings.load(api_key=api_key) if api_key else settings).authorization
            self._transport = Http(_checked_urls(urls, settings), timeout_s, authorization)

    @classmethod
    def local(cls, settings: Settings | None = None, **options: Any) -> CortexClient:
        """A client that decides in this process; needs only Kafka. `options`: see the constructor."""
        settings = settings or Settings.load()
        kafka = settings.kafka or settings.running_stack().get("kafka")
        if not kafka:
            raise ConfigError("CORTEX_KAFKA is not set and no stack is running: set it, or start `cortex up`")
        return cls(kafka=kafka, settings=settings, **options)

    async def __aenter__(self) -> CortexClient:
        await self._transport.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the connections; acknowledged events are already in Kafka."""
        await self._transport.close()

    async def decide(
        self,
        message: str,
        *,
        conversation_id: str,
        history: Sequence[str] = (),
        memories: Mapping[str, str] | Iterable[Memory | Mapping[str, Any]] = (),
        metadata: Mapping[str, Any] | None = None,
        model_id: str | None = None,
        agent_id: str | None = None,
        interaction_id: str | None = None,
        top_k: int | None = None,
        explore: bool = True,
    ) -> Decision:
        """Selects memories and a strategy for a user's message, and predicts the confidence.

        Args:
            history: earlier messages of the conversation, oldest first.
            memories: candidates, as id → text, or as `Memory` or {"id", "text", "embedding"}, where the
                embedding is a list or array of numbers from the encoder of the service.
            metadata: the optional keys are hour_of_day, day_of_week, conversation_length and idle_s.
            interaction_id: idempotency key; calls with the same id are the same interaction.
            top_k: number of memories to retrieve; None means the default of the service.
            explore: False always selects the highest estimates, so that the others are never tried.

        Raises:
            InputError: an invalid argument; `fields` gives the reasons.
            ConfigError: the service refused the API key, or what it asks for.
            UnavailableError: not acknowledged in time; retry with the same interaction_id.
        """
        candidates = _memories(memories)
        request = _valid(
            DecideRequest,
            {
                "conversation_id": conversation_id,
                "message": message,
                "history": list(history),
                "memories": candidates,
                "metadata": dict(metadata or {}),
                "model_id": self.model_id if model_id is None else model_id,
                "agent_id": self.agent_id if agent_id is None else agent_id,
                "interaction_id": interaction_id or new_id(),
                "top_k": top_k,
                "explore": explore,
            },
        )
        answer = await _sent(self._transport.decide(request))
        texts = {memory.id: memory.text for memory in candidates}
        strategy = answer.strategy.model_dump()
        return Decision(
            interaction_id=answer.interaction_id,
            conversation_id=answer.conversation_id,
            model_id=answer.model_id,
            weights_version=answer.weights_version,
            strategy=StrategyProfile(**{**strategy, "tool_permissions": tuple(strategy["tool_permissions"])}),
            probabilities=answer.probabilities,
            memories=[Retrieved(m.id, m.score, texts.get(m.id)) for m in answer.memories],
            confidence=answer.confidence,
            action=answer.action,
        )

    async def reply(
        self,
        decision: Decision | None,
        text: str = "",
        *,
        rating: float | None = None,
        kind: Literal["text", "rating", "outcome"] | None = None,
        conversation_id: str | None = None,
        interaction_id: str | None = None,
        reply_id: str | None = None,
    ) -> str:
        """Sends the user's reaction to a decision, for training. Returns the reply id.

        Args:
            decision: the decision that it is about. None: that of `interaction_id`, else the latest
                interaction of `conversation_id`.
            text: the user's next message.
            rating: -1 (bad) to 1 (good).
            kind: `outcome` for a later result; None means `rating` if one is given, else `text`.
            reply_id: idempotency key; calls with the same id are the same reply.

        Raises:
            InputError: neither text nor rating, or no conversation.
            ConfigError: the service refused the API key, or what it asks for.
            UnavailableError: not acknowledged in time; retry with the same reply_id.
        """
        request = _valid(
            ReplyRequest,
            {
                "conversation_id": decision.conversation_id if decision else conversation_id,
                "interaction_id": decision.interaction_id if decision else interaction_id,
                "kind": kind or ("text" if rating is None else "rating"),
                "text": text,
                "rating": rating,
                "reply_id": reply_id or new_id(),
            },
        )
        return (await _sent(self._transport.reply(request))).reply_id


async def _sent(call: Awaitable[T]) -> T:
    try:
        return await call
    except PydanticSerializationError as error:  # e.g. an object in metadata, a lone surrogate in a text
        raise RequestError(f"the request cannot be encoded as JSON: {error}") from error


def _valid(model: type[Any], values: dict[str, Any]) -> Any:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        fields = describe_fields(error.errors(include_url=False), values)
        raise RequestError("; ".join(f"{name}: {what}" for name, what in fields.items()), fields) from None


def _memories(memories: Mapping[str, str] | Iterable[Memory | Mapping[str, Any]]) -> list[Memory]:
    given: Iterable[Any] = (
        [{"id": id_, "text": text} for id_, text in memories.items()]
        if isinstance(memories, Mapping)
        else memories
    )
    return [m if isinstance(m, Memory) else _valid(Memory, m) for m in given]


def _checked_urls(urls: str | Iterable[str] | None, settings: Settings) -> list[str]:
    if urls is None:
        urls = settings.running_stack().get("inference", [])
        if not urls:
            raise ConfigError(
                f"no urls were given and no stack runs on {settings.data}: pass a url, or start `cortex up`"
            )
    parts = urls.split(",") if isinstance(urls, str) else list(urls)
    checked = [part.strip().rstrip("/") for part in parts if part.strip()]
    for url in checked:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{url!r} is not the url of an inference service, expected http://host:port")
    if not checked:
        raise ConfigError(f"urls is {urls!r}, expected http://host:port[,http://…]")
    return checked
