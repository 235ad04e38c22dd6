"""Arrays as they come in: what every component accepts, and what it makes of it. No torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cortex_core.errors import DimensionError, NonFiniteError

FloatArray = npt.NDArray[np.float32]


def as_float32(value: Any, what: str, ndim: int) -> FloatArray:
    """A list, numpy array or tensor as a finite C-ordered float32 array with `ndim` axes.

    Raises:
        DimensionError: another number of axes.
        NonFiniteError: NaN or infinity inside.
    """
    if hasattr(value, "detach"):  # a tensor, named without importing torch
        value = value.detach().cpu().numpy()
    array = np.ascontiguousarray(value, dtype=np.float32)
    if array.ndim != ndim:
        raise DimensionError(what, array.shape, f"{ndim} axes")
    if not np.isfinite(array).all():
        raise NonFiniteError(what)
    return array
