"""The exception hierarchy: every error that this project raises deliberately.

    CortexError
    ├── ConfigError          a setting or constructor argument is invalid
    ├── InputError           an argument or an event is invalid; the process continues
    │   ├── DimensionError   an array has the wrong shape
    │   └── NonFiniteError   NaN or infinity instead of a finite number
    ├── WeightsError         a snapshot is damaged, forged or of a different architecture
    └── UnavailableError     a broker, a store or a service does not answer

A message gives the value received, the value expected and the remedy. Only the standard library is imported.
"""

from __future__ import annotations

import reprlib
from itertools import islice
from typing import Any


class CortexError(Exception):
    """Base class: `except CortexError` catches every error that this project raises deliberately."""


class ConfigError(CortexError, ValueError):
    """A setting or a constructor argument is invalid; fix the configuration and restart."""


class InputError(CortexError, ValueError):
    """An argument or an event is invalid. Only that input is rejected."""


class DimensionError(InputError):
    """An array has the wrong shape."""

    def __init__(self, what: str, got: object, expected: object, hint: str = "") -> None:
        super().__init__(f"{what} has shape {got}, expected {expected}{'. ' + hint if hint else ''}")


class NonFiniteError(InputError):
    """NaN or infinity instead of a finite number."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} contains NaN or infinity; every number must be finite")


class WeightsError(CortexError):
    """A weights snapshot was rejected; the receiver keeps its current weights."""


class UnavailableError(CortexError, ConnectionError):
    """A broker, a store or a service did not answer in time; retry later."""


class _Shown(reprlib.Repr):
    """Costs the same however large the value is."""

    def repr_dict(self, x: dict[Any, Any], level: int) -> str:
        return super().repr_dict(dict(islice(x.items(), self.maxdict + 1)), level)  # which sorts

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write whole numbers of more than 4,300 digits.
        return super().repr_int(x, level) if x.bit_length() < 256 else f"a number of {x.bit_length()} bits"


def shown(value: object) -> str:
    """A value for a message: its `repr`, cut to some 60 characters; cheap for a value of any size."""
    return _Shown().repr(value)
