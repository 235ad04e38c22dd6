"""The exception hierarchy: every error that this project raises deliberately.

    CortexError
    ├── ConfigError          a setting or constructor argument is invalid
    ├── InputError           an argument or an event is invalid; the process continues
    │   ├── DimensionError   an array has the wrong shape
    │   └── NonFiniteError   NaN or infinity instead of a finite number
    ├── WeightsError         a snapshot is damaged, forged or of a different architecture
    └── UnavailableError     a broker, a store or a service does not answer

A message gives the value received, the value expected and the remedy. This module has no imports.
"""

from __future__ import annotations


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
