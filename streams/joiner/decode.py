"""Events for the join, decoded without a pydantic model where they are as every producer of ours writes them.

    interaction = decode_interaction(interaction_bytes, store_text=False)
    interaction.body              # the bytes that came, or, where those cannot be kept, canonical ones
    reply = decode_reply(reply_bytes)

The models of `streams.events` decide what an event is. What is decoded here is checked as strictly; all else
(another type that a model would convert, an unknown field, an error) goes through the model, which converts
it, drops it or says what is wrong. So what becomes of an event is a function of its bytes.
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
"""Exponent bits of a float16: infinity and NaN have all of them."""


class Interaction(Struct, frozen=True):
    """What the join needs of an interaction, and all of it as JSON."""

    id: str
    conversation_id: str
    model_id: str
    at: float
    """Unix seconds."""
    occurred_at: str
    """The same, as the body has it."""
    body: bytes
    """JSON of the `InteractionEvent`; without its text, unless that is stored."""


class Reply(Struct, frozen=True):
    """What the join needs of a reply; the fields are those of `ReplyEvent`."""

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
    model_id: Id
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
    """What an amendment needs of an `ExperienceEvent`."""

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
    """An interaction out of a record.

    Args:
        store_text: whether the user's message, where the event has it, stays in the body.

    Raises:
        InputError: it is no `InteractionEvent`; the message says why.
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
    """A reply out of a record.

    Raises:
        InputError: it is no `ReplyEvent`; the message says why.
    """
    try:
        fields = _reply.decode(value or b"")
        array, embedding = fields.embedding, None
        said = fields.text.strip() if fields.kind == "text" else fields.rating is not None
        if said and (array is None or (_is_array(array) and _are_finite(array.f16))):
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
    """A stored experience; None where a tool added an entry that has no interaction to amend."""
    try:
        return _experience.decode(value)
    except msgspec.ValidationError:
        return None


def moment(text: str) -> float:
    """Unix seconds of a time as events have it."""
    return _moment(text).timestamp()


def message_of(body: bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    """(D,) the embedding of the user's message in an `Interaction.body`."""
    return np.frombuffer(_message.decode(body).message.f16, dtype="<f2").astype(np.float32)


def _is_valid(it: _Interaction) -> bool:
    """Whether its arrays and lists agree, as `InteractionEvent` wants it."""
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
    # Of a name that comes twice JSON readers take the last; the first would stay in the bytes. Where nothing
    # is escaped, the name can be spelled in one way only.
    return it.text is None and value.count(b'"text"') <= 1 and b"\\" not in value
