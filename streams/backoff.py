"""Exponential backoff with full jitter, for everything that repeats a failed attempt."""

from __future__ import annotations

import random
from collections.abc import Iterator

FIRST_S = 0.2
MOST_S = 2.0
"""The longest pause by default: a worker notices so much later, at most, that a server answers again."""


def delays(most_s: float = MOST_S) -> Iterator[float]:
    """Seconds to sleep before the second attempt, the third, and so on, without end.

    Each is uniform between 0 and a bound that doubles from 0.2 s up to `most_s`: "full jitter" (Brooker 2015,
    Exponential Backoff And Jitter), so that clients that failed together do not come back together.
    """
    bound = FIRST_S
    while True:
        yield random.uniform(0.0, bound)
        bound = min(most_s, 2 * bound)
