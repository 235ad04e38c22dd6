"""What the demo measures, from what it saw: pure functions and plain records, no I/O.

The true reward is the simulation's own (`users.reward`), in [0, 1]; the system never sees it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np

from cortex_core.evaluation import expected_calibration_error

FIRST_SHARE = 0.10
"""`…_first` are means over this share of the interactions, from the beginning."""
LAST_SHARE = 0.25
"""`…_last` and `reward_control` are means over this share, up to the end."""
ECE_BINS = 15


@dataclass(frozen=True, slots=True)
class Sample:
    """One request as the learning model answered it, and as the control did."""

    index: int
    reward: float
    """True expected contentment with the answer, in [0, 1]."""
    content: bool
    """Whether this user was content."""
    precision: float
    """Share of the shown memories that help."""
    control_precision: float
    """The same for the memories that the untrained gate shows."""
    confidence: float
    weights_version: int
    control: Mapping[str, float]
    """strategy id → true reward of that strategy with the memories that the untrained gate shows."""


@dataclass(frozen=True, slots=True)
class ExperienceSeen:
    """One record of the experiences topic."""

    partition: int
    offset: int
    interaction_id: str
    revision: int
    reply_ids: tuple[str, ...]
    replied_at: datetime | None
    digest: str
    """Of the whole value: two records of one (interaction, revision) must agree in it."""


@dataclass(frozen=True, slots=True)
class VersionSeen:
    """A weights version in one inference worker, from the moment it decided with it."""

    version: int
    applied_at: datetime
    consumed: Mapping[str, int]
    """"topic-partition" → next offset: it has learned from every experience below."""


@dataclass(slots=True)
class Tally:
    """What was sent and acknowledged, and what went wrong on the way."""

    samples: list[Sample] = field(default_factory=list)
    interactions: list[str] = field(default_factory=list)
    """Ids of acknowledged interactions of the learning model."""
    control_interactions: list[str] = field(default_factory=list)
    replies: dict[str, str] = field(default_factory=dict)
    """reply id → interaction id; acknowledged ones."""
    errors: Counter[str] = field(default_factory=Counter)
    """What the service refused or did not answer, by reason."""

    @property
    def events(self) -> int:
        """Events that Kafka has acknowledged."""
        return len(self.interactions) + len(self.control_interactions) + len(self.replies)


def spans(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """The first and the last part of a run, in order of the requests."""
    ordered = sorted(samples, key=lambda s: s.index)
    first = max(1, round(FIRST_SHARE * len(ordered)))
    last = max(1, round(LAST_SHARE * len(ordered)))
    return ordered[:first], ordered[-last:]


def mean(values: Iterable[float]) -> float | None:
    """None for no values."""
    array = np.fromiter(values, dtype=float)
    return float(array.mean()) if len(array) else None


def best_fixed(samples: Sequence[Sample]) -> str | None:
    """The one strategy that would have served these samples best with the untrained gate's memories."""
    totals: Counter[str] = Counter()
    for sample in samples:
        totals.update(dict(sample.control))
    return max(sorted(totals), key=lambda s: totals[s]) if totals else None


def control_rewards(samples: Sequence[Sample], strategy: str | None = None) -> list[float]:
    """True rewards of the control: the untrained gate's memories and one fixed strategy for all requests.

    The strategy is the best one in hindsight over these very samples unless one is given, which makes this
    the strongest policy that does not look at the request.
    """
    fixed = strategy or best_fixed(samples)
    return [sample.control[fixed] for sample in samples] if fixed else []


def calibration_error(
    confidences: Sequence[float], content: Sequence[bool], bins: int = ECE_BINS
) -> float | None:
    """Expected calibration error over `bins` bins of equal width; None for no samples."""
    return expected_calibration_error(confidences, content, bins) if confidences else None


def reply_to_weights_ms(
    experiences: Sequence[ExperienceSeen], topic: str, workers: Sequence[Sequence[VersionSeen]]
) -> list[float]:
    """For each experience with a reply: from the reply to the first version that learned from it, in ms.

    Measured where it matters: at the slowest inference worker. Experiences that some worker has no version
    for yet are left out; `unlearned` counts them.
    """
    reach = [_Reach(topic, versions) for versions in workers]
    out = []
    for seen in experiences:
        applied = [r.applied_at(seen.partition, seen.offset) for r in reach]
        if seen.replied_at is not None and applied and None not in applied:
            newest = max(at for at in applied if at is not None)
            out.append((newest - seen.replied_at).total_seconds() * 1e3)
    return out


