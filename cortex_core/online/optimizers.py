"""torch's optimizers, without its compiler.

The methods of torch's optimizers import torch's compiler when they are first called: seconds of CPU and
150 MB in a process that compiles nothing. What each of them wraps is the same without that.
"""

from __future__ import annotations

from typing import Any

import torch

WRAPPED = ("add_param_group", "state_dict", "load_state_dict", "zero_grad")


class Adam(torch.optim.Adam):
    """`torch.optim.Adam`."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are not used
        """One step down the gradients."""
        torch.optim.Adam.step.__wrapped__(self)  # type: ignore[attr-defined]  # the decorator's


class SGD(torch.optim.SGD):
    """`torch.optim.SGD`."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are not used
        """One step down the gradients."""
        torch.optim.SGD.step.__wrapped__(self)  # type: ignore[attr-defined]  # the decorator's


for _optimizer in (Adam, SGD):
    for _name in WRAPPED:
        _method: Any = getattr(torch.optim.Optimizer, _name)
        setattr(_optimizer, _name, _method.__wrapped__)
