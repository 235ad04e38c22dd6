"""The input of an audit: events, experiences and weights versions, each as a small value. Pure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from cortex_core.weights import WeightsManifest
from streams.events import ExperienceEvent, InteractionEvent, ReplyEvent

Key = tuple[str, str]
"""(model_id, interaction_id): identifies an experience in replay and on the experiences topic."""


@dataclass(frozen=True, slots=True)
class Interaction:
    """One record of the interactions topic."""

    id: str
    conversation_id: str
    model_id: str
    at: float
    """Unix seconds: the event's `occurred_at`."""
    arrived: float
    """Unix seconds: the record's timestamp."""
    digest: bytes
    """Hash of all fields except the text."""
    committed: bool = True
    """Whether the joiners have committed it."""

    @classmethod
    def of(cls, event: InteractionEvent, arrived: float, committed: bool = True) -> Interaction:
        at = event.occurred_at.timestamp()
        ids = (event.interaction_id, event.conversation_id, event.model_id)
        return cls(*ids, at, arrived, digest(event), committed)

    @property
    def key(self) -> Key:
        return self.model_id, self.id

    @property
    def order(self) -> tuple[float, str]:
        return self.at, self.id


@dataclass(frozen=True, slots=True)
class Reply:
    """One record of the replies topic."""

    id: str
    conversation_id: str
    interaction_id: str | None
    """The interaction that the reply names; None if it names none."""
    at: float
    arrived: float
    rating: float | None
    """None for texts, whose rewards are not audited."""
    committed: bool = True

    @classmethod
    def of(cls, event: ReplyEvent, arrived: float, committed: bool = True) -> Reply:
        ids = (event.reply_id, event.conversation_id, event.interaction_id)
        rating = None if event.kind == "text" else event.rating
        return cls(*ids, event.occurred_at.timestamp(), arrived, rating, committed)

    @property
    def order(self) -> tuple[float, str]:
        return self.at, self.id


@dataclass(frozen=True, slots=True)
class Experience:
    """One experience, from replay or the experiences topic."""

    model_id: str
    interaction_id: str
    at: float
    version: int
    """Of two experiences of one interaction the one with the higher version is valid."""
    outcome: str
    reward: float
    aggregation: str
    reply_ids: tuple[str, ...]
    rewards: tuple[float, ...]
    """The reward of each reply, in the order of `reply_ids`."""
    digest: bytes
    """Digest of the contained interaction."""

    @classmethod
    def of(cls, event: ExperienceEvent, version: int) -> Experience:
        return cls(
            event.interaction.model_id,
            event.interaction.interaction_id,
            event.occurred_at.timestamp(),
            version,
            event.outcome,
            event.reward,
            event.aggregation,
            tuple(event.reply_ids),
            tuple(reading.reward for reading in event.readings),
            digest(event.interaction),
        )

    @property
    def key(self) -> Key:
        return self.model_id, self.interaction_id


@dataclass(slots=True)
class Published:
    """All records of the experiences topic about one interaction."""

    newest: Experience
    """The one with the highest version."""
    reply_ids: set[str]
    """The ids of the replies in any of these records."""
    conflicting: bool = False
    """Whether records with the highest version differ."""
    records: int = 1

    @classmethod
    def of(cls, experience: Experience) -> Published:
        return cls(experience, set(experience.reply_ids))

    def add(self, experience: Experience) -> None:
        """Adds a record; in any order."""
        if experience.version == self.newest.version and experience != self.newest:
            self.conflicting = True
        if experience.version > self.newest.version:
            self.newest, self.conflicting = experience, False
        self.reply_ids.update(experience.reply_ids)
        self.records += 1


@dataclass(frozen=True, slots=True)
class Version:
    """One version on the weights topic."""

    model_id: str
    version: int
    """0: the model's versions before were deleted."""
    parent: int | None
    learned: int
    """Number of distinct experiences that the model has learned from."""
    consumed: dict[str, int]
    """"topic-partition" → next offset"""

    @classmethod
    def of(cls, manifest: WeightsManifest) -> Version:
        return cls(
            manifest.model_id, manifest.version, manifest.parent, manifest.interactions, manifest.consumed
        )


@dataclass(slots=True)
class Evidence:
    """Everything that an audit checks.

    Outputs are read before inputs, so that the events of all experiences are included.
    """

    window_s: float
    capacity: int
    """Entries of a replay buffer."""
    started: float
    """Unix seconds: before the first read."""
    grace_s: float
    """Tolerance in seconds for differences between clocks and for delays of deliveries and workers.

    Within it, a missing effect is not an error."""
    retained_since: float = 0.0
    """Unix seconds: retention may have deleted events that arrived before; 0: it has deleted none."""

    interactions: list[Interaction] = field(default_factory=list)
    """In the order of each partition, including duplicates."""
    replies: list[Reply] = field(default_factory=list)
    refused: int = 0
    """Number of records of both topics with a dead letter."""
    unreadable: list[str] = field(default_factory=list)
    """Invalid records that the joiners have committed without a dead letter."""
    forgotten: int = 0
    """Number of records of both topics that belong to forgotten conversations: left out."""
    uncommitted: int = 0
    """Number of records of both topics that the joiners have not committed."""

    published: dict[Key, Published] = field(default_factory=dict)
    stored: dict[Key, Experience] = field(default_factory=dict)
    """The entries of replay."""
    misfits: set[Key] = field(default_factory=set)
    """Experiences that do not fit their model, and so are not in replay."""
    inconsistent: list[str] = field(default_factory=list)
    """Invalid or inconsistent entries of replay and records of the experiences topic."""
    versions: list[Version] = field(default_factory=list)
    """In the order of the topic."""
    models_forgotten: dict[str, float] = field(default_factory=dict)
    """Model → Unix seconds when its replay and its versions were last deleted."""


def digest(event: InteractionEvent) -> bytes:
    """16-byte hash of an interaction's fields except the text, which joiners may remove."""
    return hashlib.blake2b(event.model_copy(update={"text": None}).to_bytes(), digest_size=16).digest()
