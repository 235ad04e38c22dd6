"""The wire contract: every message on Kafka as a pydantic model.

Values are JSON in UTF-8. Readers accept unknown fields and older schema versions; they reject newer schema
versions, which then become dead letters. Embeddings are base64 of little-endian float16 with their shape.
Nothing here uses Kafka, Redis, torch or the clock, except `utc_now` and `new_id`, for the creators of events.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import uuid_utils
from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from cortex_core.arrays import as_float32
from cortex_core.errors import InputError, shown
from cortex_core.replay_buffer import ReplayEntry

SCHEMA_VERSION = 1

MAX_SIDE = 1_000_000
"""Rows or columns of an embedding."""
MAX_ID = 200
"""Characters in an id; ids are keys in Kafka and Redis and must stay short."""

Float16Array = npt.NDArray[np.float16]


def utc_now() -> datetime:
    """The current time in UTC. All events get their time from here."""
    return datetime.now(UTC)


def new_id() -> str:
    """A UUIDv7: unique, and ordered by its time of creation."""
    return str(uuid_utils.uuid7())


def _decode_array(value: Any) -> Float16Array:
    if isinstance(value, np.ndarray):
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(value, dtype="<f2")
    elif isinstance(value, dict):
        shape, text = value.get("shape"), value.get("f16")
        if (
            not isinstance(shape, list)
            or not 1 <= len(shape) <= 2
            or not all(type(n) is int and 0 <= n <= MAX_SIDE for n in shape)
            or not isinstance(text, str)
        ):
            raise ValueError(
                'an embedding is {"shape": [rows, dim] or [dim], "f16": base64}, '
                f"each of rows and dim at most {MAX_SIDE:,}"
            )
        try:
            raw = base64.b64decode(text, validate=True)
        except binascii.Error as error:
            raise ValueError(f"the embedding's f16 is not valid base64: {error}") from error
        if len(raw) != 2 * math.prod(shape):
            raise ValueError(
                f"the embedding has {len(raw)} bytes, but shape {shape} needs {2 * math.prod(shape)}"
            )
        array = np.frombuffer(raw, dtype="<f2").reshape(shape)
    else:
        raise ValueError(f"an embedding cannot be a {type(value).__name__}")
    if not np.isfinite(array).all():
        raise ValueError("the embedding contains NaN, infinity or a number beyond float16's 65,504")
    return array


def _encode_array(array: Float16Array) -> dict[str, Any]:
    return {"shape": list(array.shape), "f16": base64.b64encode(array.tobytes()).decode("ascii")}


Embedding = Annotated[
    Float16Array,
    BeforeValidator(_decode_array),
    PlainSerializer(_encode_array, return_type=dict),
    WithJsonSchema({"type": "object", "required": ["shape", "f16"]}),
]
"""One vector (dim,) or one matrix (rows, dim), float16 on the wire and in memory."""

Id = Annotated[str, Field(min_length=1, max_length=MAX_ID)]
MODEL_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$"
"""A model's id names topics' keys, keys of Redis, metrics and lines of terminals."""
Unit = Annotated[float, Field(ge=0.0, le=1.0)]
Signed = Annotated[float, Field(ge=-1.0, le=1.0)]
Rating = Annotated[float, Field(ge=-1.0, le=1.0, strict=True)]
"""A number; booleans are rejected, not converted to 0 and 1."""
Finite = Annotated[float, Field(allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=0, lt=2**53)]
"""Non-negative integers that every JSON parser represents exactly."""
Propensity = Annotated[float, Field(gt=0.0, le=1.0)]
T = TypeVar("T")
Items = Annotated[list[T], FailFast()]
"""A list of which only the first invalid item is reported, as a record may contain millions."""


class Event(BaseModel):
    """Base class: the fields of all events."""

    model_config = ConfigDict(
        extra="ignore", arbitrary_types_allowed=True, ser_json_inf_nan="constants", frozen=True
    )

    schema_version: int = SCHEMA_VERSION
    occurred_at: AwareDatetime
    """Time of the event, by its creator's clock. The join rules use this time only."""

    @field_validator("schema_version")
    @classmethod
    def _known_schema(cls, version: int) -> int:
        if version > SCHEMA_VERSION:
            raise ValueError(
                f"schema_version {version} is newer than {SCHEMA_VERSION}, the newest that this worker "
                "supports: upgrade the worker, then retry the dead letter"
            )
        return version

    def to_bytes(self) -> bytes:
        """The value of the Kafka record."""
        return self.model_dump_json().encode()


