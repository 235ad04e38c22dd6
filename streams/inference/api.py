"""The HTTP contract of the inference service, as pydantic models; the client imports it without torch.

Requests name their fields exactly: an unknown field is refused, because a misspelt `histroy` that is silently
dropped costs quality for months. Limits that depend on settings are checked by the service.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainSerializer,
    StringConstraints,
    TypeAdapter,
    WithJsonSchema,
    model_validator,
)

from cortex_core.arrays import FloatArray
from cortex_core.errors import InputError, shown
from streams.events import Embedding, Id, Rating, Unit, require_value

MAX_TOP_K = 100
MAX_ITEMS = 10_000
"""Memories or earlier messages in a request, whatever the settings allow."""
MAX_FIELDS = 50
"""Fields of one JSON object; each unknown one is an error of its own."""
MAX_DIM = 65_536
"""Numbers in an embedding."""
Action = Literal["proceed", "hedge", "escalate"]


class RequestError(InputError):
    """A request that cannot be served as it is. `fields` says what is wrong where."""

    status = 422
    type = "invalid_request"

    def __init__(self, message: str, fields: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.fields = dict(fields or {})


class ConflictError(RequestError):
    """An id that already stands for another request."""

    status = 409
    type = "conflict"


_wire: TypeAdapter[Any] = TypeAdapter(Embedding, config=ConfigDict(arbitrary_types_allowed=True))


def _read_vector(value: Any) -> FloatArray:
    """A list of numbers, an array, or the events' {"shape": [D], "f16": base64}; (D,) float32."""
    if isinstance(value, dict):
        array: np.ndarray[Any, Any] = _wire.validate_python(value)
    else:
        if not isinstance(value, list | tuple | np.ndarray):
            raise ValueError(
                f'wanted a list of numbers or {{"shape": [D], "f16": base64}}, got {shown(value)}'
            )
        if len(value) > MAX_DIM:
            raise ValueError(f"wanted at most {MAX_DIM:,} numbers, got {len(value):,}")
        array = _as_numbers(value)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"wanted a flat list of numbers, got shape {array.shape}")
    if not np.isfinite(array).all():
        at = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"holds NaN or infinity (at position {at}); every number must be finite")
    return unit(array)


def _as_numbers(value: Sequence[Any] | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    try:
        # As float64: of a list of strings numpy would make a table as wide as its longest one.
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        array = np.empty(0)
    kinds = {value.dtype.type} if isinstance(value, np.ndarray) else set(map(type, value))
    if array.ndim == 1 and not (array.size and all(map(_is_number, kinds))):
        raise ValueError(f"wanted a flat list of numbers, got {shown(value)}")
    return array


def _is_number(kind: type) -> bool:
    return issubclass(kind, int | float | np.integer | np.floating) and kind is not bool


def unit(array: np.ndarray[Any, Any]) -> FloatArray:
    """(D,) float32 with L2 norm 1, or all zeros.

    Relevance is a cosine, so the norm says nothing; at norm 1 nothing over- or underflows float16.
    """
    wide = array.astype(np.float64)
    # Divided by the largest first: squares of numbers near the ends of the range would leave it.
    wide /= float(np.abs(wide).max(initial=0.0)) or 1.0
    return (wide / (math.sqrt(float(wide @ wide)) or 1.0)).astype(np.float32)


def _to_wire(array: FloatArray) -> dict[str, Any]:
    out: dict[str, Any] = _wire.dump_python(array.astype(np.float16))
    return out


Vector = Annotated[
    FloatArray,
    BeforeValidator(_read_vector),
    PlainSerializer(_to_wire, return_type=dict),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "array", "items": {"type": "number"}, "minItems": 1},
                {
                    "type": "object",
                    "required": ["shape", "f16"],
                    "properties": {
                        "shape": {"type": "array", "items": {"type": "integer"}},
                        "f16": {"type": "string", "contentEncoding": "base64"},
                    },
                },
            ]
        }
    ),
]
ModelId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$")]
"""A model's name: letters, digits, dot, dash and underscore; it becomes part of keys, paths and labels."""


class _Request(BaseModel):
    model_config = ConfigDict(
        extra="forbid", arbitrary_types_allowed=True, frozen=True, ser_json_inf_nan="constants"
    )

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and len(data) > MAX_FIELDS:
            raise ValueError(f"{len(data)} fields, wanted no others than {', '.join(cls.model_fields)}")
        return data


class Memory(_Request):
    """A candidate memory: its text, its embedding, or both."""

    id: Id = Field(description="Your id of it; what is learned about a memory comes from its embedding.")
    text: str | None = Field(
        None, min_length=1, description="Encoded and cached by the service where no embedding is given."
    )
    embedding: Vector | None = Field(
        None,
        description="(D,) from the same encoder as the service's (see GET /v1/models): a list of numbers, or "
        'compact as {"shape": [D], "f16": base64 of little-endian float16}. Goes before `text`.',
    )

    @model_validator(mode="after")
    def _has_content(self) -> Memory:
        if self.text is None and self.embedding is None:
            raise ValueError(f"memory {self.id!r} needs a text or an embedding")
        return self