def unlearned(
    experiences: Sequence[ExperienceSeen], topic: str, workers: Sequence[Sequence[VersionSeen]]
) -> int:
    """Experiences that at least one worker serves no version for yet."""
    reach = [_Reach(topic, versions) for versions in workers]
    return sum(any(r.applied_at(e.partition, e.offset) is None for r in reach) for e in experiences)


class _Reach:
    """When one worker began to serve what was learned from an experience."""

    def __init__(self, topic: str, versions: Sequence[VersionSeen]) -> None:
        self._topic = topic
        self._ordered = sorted(versions, key=lambda v: v.version)
        self._consumed: dict[int, list[int]] = {}

    def applied_at(self, partition: int, offset: int) -> datetime | None:
        if partition not in self._consumed:
            key = f"{self._topic}-{partition}"
            offsets = np.array([v.consumed.get(key, 0) for v in self._ordered], dtype=int)
            # A rollback serves older bytes and still has consumed what came before it.
            self._consumed[partition] = np.maximum.accumulate(offsets).tolist() if len(offsets) else []
        place = bisect_right(self._consumed[partition], offset)
        return self._ordered[place].applied_at if place < len(self._ordered) else None


def percentile(values: Sequence[float], q: float) -> float | None:
    """The `q`-th percentile (0–100), None for no values."""
    return float(np.percentile(values, q)) if len(values) else None


@dataclass(frozen=True, slots=True)
class Audit:
    """Ids that were acknowledged against ids that are there."""

    joined: int
    lost: frozenset[str]
    """Ids of interactions and replies that were acknowledged and are missing somewhere."""
    pending: frozenset[str]
    """Ids that stand in their topic and that a run which was cut short did not see joined."""
    duplicates: int
    redelivered: int
    """Records that say again what an earlier one said: harmless, and told apart from duplicates."""


def audit(
    tally: Tally,
    experiences: Sequence[ExperienceSeen],
    replay: Mapping[str, int],
    *,
    logged: frozenset[str],
    drained: bool,
    replay_capacity: int,
    learned: int,
) -> Audit:
    """Compares what was acknowledged with what is there.

    Args:
        tally: what the service acknowledged.
        experiences: every record of this model in the experiences topic.
        replay: interaction id → revision, of every entry of this model in the replay buffer.
        logged: ids of every interaction and reply in their topics.
        drained: whether the workers had the time to handle everything. Without it, what stands in its topic
            and is not joined yet is pending; with it, it is lost.
        replay_capacity: the buffer keeps this many, the newest ones.
        learned: experiences and amendments that the trainer says it learned from; more than there are mean
            that one was counted twice.
    """
    records: dict[tuple[str, int], set[str]] = {}
    newest: dict[str, ExperienceSeen] = {}
    for seen in experiences:
        records.setdefault((seen.interaction_id, seen.revision), set()).add(seen.digest)
        if seen.interaction_id not in newest or seen.revision > newest[seen.interaction_id].revision:
            newest[seen.interaction_id] = seen
    replied = set(tally.replies.values())
    lost = {i for i in replied if i not in newest}
    lost |= {r for r, i in tally.replies.items() if i in newest and r not in newest[i].reply_ids}
    if len(newest) <= replay_capacity:  # beyond it the oldest leave, as they must
        lost |= {i for i in replied if replay.get(i, -1) < (newest[i].revision if i in newest else 0)}
    pending = frozenset() if drained else frozenset(lost & logged)
    sent = (*tally.interactions, *tally.control_interactions, *tally.replies)
    lost = (lost - pending) | {i for i in sent if i not in logged}
    contradicting = sum(len(digests) - 1 for digests in records.values())
    return Audit(
        joined=len(replied & set(newest)),
        lost=frozenset(lost),
        pending=pending,
        duplicates=contradicting + max(0, learned - len(records)),
        redelivered=len(experiences) - sum(len(d) for d in records.values()),
    )


def rounded(value: Any, digits: int = 4) -> Any:
    """Floats of a JSON value with at most `digits` decimals, what is not finite as None."""
    if isinstance(value, float):
        return round(value, digits) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: rounded(v, digits) for k, v in value.items()}
    return value
