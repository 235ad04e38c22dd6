"""Landmarks: the inducing points of the kernel posteriors, stored as buffers of the weights.

The kernel on unit vectors is k(x, z) = (exp(2γ xᵀz) − 1) / (exp(2γ) − 1): an RBF kernel without its constant
part, so that orthogonal embeddings have kernel value 0. Landmarks are messages (or memories) that earlier
landmarks did not explain: approximate linear dependence, Engel, Mannor & Meir 2004, "The Kernel Recursive
Least-Squares Algorithm", eq. 2.8. The Cholesky basis is nested: a new landmark appends one feature and
changes none of the others, so that posteriors over the features stay valid.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from cortex_core.arrays import DoubleArray, FloatArray
from cortex_core.errors import ConfigError


class Landmarks(nn.Module):
    """Up to `size` embeddings of dimension `dim`, and the kernel features they span.

    All methods take rows of L2 norm 1 (or zero rows, which have no features): see `arrays.unit`.

    Args:
        gamma: kernel parameter γ; at 1.5 a cosine of 0.5, typical of two requests of one kind, gives 0.18.
        novelty: in (0, 1); a point is added when more than this share of its squared norm is unexplained.
    """

    points: Tensor
    """(M, D) float16, the precision of logged embeddings"""
    count: Tensor
    """() number of landmarks in use, at most M"""

    def __init__(self, dim: int, size: int = 384, gamma: float = 1.5, novelty: float = 0.1) -> None:
        super().__init__()
        if dim < 1 or size < 1 or gamma <= 0 or not 0.0 < novelty < 1.0:
            raise ConfigError(
                "Landmarks expects positive dim, size and gamma, and novelty in (0, 1); "
                f"got {dim=}, {size=}, {gamma=}, {novelty=}"
            )
        self.size = size
        self.gamma = gamma
        self.novelty = novelty
        self.register_buffer("points", torch.zeros(size, dim, dtype=torch.float16))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self._seen: tuple[int, int, int] | None = None
        self._used = 0
        self._rows: FloatArray = np.zeros((size, dim), np.float32)
        self._inverse: FloatArray = np.zeros((size, size), np.float32)
        self._frozen = False

    def freeze(self) -> None:
        """Computes the derived arrays and makes them read-only, so that threads may share them."""
        self._sync()
        self._rows.flags.writeable = self._inverse.flags.writeable = False
        self._frozen = True

    def _sync(self) -> int:
        """Recomputes the derived arrays if the buffers have changed; returns the number in use."""
        if self._frozen:
            return self._used
        version = (id(self.points), self.points._version, self.count._version)
        if version != self._seen:
            used = int(self.count)
            self._rows = self.points.float().numpy()
            kernel = self._kernel(self._rows[:used], self._rows[:used]).astype(np.float64)
            self._inverse = np.zeros((self.size, self.size), np.float32)
            if used:
                # The novelty test keeps the matrix well conditioned; the jitter covers rounding.
                factor = np.linalg.cholesky(kernel + 1e-6 * np.eye(used))
                self._inverse[:used, :used] = np.linalg.inv(factor)
            self._used, self._seen = used, version
        return self._used

    def _kernel(self, a: FloatArray, b: FloatArray) -> FloatArray:
        """(exp(2γ xᵀz) − 1) / (exp(2γ) − 1): 1 for equal rows, 0 for orthogonal rows."""
        out: FloatArray = a @ b.T
        out *= np.float32(2.0 * self.gamma)
        np.expm1(out, out=out)
        out /= np.float32(np.expm1(2.0 * self.gamma))
        return out

    def kernel(self, rows: FloatArray) -> FloatArray:
        """(B, M) kernel values of (B, D) rows with each landmark; 0 for unused landmarks."""
        used = self._sync()
        out = np.zeros((len(rows), self.size), np.float32)
        out[:, :used] = self._kernel(rows, self._rows[:used])
        return out

    def features(self, rows: FloatArray) -> FloatArray:
        """(B, M) features φ with φ(x)ᵀφ(z) ≈ k(x, z); ‖φ(x)‖² is the explained share of x."""
        return self.project(self.kernel(rows))

    def project(self, kernel: FloatArray) -> FloatArray:
        """(B, M) features from (B, M) kernel values. Linear: sums of kernel values give sums of features."""
        used = self._sync()
        out = np.zeros((len(kernel), self.size), np.float32)
        out[:, :used] = kernel[:, :used] @ self._inverse[:used, :used].T
        return out

    def evaluate(self, rows: FloatArray, weights: FloatArray) -> DoubleArray:
        """(B,) φ(row)ᵀ`weights` for (B, D) rows and (M,) weights, without computing the features."""
        used = self._sync()
        dual = weights[:used] @ self._inverse[:used, :used]
        out: DoubleArray = (self._kernel(rows, self._rows[:used]) @ dual).astype(np.float64)
        return out

    def admit_new(self, rows: FloatArray) -> None:
        """Calls `admit` for the (B, D) rows that no single landmark explains sufficiently."""
        used = self._sync()
        if used >= self.size or not len(rows):
            return
        best = self._kernel(rows, self._rows[:used]).max(1, initial=0.0)
        for row in rows[best**2 < 1.0 - self.novelty]:
            self.admit(row)

    def admit(self, row: FloatArray) -> bool:
        """Adds (D,) `row` if there is room and the landmarks do not explain it; returns whether it did."""
        used = self._sync()
        if used >= self.size or not row.any():
            return False
        point = row.astype(np.float16).astype(np.float32)
        kernel = self._kernel(point[None], self._rows[:used])[0]
        if used and float(kernel.max()) ** 2 >= 1.0 - self.novelty:
            return False  # one landmark explains it: the common case, at less cost than the projection
        lower = self._inverse[:used, :used] @ kernel
        rest = 1.0 - float(lower @ lower)
        if rest <= self.novelty:
            return False
        root = np.float32(np.sqrt(rest))
        self._inverse[used, :used] = -(lower @ self._inverse[:used, :used]) / root
        self._inverse[used, used] = 1.0 / root
        self._rows[used] = point
        with torch.no_grad():
            self.points[used] = torch.from_numpy(point).half()
            self.count += 1
        self._used = used + 1
        self._seen = (id(self.points), self.points._version, self.count._version)
        return True
