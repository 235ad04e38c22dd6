"""What an audit knows: events, experiences and weights versions, each as a small value. Pure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from cortex_core.weights import WeightsManifest
from streams.events import ExperienceEvent, InteractionEvent, ReplyEvent

Key = tuple[str, str]
"""(model_id, interaction_id): what replay and the experiences topic know an experience by."""


@dataclass(frozen=True, slots=True)
class Interaction:
    """One record of the interactions topic."""

    id: str
    conversation_id: str
    model_id: str
    at: float
    """Unix seconds: when it occurred."""
    arrived: float
    """Unix seconds: when it was sent, by its record."""
    digest: bytes
    """Of all its fields but the text."""
    is_done: bool = True
    """Whether the joiners have committed it."""

    @classmethod
    def of(cls, event: InteractionEvent, arrived: float, is_done: bool = True) -> Interaction:
        at = event.occurred_at.timestamp()
        ids = (event.interaction_id, event.conversation_id, event.model_id)
        return cls(*ids, at, arrived, digest(event), is_done)

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
    names: str | None
    """The interaction it names."""
    at: float
    arrived: float
    rating: float | None
    """None for texts, whose reward only a reader of texts knows."""
    is_done: bool = True

    @classmethod
    def of(cls, event: ReplyEvent, arrived: float, is_done: bool = True) -> Reply:
        ids = (event.reply_id, event.conversation_id, event.interaction_id)
        rating = None if event.kind == "text" else event.rating
        return cls(*ids, event.occurred_at.timestamp(), arrived, rating, is_done)

    @property
    def order(self) -> tuple[float, str]:
        return self.at, self.id


@dataclass(frozen=True, slots=True)
class Experience:
    """One experience, as it was published or stands in replay."""

    model_id: str
    interaction_id: str
    at: float
    version: int
    """Of the one of two that is right, the higher."""
    outcome: str
    reward: float
    aggregation: str
    reply_ids: tuple[str, ...]
    rewards: tuple[float, ...]
    """Of each reply, in the order of `reply_ids`."""
    digest: bytes
    """Of the interaction inside."""

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
    """All that the experiences topic says of one interaction."""

    newest: Experience
    """Of the highest version."""
    reply_ids: set[str]
    """All that ever stood in one of its experiences."""
    contradicts: bool = False
    """Whether records of the highest version differ."""
    records: int = 1

    @classmethod
    def of(cls, experience: Experience) -> Published:
        return cls(experience, set(experience.reply_ids))

    def add(self, experience: Experience) -> None:
        """Another record, in any order."""
        if experience.version == self.newest.version and experience != self.newest:
            self.contradicts = True
        if experience.version > self.newest.version:
            self.newest, self.contradicts = experience, False
        self.reply_ids.update(experience.reply_ids)
        self.records += 1


@dataclass(frozen=True, slots=True)
class Version:
    """One weights version in the log."""

    model_id: str
    version: int
    parent: int | None
    learned: int
    """Distinct experiences learned since birth."""
    consumed: dict[str, int]
    """"topic-partition" → next offset"""

    @classmethod
    def of(cls, manifest: WeightsManifest) -> Version:
        return cls(
            manifest.model_id, manifest.version, manifest.parent, manifest.interactions, manifest.consumed
        )


@dataclass(slots=True)
class Evidence:
    """Everything that an audit judges.

    Outputs are read before inputs, so that no experience is there whose events are not.
    """

    window_s: float
    capacity: int
    """Entries of a replay buffer."""
    started: float
    """Unix seconds: before any of it was read."""
    grace_s: float
    """Seconds by which clocks may differ, and by which a delivery or a worker may be late. What falls within
    them is not judged."""
    horizon: float = 0.0
    """Events that arrived before this may have left the topics; 0: none has."""

    interactions: list[Interaction] = field(default_factory=list)
    """In the order of each partition, repeated ones too."""
    replies: list[Reply] = field(default_factory=list)
    refused: int = 0
    """Records of both topics that stand in the dead letters."""
    unreadable: list[str] = field(default_factory=list)
    """Records that the joiners have committed, are no events, and do not stand in the dead letters."""
    uncommitted: int = 0
    """Records of both topics that the joiners have not committed."""

    published: dict[Key, Published] = field(default_factory=dict)
    stored: dict[Key, Experience] = field(default_factory=dict)
    """Replay."""
    damaged: list[str] = field(default_factory=list)
    """What in replay or the experiences topic contradicts itself."""
    versions: list[Version] = field(default_factory=list)
    """In the order of the log."""


def digest(event: InteractionEvent) -> bytes:
    """16 bytes of an interaction's fields; the text is left out, for joiners may drop it."""
    return hashlib.blake2b(event.model_copy(update={"text": None}).to_bytes(), digest_size=16).digest()