class DecideRequest(_Request):
    """A user's message and what the agent could use to answer it."""

    conversation_id: Id = Field(description="Interactions and replies are joined within it.")
    message: str = Field(description="What the user just wrote.", examples=["How do I deploy billing?"])
    history: Annotated[list[str], FailFast()] = Field(
        [], max_length=MAX_ITEMS, description="Earlier messages of the conversation, oldest first."
    )
    metadata: dict[str, Any] = Field(
        {},
        max_length=1_000,
        description="Read where present: hour_of_day [0, 24), day_of_week [0, 7) with 0 = Monday, "
        "conversation_length (turns), idle_s (seconds since the user's last message). Others are ignored.",
    )
    memories: Annotated[list[Memory], FailFast()] = Field(
        [], max_length=MAX_ITEMS, description="Candidates, in any order."
    )
    model_id: ModelId = Field("default", description="Whose weights; agents that share one learn together.")
    agent_id: Id = Field("agent", description="Which agent asks; logged, not learned from.")
    interaction_id: Id | None = Field(
        None,
        description="Your own id, for safe repetition: the same request with the same id is one interaction.",
    )
    top_k: int | None = Field(
        None,
        ge=0,
        le=MAX_TOP_K,
        strict=True,
        description="Memories to retrieve; null takes the service's default.",
    )
    explore: bool = Field(
        True,
        strict=True,
        description="False always takes what looks best; nothing new is then learned about the rest.",
    )

    @model_validator(mode="after")
    def _usable(self) -> DecideRequest:
        if not self.message.strip():
            raise ValueError("message is blank; wanted what the user wrote")
        seen: dict[str, int] = {}
        for i, memory in enumerate(self.memories):
            if memory.id in seen:
                raise ValueError(f"memories {seen[memory.id]} and {i} share the id {memory.id!r}")
            seen[memory.id] = i
        return self


class StrategyChoice(BaseModel):
    """The strategy to answer with."""

    id: str
    name: str
    description: str
    prompt_framing: str = Field(description="Put in front of the task in the system prompt.")
    reasoning_style: str
    response_format: str
    tool_permissions: list[str] = Field(description="Tools to allow; empty: whatever the agent usually may.")
    extra: dict[str, Any] = {}


class RetrievedMemory(BaseModel):
    """A memory that belongs in the context."""

    id: str
    score: float = Field(description="Relevance; cosine similarity until something was learned.")


class DecideResponse(BaseModel):
    """One decision. It stands as an interaction in Kafka when this is answered."""

    interaction_id: str = Field(description="Name it in the reply about this answer.")
    conversation_id: str
    model_id: str
    weights_version: int = Field(description="The weights that decided; 0: nothing learned yet.")
    strategy: StrategyChoice
    probabilities: dict[str, float] = Field(description="With which each strategy could have been chosen.")
    memories: list[RetrievedMemory] = Field(description="Slot by slot; best first unless exploring.")
    confidence: Unit = Field(description="Predicted probability that the user will be content.")
    action: Action = Field(description="proceed from 0.8, hedge from 0.4, else escalate.")


class ReplyRequest(_Request):
    """What the user said or did about an interaction."""

    conversation_id: Id
    interaction_id: Id | None = Field(
        None, description="Null: the conversation's latest interaction before this reply."
    )
    kind: Literal["text", "rating", "outcome"] = Field(
        "text", description="text: the next message; rating: the user rated; outcome: what turned out later."
    )
    text: str = Field("", description="The user's words; wanted for kind text.")
    rating: Rating | None = Field(
        None,
        description="-1 (bad) to 1 (good), wanted for rating and outcome. 0 is neutral: thumbs are 1 and -1, "
        "and true and false are refused.",
    )
    reply_id: Id | None = Field(None, description="Your own id, for safe repetition.")

    @model_validator(mode="after")
    def _kind_has_its_value(self) -> ReplyRequest:
        require_value(self.kind, self.text, self.rating)
        return self


class ReplyResponse(BaseModel):
    """The reply stands in Kafka."""

    reply_id: str
    occurred_at: datetime = Field(description="As logged; latencies count from here.")


class AppliedVersion(BaseModel):
    """A weights version that this worker served, and from when."""

    version: int
    applied_at: datetime
    consumed: dict[str, int] = Field(
        description='"topic-partition" → next offset: the version has learned from every experience below it.'
    )


class ModelSummary(BaseModel):
    """What this worker serves for one model."""

    model_id: str
    version: int = Field(description="0: nothing learned yet.")
    in_memory: bool = Field(description="Whether it is ready; others are read from Kafka when asked for.")
    updates: int = Field(0, description="Gradient steps since birth.")
    interactions: int = Field(0, description="Experiences learned from since birth.")
    ema_loss: float | None = None


class ModelDetail(ModelSummary):
    """The same, with the versions applied while it was in memory."""

    versions: list[AppliedVersion] = Field(description="The last 1,000, oldest first.")


class ModelList(BaseModel):
    """All models that have weights or are in memory, and the encoder that embeddings must come from."""

    encoder: str
    dim: int = Field(description="D, the numbers in an embedding.")
    models: list[ModelSummary]


class ErrorDetail(BaseModel):
    type: str
    message: str = Field(description="What came, what was wanted, what to do.")
    fields: dict[str, str] = Field({}, description="Field → what is wrong with it.")


class ErrorResponse(BaseModel):
    """Every answer from 400 on."""

    error: ErrorDetail


def describe_fields(errors: Sequence[Any], body: Any = None) -> dict[str, str]:
    """Pydantic's errors as field → message; a memory is named by its id too."""
    fields: dict[str, str] = {}
    for error in errors[:20]:
        loc = [str(part)[:80] for part in error["loc"] if part != "body"]
        name = ".".join(loc) or "body"
        message = str(error["msg"]).removeprefix("Value error, ")
        if error["type"] not in ("value_error", "missing"):
            message += f" (got {shown(error.get('input'))})"
        if len(loc) > 1 and loc[0] == "memories" and isinstance(body, dict):
            name += _memory_name(body.get("memories"), loc[1])
        fields[name] = message
    return fields


def _memory_name(memories: Any, index: str) -> str:
    try:
        return f" (id {shown(memories[int(index)]['id'])})"
    except (ValueError, TypeError, KeyError, IndexError):
        return ""
