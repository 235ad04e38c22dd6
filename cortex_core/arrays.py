"""Array types, and the checks that every component applies to its inputs. No torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cortex_core.errors import DimensionError, NonFiniteError

FloatArray = npt.NDArray[np.float32]
"""Embeddings, features and what models compute from them."""
DoubleArray = npt.NDArray[np.float64]
"""Rewards and statistics."""


_NARROW = (np.float16, np.float32)
"""Types whose finite numbers are finite as float32."""


def as_float32(value: Any, what: str, ndim: int) -> FloatArray:
    """Converts a list, numpy array or tensor to a finite, C-ordered float32 array with `ndim` axes.

    Raises:
        DimensionError: a different number of axes.
        NonFiniteError: the array contains NaN or infinity.
    """
    if hasattr(value, "detach"):  # a tensor, recognised without importing torch
        value = value.detach().cpu().numpy()
    if getattr(value, "dtype", None) in _NARROW:
        array = np.ascontiguousarray(value, dtype=np.float32)
    else:
        with np.errstate(over="ignore"):  # infinity is an error below, and no warning here
            array = np.ascontiguousarray(value, dtype=np.float32)
    if array.ndim != ndim:
        raise DimensionError(what, array.shape, f"{ndim} axes")
    if not np.isfinite(array).all():
        raise NonFiniteError(what)
    return array


def unit(vectors: FloatArray) -> FloatArray:
    """(…, D) vectors scaled to L2 norm 1; zero vectors stay zero."""
    norms = np.sqrt((vectors * vectors).sum(-1, keepdims=True))
    out: FloatArray = vectors / np.maximum(norms, np.float32(1e-12))
    return out
