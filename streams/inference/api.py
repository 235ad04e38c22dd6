"""The HTTP API of the inference service as pydantic models; does not import torch, for the client.

Requests with unknown fields are rejected: a misspelt field that is silently ignored would reduce the quality
unnoticed. The service checks limits that depend on settings.
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
from streams.events import MODEL_ID, Embedding, Id, Rating, Unit, require_value

MAX_TOP_K = 100
MAX_ITEMS = 10_000
"""Maximum number of memories or earlier messages in a request, for all settings."""
MAX_FIELDS = 50
"""Maximum number of fields in a JSON object; each unknown field gives an error."""
MAX_DIM = 65_536
"""Maximum dimension of an embedding."""
Action = Literal["proceed", "hedge", "escalate"]


class RequestError(InputError):
    """An invalid request. `fields` maps each invalid field to the reason."""

    status = 422
    type = "invalid_request"

    def __init__(self, message: str, fields: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.fields = dict(fields or {})


class UnknownModelError(RequestError):
    """A model that may not be used (`CORTEX_MODELS`)."""

    status = 404
    type = "unknown_model"


class ConflictError(RequestError):
    """An id that was already used for another request."""

    status = 409
    type = "conflict"


_wire: TypeAdapter[Any] = TypeAdapter(Embedding, config=ConfigDict(arbitrary_types_allowed=True))


def _read_vector(value: Any) -> FloatArray:
    """(D,) float32 from a list of numbers, an array, or {"shape": [D], "f16": base64} as in events."""
    if isinstance(value, dict):
        array: np.ndarray[Any, Any] = _wire.validate_python(value)
    else:
        if not isinstance(value, list | tuple | np.ndarray):
            raise ValueError(
                f'expected a list of numbers or {{"shape": [D], "f16": base64}}, got {shown(value)}'
            )
        if len(value) > MAX_DIM:
            raise ValueError(f"expected at most {MAX_DIM:,} numbers, got {len(value):,}")
        array = _as_numbers(value)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"expected a flat list of numbers, got shape {array.shape}")
    if not np.isfinite(array).all():
        at = int(np.flatnonzero(~np.isfinite(array))[0])
        raise ValueError(f"contains NaN or infinity (at position {at}); every number must be finite")
    return unit_vector(array)


def _as_numbers(value: Sequence[Any] | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    try:
        # With dtype float64: numpy would convert a list of strings to an array as wide as its longest string.
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        array = np.empty(0)
    kinds = {value.dtype.type} if isinstance(value, np.ndarray) else set(map(type, value))
    if array.ndim == 1 and not (array.size and all(map(_is_number, kinds))):
        raise ValueError(f"expected a flat list of numbers, got {shown(value)}")
    return array


def _is_number(kind: type) -> bool:
    return issubclass(kind, int | float | np.integer | np.floating) and kind is not bool


def unit_vector(array: np.ndarray[Any, Any]) -> FloatArray:
    """(D,) float32 with L2 norm 1, or zeros; for numbers of any magnitude.

    Relevance is a cosine and does not depend on the norm; with norm 1 nothing overflows or underflows
    float16.
    """
    wide = array.astype(np.float64)
    # Divided by the maximum first: squares of very large or small numbers would overflow or underflow.
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
ModelId = Annotated[str, StringConstraints(pattern=MODEL_ID)]
"""Name of a model: letters, digits, dot, dash and underscore, since it is part of keys, paths and labels."""


class _Request(BaseModel):
    model_config = ConfigDict(
        extra="forbid", arbitrary_types_allowed=True, frozen=True, ser_json_inf_nan="constants"
    )

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and len(data) > MAX_FIELDS:
            raise ValueError(f"{len(data)} fields, expected only {', '.join(cls.model_fields)}")
        return data


class Memory(_Request):
    """A candidate memory: its text, its embedding, or both."""

    id: Id = Field(
        description="Your id; what is learned about a memory depends on its embedding, not on its id."
    )
    text: str | None = Field(
        None, min_length=1, description="Encoded and cached by the service if no embedding is given."
    )
    embedding: Vector | None = Field(
        None,
        description="(D,) from the encoder of the service (see GET /v1/models): a list of numbers, or "
        '{"shape": [D], "f16": base64 of little-endian float16}. Takes precedence over `text`.',
    )

    @model_validator(mode="after")
    def _has_content(self) -> Memory:
        if self.text is None and self.embedding is None:
            raise ValueError(f"memory {self.id!r} needs a text or an embedding")
        return self


class DecideRequest(_Request):
    """A user's message, and the candidates for its answer."""

    conversation_id: Id = Field(description="Interactions and replies are joined within a conversation.")
    message: str = Field(description="The user's message.", examples=["How do I deploy billing?"])
    history: Annotated[list[str], FailFast()] = Field(
        [], max_length=MAX_ITEMS, description="Earlier messages of the conversation, oldest first."
    )
    metadata: dict[str, Any] = Field(
        {},
        max_length=1_000,
        description="Optional keys: hour_of_day [0, 24), day_of_week [0, 7) with 0 = Monday, "
        "conversation_length (turns), idle_s (seconds since the user's last message). Others are ignored.",
    )
    memories: Annotated[list[Memory], FailFast()] = Field(
        [], max_length=MAX_ITEMS, description="Candidates, in any order."
    )
    model_id: ModelId = Field(
        "default", description="The model whose weights decide; agents may share a model."
    )
    agent_id: Id = Field("agent", description="The agent; logged, not used for training.")
    interaction_id: Id | None = Field(
        None,
        description="Idempotency key: repeated requests with the same id are one interaction.",
    )
    top_k: int | None = Field(
        None,
        ge=0,
        le=MAX_TOP_K,
        strict=True,
        description="Number of memories to retrieve; null means the default of the service.",
    )
    explore: bool = Field(
        True,
        strict=True,
        description="False always selects the highest estimates, so that the others are never tried.",
    )

    @model_validator(mode="after")
    def _usable(self) -> DecideRequest:
        if not self.message.strip():
            raise ValueError("message is blank, expected the user's message")
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
    prompt_framing: str = Field(description="Text placed before the task in the system prompt.")
    reasoning_style: str
    response_format: str
    tool_permissions: list[str] = Field(
        description="Tools to allow; empty means the agent's default permissions."
    )
    extra: dict[str, Any] = {}


