"""One model's replay buffer as its learner draws from it: only entries that fit the model.

An entry that does not fit, or that cannot be read, is set aside: it is in no sample, becomes a dead letter,
and is then removed from the buffer. So it is neither drawn again nor lost, whenever the trainer dies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import structlog
from cachetools import LRUCache

from cortex_core.replay_buffer import ReplayEntry
from cortex_core.requirements import Requirements
from streams.replay_store import RedisReplayBuffer, decode, to_entry

log = structlog.get_logger(__name__)

REMEMBERED = 10_000
"""Ids of entries that were set aside, so that the same event does not become two dead letters: one of its
replay entry and one of its experience."""


@dataclass(frozen=True, slots=True)
class Misfit:
    """An entry that was set aside."""

    id: str
    reason: str
    value: bytes
    """As stored (see `streams.replay_store.decode`); empty if its dead letter exists."""


class LearnerReplay:
    """A `ReplayStore` whose samples fit the model."""

    def __init__(self, store: RedisReplayBuffer, requirements: Requirements) -> None:
        self.store = store
        self.capacity = store.capacity
        self.requirements = requirements
        self.set_aside: dict[str, Misfit] = {}
        """Misfits by id, until `remove`."""
        self._known: LRUCache[str, bool] = LRUCache(REMEMBERED)
        """Id → whether its replay entry became the dead letter, and not its experience."""

    def sample(self, n: int, prioritize_recent: bool = True) -> list[ReplayEntry]:
        """Up to `n` distinct entries that fit; fewer if some do not."""
        return list(self._fitting(self.store.draw(n, prioritize_recent)))

    def refuse(self, entry_id: str, reason: str) -> bool:
        """Sets an entry aside whose experience was read from Kafka; returns whether it needs a dead letter.

        The experience becomes the dead letter, unless the entry became one already.
        """
        self.set_aside.setdefault(entry_id, Misfit(entry_id, reason, b""))
        return not self._known.setdefault(entry_id, False)

    def remove(self, misfits: Iterable[Misfit]) -> None:
        """Removes entries that were set aside from the buffer, after their dead letters were published."""
        for misfit in misfits:
            self.store.remove(misfit.id)
            self.set_aside.pop(misfit.id, None)

    def add(self, entry: ReplayEntry) -> bool:
        """As `RedisReplayBuffer.add`."""
        return self.store.add(entry)

    def extend(self, entries: Iterable[ReplayEntry]) -> int:
        """As `RedisReplayBuffer.extend`."""
        return self.store.extend(entries)

    def get(self, entry_id: str) -> ReplayEntry | None:
        """As `RedisReplayBuffer.get`."""
        return self.store.get(entry_id)

    def entries(self) -> Iterator[ReplayEntry]:
        """All entries that fit, earliest first."""
        values = self.store.raw_values(self.store.ids())
        return self._fitting((entry_id, value) for entry_id, value in values if value is not None)

    def get_learned(self, learned: Mapping[str, int]) -> list[ReplayEntry]:
        """Entries that fit, in the given order.

        Args:
            learned: id → version learned. An entry of a higher version is omitted: that one comes yet.
        """
        values = self.store.raw_values([*learned])
        same = ((i, v) for i, v in values if v is not None and decode(v)[0] <= learned[i])
        return list(self._fitting(same))

    def __len__(self) -> int:
        return len(self.store)

    def _fitting(self, stored: Iterable[tuple[str, bytes]]) -> Iterator[ReplayEntry]:
        for entry_id, value in stored:
            if entry_id in self.set_aside:
                continue
            try:
                entry = to_entry(value)
                self.requirements.check_entry(entry)
            except ValueError as error:  # every InputError is one
                has_letter = entry_id in self._known
                self._known.setdefault(entry_id, True)
                self.set_aside[entry_id] = Misfit(entry_id, str(error), b"" if has_letter else value)
                continue
            yield entry
