"""Checkpoints of a trainer: weights, optimizer and counters in one safetensors file, written atomically.

Never pickle: a checkpoint from elsewhere can hold wrong numbers, but no code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cortex_core.errors import WeightsError

FORMAT = 1


def pack(
    weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, meta: Mapping[str, Any]
) -> dict[str, Any]:
    """{"tensors": name → tensor, "meta": plain JSON values}."""
    tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value).detach().clone()
    return {"tensors": tensors, "meta": {"format": FORMAT, **meta}}


def unpack(
    state: Mapping[str, Any], modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Puts a packed state into modules and optimizer, and returns its `meta`.

    Raises:
        WeightsError: it does not fit; nothing has changed then.
    """
    tensors: Mapping[str, Tensor] = state["tensors"]
    meta: dict[str, Any] = dict(state["meta"])
    if meta.get("format") != FORMAT:
        raise WeightsError(f"checkpoint format {meta.get('format')!r}, this version reads {FORMAT}")
    wanted = {f"model.{m}.{k}": v for m, module in modules.items() for k, v in module.state_dict().items()}
    have = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    for name in sorted(wanted.keys() ^ have.keys()):
        raise WeightsError(f"the checkpoint {'lacks' if name in wanted else 'has an unknown'} {name}")
    for name, tensor in tensors.items():
        if name in wanted and (tensor.shape != wanted[name].shape or tensor.dtype != wanted[name].dtype):
            raise WeightsError(
                f"the checkpoint's {name} is {tensor.dtype} {tuple(tensor.shape)}, wanted "
                f"{wanted[name].dtype} {tuple(wanted[name].shape)}"
            )
        if not bool(tensor.isfinite().all()):
            raise WeightsError(f"the checkpoint's {name} holds NaN or infinity")
    slots: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            if not int(index) < len(parameters) or (
                tensor.ndim and tensor.shape != parameters[int(index)].shape
            ):
                raise WeightsError(f"the checkpoint's {name} does not fit this optimizer")
            slots.setdefault(int(index), {})[key] = tensor.clone()
    with torch.no_grad():
        for name, target in wanted.items():
            target.copy_(have[name])
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    return meta


def save(path: Path | str, state: Mapping[str, Any]) -> None:
    """Writes beside the target, syncs, then renames over it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(dict(state["tensors"]), temporary, metadata={"meta": json.dumps(state["meta"])})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself must survive a power cut
    finally:
        os.close(directory)


def load(path: Path | str) -> dict[str, Any]:
    """What `save` wrote.

    Raises:
        WeightsError: no such file, damaged, or no checkpoint.
    """
    try:
        with safe_open(Path(path), framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("meta", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, ValueError) as error:
        raise WeightsError(f"the checkpoint {path} cannot be read: {error}") from error
    if not isinstance(meta, dict):
        raise WeightsError(f"{path} is safetensors, but no checkpoint of a trainer")
    return {"tensors": tensors, "meta": meta}