class RetrievedMemory(BaseModel):
    """A memory to put into the context."""

    id: str
    score: float = Field(description="Relevance; cosine similarity for untrained weights.")


class DecideResponse(BaseModel):
    """A decision. Its interaction is in Kafka when this is returned."""

    interaction_id: str = Field(description="Pass it with the reply about this answer.")
    conversation_id: str
    model_id: str
    weights_version: int = Field(description="Version of the weights that decided; 0 for untrained weights.")
    strategy: StrategyChoice
    probabilities: dict[str, float] = Field(description="Probability of choosing each strategy.")
    memories: list[RetrievedMemory] = Field(description="In slot order; best first unless exploring.")
    confidence: Unit = Field(description="Predicted probability of a satisfied user.")
    action: Action = Field(description="proceed from 0.8, hedge from 0.4, else escalate.")


class ReplyRequest(_Request):
    """A user's reaction to an interaction."""

    conversation_id: Id
    interaction_id: Id | None = Field(
        None, description="Null: the latest interaction of the conversation before this reply."
    )
    kind: Literal["text", "rating", "outcome"] = Field(
        "text",
        description="text: the user's next message; rating: an explicit rating; outcome: a later result.",
    )
    text: str = Field("", description="The user's message; required for kind text.")
    rating: Rating | None = Field(
        None,
        description="-1 (bad) to 1 (good), required for rating and outcome. 0 is neutral: thumbs are 1 and "
        "-1; true and false are rejected.",
    )
    reply_id: Id | None = Field(None, description="Idempotency key.")

    @model_validator(mode="after")
    def _kind_has_its_value(self) -> ReplyRequest:
        require_value(self.kind, self.text, self.rating)
        return self


class ReplyResponse(BaseModel):
    """The reply is in Kafka."""

    reply_id: str
    occurred_at: datetime = Field(description="As logged; latency metrics start here.")


class AppliedVersion(BaseModel):
    """A weights version that this worker has served, and since when."""

    version: int
    applied_at: datetime
    consumed: dict[str, int] = Field(
        description='"topic-partition" → next offset: the version has learned from all experiences below.'
    )


class ModelSummary(BaseModel):
    """The state of one model in this worker."""

    model_id: str
    version: int = Field(description="0 for untrained weights.")
    in_memory: bool = Field(description="Whether it is loaded; other models are loaded from Kafka on demand.")
    pinned: int | None = Field(None, description="The only version served (`cortex control pin`).")
    updates: int = Field(0, description="Gradient steps since initialisation.")
    interactions: int = Field(0, description="Experiences learned from since initialisation.")
    ema_loss: float | None = None
    encoder: str = Field("", description="Text encoder that it has learned from; empty if not known.")
    strategies_changed: str = Field(
        "", description="How its strategies differ from the configured ones (CORTEX_STRATEGIES)."
    )
    refused: str = Field("", description="Why this worker does not serve it, and what to do.")


class ModelDetail(ModelSummary):
    """A model with the versions applied while it was in memory."""

    versions: list[AppliedVersion] = Field(description="The last 1,000, oldest first.")


class ModelList(BaseModel):
    """All models that have weights or are in memory, and the encoder required for embeddings."""

    encoder: str
    dim: int = Field(description="D, dimension of the embeddings.")
    models: list[ModelSummary]


class ErrorDetail(BaseModel):
    type: str
    message: str = Field(description="The value received, the value expected, and the remedy.")
    fields: dict[str, str] = Field({}, description="Field → reason why it is invalid.")


class ErrorResponse(BaseModel):
    """The body of all responses with status 400 and above."""

    error: ErrorDetail


def describe_fields(errors: Sequence[Any], body: Any = None) -> dict[str, str]:
    """Pydantic errors as field → message; the name of a memory includes its id."""
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
