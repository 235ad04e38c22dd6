"""Trainer checkpoints: weights, optimizer state and counters in one safetensors file, written atomically.

Nothing is pickled: a forged checkpoint can contain wrong numbers, but no code.
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
    """{"tensors": name → tensor, "meta": JSON values}."""
    tensors = {f"model.{name}": tensor for name, tensor in weights.items()}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value).detach().clone()
    return {"tensors": tensors, "meta": {"format": FORMAT, **meta}}


def unpack(
    state: Mapping[str, Any], modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Loads a packed state into modules and optimizer; returns its `meta`.

    Raises:
        WeightsError: the state does not fit; nothing is changed.
    """
    tensors: Mapping[str, Tensor] = state["tensors"]
    meta: dict[str, Any] = dict(state["meta"])
    if meta.get("format") != FORMAT:
        raise WeightsError(f"the checkpoint has format {meta.get('format')!r}, expected {FORMAT}")
    wanted = {f"model.{m}.{k}": v for m, module in modules.items() for k, v in module.state_dict().items()}
    have = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    for name in sorted(wanted.keys() ^ have.keys()):
        raise WeightsError(f"the checkpoint {'lacks' if name in wanted else 'has an unknown'} {name}")
    for name, tensor in tensors.items():
        if name in wanted and (tensor.shape != wanted[name].shape or tensor.dtype != wanted[name].dtype):
            raise WeightsError(
                f"the checkpoint's {name} is {tensor.dtype} {tuple(tensor.shape)}, expected "
                f"{wanted[name].dtype} {tuple(wanted[name].shape)}"
            )
        if not bool(tensor.isfinite().all()):
            raise WeightsError(f"the checkpoint's {name} contains NaN or infinity")
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
    """Writes a temporary file and renames it to `path`: a crash leaves the old file or the new one."""
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
        os.fsync(directory)  # makes the rename durable
    finally:
        os.close(directory)


def load(path: Path | str) -> dict[str, Any]:
    """The inverse of `save`.

    Raises:
        WeightsError: the file is missing, damaged or not a trainer checkpoint.
    """
    try:
        with safe_open(Path(path), framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("meta", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, ValueError) as error:
        raise WeightsError(f"the checkpoint {path} cannot be read: {error}") from error
    if not isinstance(meta, dict):
        raise WeightsError(f"{path} is a safetensors file, but not a trainer checkpoint")
    return {"tensors": tensors, "meta": meta}
