"""Decodes events for the join, without pydantic models if they have the format that our producers write.

    interaction = decode_interaction(interaction_bytes, store_text=False)
    interaction.body              # the record's bytes, or canonical JSON if those must not be stored
    reply = decode_reply(reply_bytes)

The models of `streams.events` define valid events. The decoders here are as strict; any other input (a type
that a model converts, an unknown field, an error) is parsed by the model, which converts the value, drops the
field or raises. So both ways give the same result for the same bytes.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta, Raw, Struct
from pydantic import AwareDatetime, TypeAdapter

from streams.events import (
    MAX_ID,
    MAX_SIDE,
    MODEL_ID,
    SCHEMA_VERSION,
    Float16Array,
    InteractionEvent,
    ReplyEvent,
    parse,
)

Id = Annotated[str, Meta(min_length=1, max_length=MAX_ID)]
Unit = Annotated[float, Meta(ge=0.0, le=1.0)]
Propensity = Annotated[float, Meta(gt=0.0, le=1.0)]
Side = Annotated[int, Meta(ge=0, le=MAX_SIDE)]
Schema = Annotated[int, Meta(le=SCHEMA_VERSION)]

_NOT_FINITE = np.uint16(0x7C00)
"""The exponent bits of a float16: all set in infinity and NaN, and only there."""


class Interaction(Struct, frozen=True):
    """The fields of an interaction that the join uses, and the whole event as JSON."""

    id: str
    conversation_id: str
    model_id: str
    at: float
    """Unix seconds."""
    occurred_at: str
    """The same, as in the body."""
    body: bytes
    """JSON of the `InteractionEvent`; without `text` unless `store_text` is set."""


class Reply(Struct, frozen=True):
    """The fields of a `ReplyEvent` that the join uses."""

    reply_id: str
    conversation_id: str
    interaction_id: str | None
    occurred_at: datetime
    kind: str
    text: str
    rating: float | None
    embedding: Float16Array | None


class _Array(Struct, forbid_unknown_fields=True):
    shape: list[Side]
    f16: bytes


class _Interaction(Struct, forbid_unknown_fields=True):
    """`InteractionEvent`, field by field."""

    occurred_at: str
    interaction_id: Id
    conversation_id: Id
    model_id: Annotated[str, Meta(pattern=MODEL_ID)]
    weights_version: Annotated[int, Meta(ge=0, lt=2**53)]
    message: _Array
    history: _Array
    metadata: list[float]
    situation: _Array
    memories: _Array
    memory_ids: list[Id]
    memory_scores: list[float]
    strategy_id: Id
    strategy_ids: list[Id]
    probabilities: list[Unit]
    context: list[float]
    confidence: Unit
    memory_propensities: list[Propensity] = []
    schema_version: Schema = SCHEMA_VERSION
    agent_id: Id = "agent"
    encoder: Id | None = None
    text: str | None = None


class _Reply(Struct, forbid_unknown_fields=True):
    """`ReplyEvent`, field by field."""

    occurred_at: str
    reply_id: Id
    conversation_id: Id
    interaction_id: Id | None = None
    kind: Literal["text", "rating", "outcome"] = "text"
    text: str = ""
    rating: Annotated[float, Meta(ge=-1.0, le=1.0)] | None = None
    embedding: _Array | None = None
    schema_version: Schema = SCHEMA_VERSION


class _Message(Struct):
    message: _Array


class _Head(Struct):
    occurred_at: str


class StoredExperience(Struct):
    """The fields of an `ExperienceEvent` that an amendment uses."""

    occurred_at: str
    interaction: Raw
    readings: list[dict[str, Any]]


_interaction = msgspec.json.Decoder(_Interaction)
_reply = msgspec.json.Decoder(_Reply)
_message = msgspec.json.Decoder(_Message)
_head = msgspec.json.Decoder(_Head)
_experience = msgspec.json.Decoder(StoredExperience)
_moment = TypeAdapter(AwareDatetime).validate_python


def decode_interaction(value: bytes | None, *, store_text: bool) -> Interaction:
    """Decodes a record's value.

    Args:
        store_text: whether the body keeps the text of the user's message, if the event has it.

    Raises:
        InputError: the value is not a valid `InteractionEvent`; the message has the reason.
    """
    try:
        fields = _interaction.decode(value or b"")
        if _is_valid(fields) and (store_text or _has_no_text(fields, value or b"")):
            return Interaction(
                fields.interaction_id,
                fields.conversation_id,
                fields.model_id,
                moment(fields.occurred_at),
                fields.occurred_at,
                value or b"",
            )
    except ValueError:  # msgspec's and pydantic's errors are of this type
        pass
    event = parse(InteractionEvent, value)
    if not store_text:
        event = event.model_copy(update={"text": None})
    body = event.to_bytes()
    return Interaction(
        event.interaction_id,
        event.conversation_id,
        event.model_id,
        event.occurred_at.timestamp(),
        _head.decode(body).occurred_at,
        body,
    )


def decode_reply(value: bytes | None) -> Reply:
    """Decodes a record's value.

    Raises:
        InputError: the value is not a valid `ReplyEvent`; the message has the reason.
    """
    try:
        fields = _reply.decode(value or b"")
        array, embedding = fields.embedding, None
        has_value = fields.text.strip() if fields.kind == "text" else fields.rating is not None
        if has_value and (array is None or (_is_array(array) and _are_finite(array.f16))):
            if array is not None:
                embedding = np.frombuffer(array.f16, dtype="<f2").reshape(array.shape)
            return Reply(
                fields.reply_id,
                fields.conversation_id,
                fields.interaction_id,
                _moment(fields.occurred_at),
                fields.kind,
                fields.text,
                fields.rating,
                embedding,
            )
    except ValueError:
        pass
    event = parse(ReplyEvent, value)
    return Reply(*(getattr(event, name) for name in Reply.__struct_fields__))


def decode_experience(value: bytes) -> StoredExperience | None:
    """Decodes a stored experience; None if the value is a tool's `ReplayEntry`, which has no interaction."""
    try:
        return _experience.decode(value)
    except msgspec.ValidationError:
        return None


