"""Landmarks: the inducing points of the kernel posteriors, as buffers that travel with the weights.

The kernel on unit embeddings is k(x, z) = (exp(2γ xᵀz) − 1) / (exp(2γ) − 1): an RBF kernel without its
constant part, so that unrelated texts have nothing in common. Landmarks are messages (or memories) that were
met and that the earlier ones did not explain: approximate linear dependence, Engel, Mannor & Meir 2004,
"The Kernel Recursive Least-Squares Algorithm", eq. 2.8. The Cholesky basis is nested: a new landmark appends
one feature and changes none of those before it, so that posteriors over the features stay valid.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cortex_core.arrays import FloatArray
from cortex_core.errors import ConfigError

Floats = npt.NDArray[np.float32]


class Landmarks(nn.Module):
    """Up to `size` embeddings of dimension `dim`, and the kernel features they span.

    Args:
        gamma: of the kernel; at 1.5 a cosine of 0.5, as of two requests of one kind, is worth 0.18.
        novelty: in (0, 1); a point is admitted when more than this share of it is unexplained.
    """

    points: Tensor
    """(M, D) float16: what events carry, so that nothing is lost"""
    count: Tensor
    """() how many of the M are in use"""

    def __init__(self, dim: int, size: int = 384, gamma: float = 1.5, novelty: float = 0.1) -> None:
        super().__init__()
        if dim < 1 or size < 1 or gamma <= 0 or not 0.0 < novelty < 1.0:
            raise ConfigError(
                f"Landmarks wants positive dim, size and gamma, novelty in (0, 1); got {dim=}, {size=}, "
                f"{gamma=}, {novelty=}"
            )
        self.size = size
        self.gamma = gamma
        self.novelty = novelty
        self.register_buffer("points", torch.zeros(size, dim, dtype=torch.float16))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self._seen: tuple[int, int, int] | None = None
        self._used = 0
        self._rows: Floats = np.zeros((size, dim), np.float32)
        self._inverse: Floats = np.zeros((size, size), np.float32)

    def _sync(self) -> int:
        """Recomputes what is derived from the buffers where they were written to; returns the count."""
        version = (id(self.points), self.points._version, self.count._version)
        if version != self._seen:
            used = int(self.count)
            self._rows = self.points.float().numpy()
            kernel = self._kernel(self._rows[:used], self._rows[:used]).astype(np.float64)
            self._inverse = np.zeros((self.size, self.size), np.float32)
            if used:
                # Admission keeps the matrix well conditioned; the jitter covers rounding.
                factor = np.linalg.cholesky(kernel + 1e-6 * np.eye(used))
                self._inverse[:used, :used] = np.linalg.inv(factor)
            self._used, self._seen = used, version
        return self._used

    def _kernel(self, a: Floats, b: Floats) -> Floats:
        """(exp(2γ xᵀz) − 1) / (exp(2γ) − 1) of rows of norm 1: 1 with itself, 0 where orthogonal."""
        out: Floats = a @ b.T
        out *= np.float32(2.0 * self.gamma)
        np.expm1(out, out=out)
        out /= np.float32(np.expm1(2.0 * self.gamma))
        return out

    def kernel(self, rows: FloatArray) -> Floats:
        """(B, M) kernel values with each landmark, 0 for unused ones, for (B, D) rows."""
        used = self._sync()
        out = np.zeros((len(rows), self.size), np.float32)
        out[:, :used] = self._kernel(_unit(rows), self._rows[:used])
        return out

    def features(self, rows: FloatArray) -> Floats:
        """(B, M) features φ with φ(x)ᵀφ(z) ≈ k(x, z); their squared norm is the explained share of x."""
        return self.project(self.kernel(rows))

    def project(self, kernel: Floats) -> Floats:
        """(B, M) features of (B, M) kernel values, or the sums of features of sums of kernel values."""
        used = self._sync()
        out = np.zeros((len(kernel), self.size), np.float32)
        out[:, :used] = kernel[:, :used] @ self._inverse[:used, :used].T
        return out

    def evaluate(self, rows: FloatArray, weights: Floats) -> npt.NDArray[np.float64]:
        """(B,) the function with `weights` (M,) on the features, at (B, D) rows; no features are computed."""
        used = self._sync()
        dual = weights[:used] @ self._inverse[:used, :used]
        out: npt.NDArray[np.float64] = (self._kernel(_unit(rows), self._rows[:used]) @ dual).astype(
            np.float64
        )
        return out

    def admit_new(self, rows: FloatArray) -> None:
        """`admit` for those of (B, D) rows that no single landmark explains enough already."""
        used = self._sync()
        if used >= self.size or not len(rows):
            return
        best = self._kernel(_unit(rows), self._rows[:used]).max(1, initial=0.0)
        for row in rows[best**2 < 1.0 - self.novelty]:
            self.admit(row)

    def admit(self, row: FloatArray) -> bool:
        """Makes (D,) a landmark where there is room and the others do not explain it; says whether it did."""
        used = self._sync()
        if used >= self.size or not row.any():
            return False
        unit = _unit(row[None])[0].astype(np.float16).astype(np.float32)
        kernel = self._kernel(unit[None], self._rows[:used])[0]
        if used and float(kernel.max()) ** 2 >= 1.0 - self.novelty:
            return False  # one landmark alone explains enough: the common case, without the triangle
        lower = self._inverse[:used, :used] @ kernel
        rest = 1.0 - float(lower @ lower)
        if rest <= self.novelty:
            return False
        root = np.float32(np.sqrt(rest))
        self._inverse[used, :used] = -(lower @ self._inverse[:used, :used]) / root
        self._inverse[used, used] = 1.0 / root
        self._rows[used] = unit
        with torch.no_grad():
            self.points[used] = torch.from_numpy(unit).half()
            self.count += 1
        self._used = used + 1
        self._seen = (id(self.points), self.points._version, self.count._version)
        return True


def _unit(rows: FloatArray) -> Floats:
    norms = np.sqrt((rows * rows).sum(1, keepdims=True))
    out: Floats = (rows / np.maximum(norms, 1e-12)).astype(np.float32, copy=False)
    return out
