"""Metrics of the demo: pure functions of the observations, without I/O.

The true reward is that of the simulation (`users.reward`), in [0, 1]; it is hidden from the system.
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
"""`…_first` are means over this fraction of the interactions, from the beginning."""
LAST_SHARE = 0.25
"""`…_last` and `reward_control` are means over this fraction, at the end."""
ECE_BINS = 15


@dataclass(frozen=True, slots=True)
class Sample:
    """One request, as answered by the learning model and by the control."""

    index: int
    reward: float
    """True probability of a satisfied user, in [0, 1]."""
    satisfied: bool
    """Whether this user was satisfied."""
    precision: float
    """Fraction of the retrieved memories that help."""
    control_precision: float
    """The same for the memories of the untrained gate."""
    confidence: float
    weights_version: int
    control: Mapping[str, float]
    """strategy id → true reward of that strategy with the memories of the untrained gate."""


@dataclass(frozen=True, slots=True)
class ExperienceSeen:
    """One record of the experiences topic."""

    partition: int
    offset: int
    interaction_id: str
    version: int
    revision: int
    """Number of replies."""
    reply_ids: tuple[str, ...]
    replied_at: datetime | None
    digest: str
    """Hash of the value: equal for all records of one (interaction, version)."""


@dataclass(frozen=True, slots=True)
class VersionSeen:
    """A weights version in one inference worker, and since when it serves."""

    version: int
    applied_at: datetime
    consumed: Mapping[str, int]
    """"topic-partition" → next offset: the version has learned from all experiences below."""


@dataclass(slots=True)
class Tally:
    """What was sent and acknowledged, and the errors."""

    samples: list[Sample] = field(default_factory=list)
    interactions: list[str] = field(default_factory=list)
    """Ids of the acknowledged interactions of the learning model."""
    control_interactions: list[str] = field(default_factory=list)
    replies: dict[str, str] = field(default_factory=dict)
    """reply id → interaction id, of the acknowledged replies."""
    errors: Counter[str] = field(default_factory=Counter)
    """Requests rejected or not answered by the service, by reason."""

    @property
    def events(self) -> int:
        """Number of events acknowledged by Kafka."""
        return len(self.interactions) + len(self.control_interactions) + len(self.replies)


def spans(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """The first and the last samples of a run, in the order of the requests."""
    ordered = sorted(samples, key=lambda s: s.index)
    first = max(1, round(FIRST_SHARE * len(ordered)))
    last = max(1, round(LAST_SHARE * len(ordered)))
    return ordered[:first], ordered[-last:]


def mean(values: Iterable[float]) -> float | None:
    """The mean; None without values."""
    array = np.fromiter(values, dtype=float)
    return float(array.mean()) if len(array) else None


def best_fixed(samples: Sequence[Sample]) -> str | None:
    """The best fixed strategy on these samples in hindsight, with the untrained gate's memories."""
    totals: Counter[str] = Counter()
    for sample in samples:
        totals.update(dict(sample.control))
    return max(sorted(totals), key=lambda s: totals[s]) if totals else None


def control_rewards(samples: Sequence[Sample], strategy: str | None = None) -> list[float]:
    """True rewards of the control: the untrained gate's memories and one fixed strategy for all requests.

    Unless a strategy is given, it is the best one in hindsight on the same samples: the best policy that
    ignores the request.
    """
    fixed = strategy or best_fixed(samples)
    return [sample.control[fixed] for sample in samples] if fixed else []


def calibration_error(
    confidences: Sequence[float], satisfied: Sequence[bool], bins: int = ECE_BINS
) -> float | None:
    """Expected calibration error over `bins` bins of equal width; None without samples."""
    return expected_calibration_error(confidences, satisfied, bins) if confidences else None


def reply_to_weights_ms(
    experiences: Sequence[ExperienceSeen], topic: str, workers: Sequence[Sequence[VersionSeen]]
) -> list[float]:
    """For each experience with a reply, the time from the reply to the first version that includes it, in ms.

    Measured at the slowest inference worker. Omits the experiences that `unlearned` counts.
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
    """Number of experiences that the served version of at least one worker does not include yet."""
    reach = [_Reach(topic, versions) for versions in workers]
    return sum(any(r.applied_at(e.partition, e.offset) is None for r in reach) for e in experiences)


class _Reach:
    """Times at which one worker began to serve a version that includes an experience."""

    def __init__(self, topic: str, versions: Sequence[VersionSeen]) -> None:
        self._topic = topic
        self._ordered = sorted(versions, key=lambda v: v.version)
        self._consumed: dict[int, list[int]] = {}

    def applied_at(self, partition: int, offset: int) -> datetime | None:
        if partition not in self._consumed:
            key = f"{self._topic}-{partition}"
            offsets = np.array([v.consumed.get(key, 0) for v in self._ordered], dtype=int)
            # A rollback serves older weights, but has consumed at least as many offsets.
            self._consumed[partition] = np.maximum.accumulate(offsets).tolist() if len(offsets) else []
        place = bisect_right(self._consumed[partition], offset)
        return self._ordered[place].applied_at if place < len(self._ordered) else None


def percentile(values: Sequence[float], q: float) -> float | None:
    """The `q`-th percentile (0–100); None without values."""
    return float(np.percentile(values, q)) if len(values) else None


@dataclass(frozen=True, slots=True)
class Audit:
    """Comparison of acknowledged ids with stored ids."""

    joined: int
    lost: frozenset[str]
    """Acknowledged ids of interactions and replies that are missing in a topic, an experience or replay."""
    pending: frozenset[str]
    """Ids that are in their topic but not yet joined, in an interrupted run."""
    duplicates: int
    redelivered: int
    """Records identical to an earlier one: harmless, not counted as duplicates."""


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
    """Compares what was acknowledged with what is stored.

    Args:
        tally: what the service acknowledged.
        experiences: all records of this model in the experiences topic.
        replay: interaction id → revision, of all entries of this model in the replay buffer.
        logged: ids of all interactions and replies in their topics.
        drained: whether the workers had time to process everything. If not, an id that is in its topic but
            not joined is pending; otherwise it is lost.
        replay_capacity: maximum number of entries in the replay buffer.
        learned: number of experiences and amendments that the trainer reports; more than there are records
            mean that one was counted twice.
    """
    records: dict[tuple[str, int], set[str]] = {}
    newest: dict[str, ExperienceSeen] = {}
    for seen in experiences:
        records.setdefault((seen.interaction_id, seen.version), set()).add(seen.digest)
        if seen.interaction_id not in newest or seen.version > newest[seen.interaction_id].version:
            newest[seen.interaction_id] = seen
    replied = set(tally.replies.values())
    lost = {i for i in replied if i not in newest}
    lost |= {r for r, i in tally.replies.items() if i in newest and r not in newest[i].reply_ids}
    if len(newest) <= replay_capacity:  # above it the oldest entries are evicted
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


def round_floats(value: Any, digits: int = 4) -> Any:
    """A JSON value with floats rounded to `digits` decimals, and None instead of non-finite floats."""
    if isinstance(value, float):
        return round(value, digits) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: round_floats(v, digits) for k, v in value.items()}
    return value
