"""What an agent imports: decide before answering, reply when the user reacts.

    async with CortexClient("http://127.0.0.1:8080") as cortex:
        decision = await cortex.decide(message, conversation_id=chat_id, history=history, memories=memories)
        ...  # answer with decision.strategy, decision.memories and decision.action
        await cortex.reply(decision, next_message)

Over HTTP to one inference service or several, or in-process (`CortexClient.local`). Every call is repeated
with the same ids until it is acknowledged or its time is up: nothing is lost and nothing counts twice.
Importing this loads no torch; only an in-process client does, when it starts.
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
    """A memory that belongs in the context."""

    id: str
    score: float
    """relevance; cosine similarity until something was learned"""
    text: str | None
    """as handed in; None where only an embedding was"""


@dataclass(frozen=True, slots=True)
class Decision:
    """How to answer one message."""

    interaction_id: str
    conversation_id: str
    model_id: str
    weights_version: int
    """0: nothing learned yet"""
    strategy: StrategyProfile
    probabilities: dict[str, float]
    """strategy id → probability with which it could have been chosen"""
    memories: list[Retrieved]
    confidence: float
    """predicted probability in [0, 1] that the user will be content"""
    action: Action
    """proceed, hedge or escalate"""


class CortexClient:
    """Decisions for an agent. One client may serve many conversations and tasks at once."""

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
    ) -> None:
        """
        Args:
            urls: of inference services, "http://host:port[,http://…]". With several, a conversation stays
                with one of them, and goes to another while that does not answer. None, with no `kafka`:
                those of the stack that runs on this machine (`cortex up`).
            kafka: "host:port[,…]": no service; decide in this process, following weights from this Kafka.
            settings: for `kafka`, and for finding the running stack; by default from the environment.
            timeout_s: seconds in which a call is repeated before `UnavailableError`.
            start_timeout_s: seconds that an in-process client waits for Kafka at its start.
            agent_id, model_id: for calls that name none.

        Raises:
            ConfigError: unusable urls, or nothing to connect to.
        """
        if urls is not None and kafka is not None:
            raise ConfigError("both urls and kafka were given: ask a service, or decide in this process")
        self.agent_id = agent_id
        self.model_id = model_id
        self._transport: Transport
        if kafka is not None:
            settings = (
                settings.model_copy(update={"kafka": kafka}) if settings else Settings.load(kafka=kafka)
            )
            self._transport = InProcess(settings, timeout_s, start_timeout_s)
        else:
            self._transport = Http(_checked_urls(urls, settings), timeout_s)

    @classmethod
    def local(cls, settings: Settings | None = None, **options: Any) -> CortexClient:
        """A client that decides in this process; needs only Kafka. `options` as for the constructor."""
        settings = settings or Settings.load()
        kafka = settings.kafka or settings.running_stack().get("kafka")
        if not kafka:
            raise ConfigError("CORTEX_KAFKA is not set, and no stack runs here: set it, or start `cortex up`")
        return cls(kafka=kafka, settings=settings, **options)

    async def __aenter__(self) -> CortexClient:
        await self._transport.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes connections; what was answered is safe in Kafka already."""
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
        """Which memories, which strategy and how confident, for a user's message.

        Args:
            history: earlier messages of the conversation, oldest first.
            memories: candidates: id → text; or `Memory` or {"id", "text", "embedding"} each, where the
                embedding is a list or array of numbers from the service's encoder.
            metadata: hour_of_day, day_of_week, conversation_length, idle_s are read where present.
            interaction_id: your own; a repetition with the same one is the same interaction.
            top_k: memories to retrieve; None takes the service's default.
            explore: False always takes what looks best; nothing new is then learned about the rest.

        Raises:
            InputError: something handed in is unusable; `fields` says what.
            UnavailableError: nobody could record it in time; repeat with the same interaction_id.
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
        """What the user said or did about a decision; teaches the model. Returns the reply's id.

        Args:
            decision: what it is about. None: `interaction_id`, or else the latest interaction of
                `conversation_id` before now.
            text: the user's next message.
            rating: -1 (bad) to 1 (good).
            kind: `outcome` for what turned out later; None: `rating` where one is given, else `text`.
            reply_id: your own; a repetition with the same one is the same reply.

        Raises:
            InputError: neither text nor rating, or no conversation.
            UnavailableError: nobody could record it in time; repeat with the same reply_id.
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
    except PydanticSerializationError as error:  # an object in metadata, half a surrogate pair in a text
        raise RequestError(f"something handed in cannot be written as JSON: {error}") from error


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


def _checked_urls(urls: str | Iterable[str] | None, settings: Settings | None) -> list[str]:
    if urls is None:
        settings = settings or Settings.load()
        urls = settings.running_stack().get("inference", [])
        if not urls:
            raise ConfigError(
                f"no urls were given, and no stack runs on {settings.data}: give a url, or start `cortex up`"
            )
    parts = urls.split(",") if isinstance(urls, str) else list(urls)
    checked = [part.strip().rstrip("/") for part in parts if part.strip()]
    for url in checked:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{url!r} is no url of an inference service, wanted http://host:port")
    if not checked:
        raise ConfigError(f"{urls!r} holds no url, wanted http://host:port[,http://…]")
    return checked
