"""Recency-weighted sampling of positions: recent entries are drawn more often, old ones never vanish."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cortex_core.arrays import DoubleArray
from cortex_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RecencySampler:
    """Draws positions from `size` ordered entries, late positions more often.

    An entry with rank r (0 = newest) among N has the weight

        w(r) = floor + (1 - floor) * 2 ** (-r / (half_life * N))

    With the defaults the newest entry is drawn about six times as often as the oldest, for every N. No weight
    falls below `floor`.
    """

    half_life: float = 0.25
    """Fraction of the buffer over which the weight above the floor halves; positive."""
    floor: float = 0.1
    """[0, 1] weight of an infinitely old entry; 1 gives uniform sampling."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.half_life) and self.half_life > 0):
            raise ConfigError(
                f"half_life is {self.half_life}, expected a positive fraction of the buffer, e.g. 0.25"
            )
        if not 0.0 <= self.floor <= 1.0:
            raise ConfigError(f"floor is {self.floor}, expected a number in [0, 1]")

    def weights(self, size: int) -> DoubleArray:
        """(size,) weights, oldest entry first."""
        ranks = np.arange(size - 1, -1, -1, dtype=np.float64)
        tail: DoubleArray = np.exp2(-ranks / (self.half_life * max(size, 1)))
        return self.floor + (1.0 - self.floor) * tail

    def draw(self, size: int, n: int, rng: np.random.Generator) -> npt.NDArray[np.intp]:
        """Up to `n` distinct positions in [0, size), 0 = oldest, in the order of drawing.

        Costs O(n) if n is much smaller than `size`, else O(size log size).
        """
        n = min(n, size)
        if n <= 0:
            return np.empty(0, dtype=np.intp)
        if 4 * n > size:
            # Efraimidis & Spirakis (2006), algorithm A-ES with exponential keys: the n smallest of E_i / w_i.
            keys = rng.exponential(size=size) / self.weights(size)
            return np.argsort(keys)[:n]
        # w is a mixture of a uniform and a truncated geometric distribution; both have closed-form inverses.
        # Drawing with replacement and skipping repeats equals drawing without replacement.
        q = 2.0 ** (-1.0 / (self.half_life * size))
        uniform_mass = self.floor * size
        geometric_mass = (1.0 - self.floor) * (1.0 - q**size) / (1.0 - q)
        drawn: dict[int, None] = {}
        while len(drawn) < n:
            draws = 2 * (n - len(drawn))
            is_uniform = rng.random(draws) * (uniform_mass + geometric_mass) < uniform_mass
            u = rng.random(draws)
            ranks = np.where(is_uniform, u * size, np.log1p(-u * (1.0 - q**size)) / math.log(q))
            for rank in np.minimum(ranks.astype(np.intp), size - 1).tolist():
                drawn.setdefault(size - 1 - rank)
                if len(drawn) == n:
                    break
        return np.fromiter(drawn, dtype=np.intp, count=n)
