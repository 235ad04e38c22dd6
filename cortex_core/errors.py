"""Every error this project raises on purpose, in one tree.

    CortexError
    ├── ConfigError          a setting or constructor argument is unusable
    ├── InputError           a caller or an event handed in something unusable; the process goes on
    │   ├── DimensionError   an embedding of the wrong size
    │   └── NonFiniteError   NaN or infinity where a number was wanted
    ├── WeightsError         a snapshot that is damaged, forged or of another architecture
    └── UnavailableError     a broker, a store or a service that does not answer

A message says what came, what was wanted and what to do. Nothing here imports anything.
"""

from __future__ import annotations


class CortexError(Exception):
    """Root of the tree: `except CortexError` catches all that this project raises on purpose."""


class ConfigError(CortexError, ValueError):
    """A setting or a constructor argument is unusable; fix the configuration and start again."""


class InputError(CortexError, ValueError):
    """Something handed in from outside is unusable. It costs that input alone."""


class DimensionError(InputError):
    """An embedding has the wrong shape."""

    def __init__(self, what: str, got: object, wanted: object, hint: str = "") -> None:
        super().__init__(f"{what} has shape {got}, wanted {wanted}{'. ' + hint if hint else ''}")


class NonFiniteError(InputError):
    """NaN or infinity where a finite number was wanted."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} holds NaN or infinity; every number must be finite")


class WeightsError(CortexError):
    """A weights snapshot was refused; whoever refused it goes on with what it has."""


class UnavailableError(CortexError, ConnectionError):
    """A broker, a store or a service did not answer in time; trying again later is right."""