def moment(text: str) -> float:
    """Unix seconds of an event's timestamp."""
    return _moment(text).timestamp()


def message_of(body: bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    """(D,) the embedding of the user's message in an `Interaction.body`."""
    return np.frombuffer(_message.decode(body).message.f16, dtype="<f2").astype(np.float32)


def _is_valid(it: _Interaction) -> bool:
    """Whether its arrays and lists have consistent sizes, as `InteractionEvent` requires."""
    dim, n, k = it.message.shape, len(it.memory_ids), len(it.memory_scores)
    arrays = (it.message, it.history, it.situation, it.memories)
    return (
        len(dim) == len(it.situation.shape) == 1
        and len(it.memories.shape) == 2
        and dim == it.history.shape
        and it.memories.shape[0] == n
        and k <= n
        and len(it.memory_propensities) in (0, k)
        and len(it.strategy_ids) == len(it.probabilities)
        and it.strategy_id in it.strategy_ids
        and it.probabilities[it.strategy_ids.index(it.strategy_id)] > 0.0
        and all(map(_is_array, arrays))
        and _are_finite(b"".join([array.f16 for array in arrays]))
    )


def _is_array(array: _Array) -> bool:
    shape = array.shape
    if len(shape) == 1:
        return 2 * shape[0] == len(array.f16)
    return len(shape) == 2 and 2 * shape[0] * shape[1] == len(array.f16)


def _are_finite(f16: bytes) -> bool:
    return not f16 or bool((np.frombuffer(f16, dtype="<u2") & 0x7FFF).max() < _NOT_FINITE)


def _has_no_text(it: _Interaction, value: bytes) -> bool:
    # JSON readers use the last of repeated names; the text of an earlier one would stay in the bytes. Without
    # escapes there is only one spelling of the name.
    return it.text is None and value.count(b'"text"') <= 1 and b"\\" not in value