class InteractionEvent(Event):
    """One logged decision, with the exact input tensors of the model.

    D text dimension, S situation dimension, F metadata features, N logged memories (first the K retrieved
    ones, then some that were not retrieved), A strategies.
    """

    interaction_id: Id
    conversation_id: Id
    model_id: Annotated[str, Field(pattern=MODEL_ID)]
    agent_id: Id = "agent"
    weights_version: Whole
    encoder: Id | None = None
    """Name of the text encoder of all embeddings (`TextEncoder.name`); None: not known. A model learns from
    the embeddings of one encoder only."""

    message: Embedding
    """(D,)"""
    history: Embedding
    """(D,)"""
    metadata: Items[Finite]
    """(F,)"""
    situation: Embedding
    """(S,)"""
    memories: Embedding
    """(N, D)"""
    memory_ids: Items[Id]
    """(N,)"""
    memory_scores: Items[Finite]
    """(K,) of the retrieved ones; K ≤ N"""
    memory_propensities: Items[Propensity] = []
    """(K,) probability with which each was retrieved, or empty"""

    strategy_id: Id
    strategy_ids: Items[Id]
    """(A,) all strategies, in the order of `probabilities`"""
    probabilities: Items[Unit]
    """(A,)"""
    context: Items[Finite]
    """(7,) context summary"""
    confidence: Unit
    text: str | None = None
    """The user's message; only if CORTEX_STORE_TEXT is set."""

    @model_validator(mode="after")
    def _shapes_agree(self) -> InteractionEvent:
        k, n = len(self.memory_scores), len(self.memory_ids)
        problems = []
        if self.message.ndim != 1 or self.message.shape != self.history.shape:
            problems.append(
                f"message {self.message.shape} and history {self.history.shape} must be (dim,) alike"
            )
        if self.situation.ndim != 1:
            problems.append(f"situation {self.situation.shape} must be (dim,)")
        if self.memories.ndim != 2 or self.memories.shape[0] != n:
            problems.append(f"memories {self.memories.shape} must have one row for each of {n} memory_ids")
        if k > n:
            problems.append(f"{k} memory_scores for {n} memories")
        if self.memory_propensities and len(self.memory_propensities) != k:
            problems.append(f"{len(self.memory_propensities)} memory_propensities for {k} retrieved memories")
        if len(self.strategy_ids) != len(self.probabilities):
            problems.append(
                f"{len(self.probabilities)} probabilities for {len(self.strategy_ids)} strategy_ids"
            )
        elif self.strategy_id not in self.strategy_ids:
            problems.append(f"strategy_id {self.strategy_id!r} is not one of {self.strategy_ids}")
        elif self.propensity <= 0.0:
            problems.append(f"the chosen strategy {self.strategy_id!r} has probability {self.propensity}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def propensity(self) -> float:
        """Probability with which the strategy was chosen."""
        return self.probabilities[self.strategy_ids.index(self.strategy_id)]


class ReplyEvent(Event):
    """A user's feedback on an interaction."""

    reply_id: Id
    conversation_id: Id
    interaction_id: Id | None = None
    """None: the conversation's latest interaction before this reply."""
    kind: Literal["text", "rating", "outcome"] = "text"
    """text: the user's next message; rating: an explicit rating; outcome: a result known later."""
    text: str = ""
    rating: Rating | None = None
    """For rating and outcome: -1 (bad) to 1 (good)."""
    embedding: Embedding | None = None
    """(D,) of `text`, if the service that received it has a text encoder. Compared with the interaction's
    `message`, it shows whether the reply changes the topic."""

    @model_validator(mode="after")
    def _kind_has_its_value(self) -> ReplyEvent:
        require_value(self.kind, self.text, self.rating)
        return self


def require_value(kind: str, text: str, rating: float | None) -> None:
    """Checks that a reply has the value that its kind requires.

    Raises:
        ValueError: a reply of kind text without text, or any other without a rating.
    """
    if kind == "text" and not text.strip():
        raise ValueError("a reply of kind text needs a text that is not blank")
    if kind != "text" and rating is None:
        raise ValueError(f"a reply of kind {kind} needs a rating in [-1, 1]")


class Signal(BaseModel):
    """One feedback signal extracted from a reply."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    type: Literal["positive", "negative", "correction", "confusion", "engagement", "disengagement"]
    strength: Unit
    reward: Signed
    evidence: str = ""
    """The words of the text that caused it; empty unless CORTEX_STORE_TEXT is set."""


class Reading(BaseModel):
    """What one reply said, as its reader understood it; without the reply's text."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    reply_id: Id
    kind: Literal["text", "rating", "outcome"] = "text"
    occurred_at: AwareDatetime
    reward: Signed
    confidence: Unit
    signals: Items[Signal] = []
    extractor: str = ""


class ExperienceEvent(Event):
    """An interaction and its reward. `occurred_at` is the interaction's.

    What is here is a function of the interaction and the set of its replies alone: not of their order of
    arrival, not of when a worker ran. That is what makes a rebuild equal to live processing.
    """

    interaction: InteractionEvent
    revision: Whole
    """Number of distinct replies; 0 means that nobody answered. It decreases if a reply is moved to another
    interaction; the record's version (`version_of`) only increases."""
    outcome: Literal["reply", "no_reply"]
    reward: Signed
    reward_confidence: Unit = 1.0
    signals: Items[Signal] = []
    """The signals that determine the reward: of the reply that `aggregation` chose, or of several."""
    readings: Items[Reading] = []
    """The reading of every reply, in order of (`occurred_at`, `reply_id`)."""
    reply_ids: Items[Id] = []
    replied_at: AwareDatetime | None = None
    """`occurred_at` of the newest reply."""
    extractor: str = ""
    """Name and version of what read the replies."""
    aggregation: str = "last"
    """How several replies' rewards became one."""

    def to_entry(self) -> ReplayEntry:
        """The replay entry that this experience is stored as."""
        it = self.interaction
        k = len(it.memory_scores)
        return ReplayEntry(
            situation_emb=it.situation.astype(np.float32),
            memory_indices=list(range(k)),
            memory_scores=it.memory_scores,
            strategy_id=it.strategy_id,
            encoder=it.encoder or "",
            confidence=it.confidence,
            reward=self.reward,
            id=it.interaction_id,
            revision=self.revision,
            occurred_at=it.occurred_at.timestamp(),
            reward_confidence=self.reward_confidence,
            message_emb=it.message.astype(np.float32),
            history_emb=it.history.astype(np.float32),
            metadata=as_float32(it.metadata, "metadata", 1),
            memory_embs=it.memories.astype(np.float32),
            propensity=it.propensity,
            memory_propensities=it.memory_propensities,
            context=it.context,
            weights_version=it.weights_version,
            text=it.text or "",
        )


VERSION = "version"
"""Name of the header of an experience's record, decimal: of two records of one interaction the one with the
higher version is right, whatever their order. The same (id, version) carries the same bytes."""


def version_header(version: int) -> list[tuple[str, bytes]]:
    """The headers of an experience's record."""
    return [(VERSION, str(version).encode())]


def version_of(headers: Iterable[tuple[str, bytes]], revision: int) -> int:
    """The version of an experience in a record with these headers; where they have none, its `revision`."""
    value = dict(headers).get(VERSION, b"")
    return int(value) if value.isdigit() and len(value) < 16 else revision


ControlAction = Literal["rollback", "pin", "unpin", "pause", "resume", "forget", "forgotten"]


class ControlEvent(Event):
    """An operator command for a model."""

    control_id: Id
    model_id: Id
    action: ControlAction
    version: Whole | None = None
    reason: Annotated[str, Field(max_length=2_000)] = ""


class ForgetEvent(Event):
    """An operator's request to forget a conversation: all its events up to `occurred_at`."""

    conversation: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of the conversation's id: this record outlives the conversation."""


class DeadLetter(Event):
    """A record that a worker could not process, with its bytes."""

    dead_letter_id: Id
    reason: str
    topic: str
    partition: Whole
    offset: Annotated[int, Field(lt=2**53)]
    """-1: `raw` is an entry of replay; a retry publishes it to the topic."""
    key: str | None = None
    """base64 of the key's bytes"""
    raw: str
    """base64 of the value's bytes"""
    raw_at_source: bool = False
    """The record is too large to copy: `raw` is empty; read the bytes at topic, partition and offset, which
    are retained as long as this dead letter."""
    worker: str = ""


E = TypeVar("E", bound=Event)


def parse(kind: type[E], value: bytes | None) -> E:
    """Parses an event.

    Raises:
        InputError: invalid JSON, a missing or invalid field, or a newer schema; the message lists each field
            with the actual and the expected value. No bytes cause any other error.
    """
    if value is None:
        raise InputError(f"expected a value of type {kind.__name__}, got a tombstone")
    try:
        return kind.model_validate_json(value)
    except ValidationError as error:
        raise InputError(f"invalid {kind.__name__}: {describe(error)}") from error
    except Exception as error:  # numbers or nesting beyond a validator's limits
        raise InputError(f"invalid {kind.__name__}: {type(error).__name__}: {shown(str(error))}") from error


def describe(error: ValidationError) -> str:
    """A validation error in one line: the first 8 invalid fields, with their values shortened."""
    parts = []
    for item in error.errors(include_url=False, include_context=False)[:8]:
        where = ".".join(str(x)[:80] for x in item["loc"]) or "value"
        parts.append(f"{where}: {item['msg'][:500]} (got {shown(item.get('input'))})")
    return "; ".join(parts)
