"""WeightsSnapshot: an immutable version of a model's weights, as safetensors bytes and a manifest.

Importing this module does not load torch; `of`, `load_into` and `to_model` do. Nothing is pickled: a forged
snapshot can contain wrong numbers of the right shape, but no code.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from cortex_core.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    from torch import Tensor

    from cortex_core.model import CortexModel


class WeightsManifest(BaseModel):
    """Metadata of a snapshot."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model_id: str = Field(min_length=1)
    version: int = Field(ge=1)
    parent: int | None = None
    """the version that this one was trained from; None for the first version"""
    created_at: AwareDatetime
    sha256: str
    """hash of the payload, lower-case hex"""
    bytes: int = Field(ge=0)
    chunks: int = Field(ge=1)
    """number of parts that `split` returns"""
    updates: int = Field(default=0, ge=0)
    """gradient steps since initialisation"""
    interactions: int = Field(default=0, ge=0)
    """experiences learned from since initialisation"""
    ema_loss: float | None = None
    architecture: dict[str, Any]
    """`ModelConfig.to_dict()`"""
    encoder: str = ""
    """name of the text encoder whose embeddings this model learns from; empty if not known"""
    reason: Literal["train", "rollback", "seed"] = "train"
    consumed: dict[str, int] = {}
    """"topic-partition" → next offset: this version has learned from all records below"""
    oldest_reply_at: AwareDatetime | None = None
    """time of the oldest reply that this version, but not its parent, learned from; for latency metrics"""


MAX_CHUNK = 900_000
"""Bytes; Kafka's default limit for a message is 1 MiB."""


@dataclass(frozen=True, slots=True)
class WeightsSnapshot:
    """A manifest and its payload."""

    manifest: WeightsManifest
    payload: bytes

    @classmethod
    def of(
        cls,
        model: CortexModel,
        *,
        model_id: str,
        version: int,
        parent: int | None = None,
        updates: int = 0,
        interactions: int = 0,
        ema_loss: float | None = None,
        consumed: dict[str, int] | None = None,
        oldest_reply_at: datetime | None = None,
        created_at: datetime | None = None,
        reason: Literal["train", "rollback", "seed"] = "train",
        encoder: str = "",
    ) -> WeightsSnapshot:
        """Takes a snapshot of a model.

        Raises:
            WeightsError: a weight is not finite. Such weights must not be published.
        """
        from safetensors.torch import save  # noqa: PLC0415 - loads torch

        state = {name: tensor.detach().contiguous() for name, tensor in sorted(model.state_dict().items())}
        _check_finite(state)
        payload = save(state)
        return cls(
            WeightsManifest(
                model_id=model_id,
                version=version,
                parent=parent,
                created_at=created_at or datetime.now(UTC),
                sha256=hashlib.sha256(payload).hexdigest(),
                bytes=len(payload),
                chunks=max(1, math.ceil(len(payload) / MAX_CHUNK)),
                updates=updates,
                interactions=interactions,
                ema_loss=ema_loss if ema_loss is None or math.isfinite(ema_loss) else None,
                architecture=model.config.to_dict(),
                encoder=encoder,
                reason=reason,
                consumed=consumed or {},
                oldest_reply_at=oldest_reply_at,
            ),
            payload,
        )

    def verify(self) -> None:
        """Raises `WeightsError` if the payload does not match the manifest."""
        if len(self.payload) != self.manifest.bytes:
            raise WeightsError(
                f"weights {self._name} have {len(self.payload)} bytes, their manifest says "
                f"{self.manifest.bytes}"
            )
        digest = hashlib.sha256(self.payload).hexdigest()
        if digest != self.manifest.sha256:
            raise WeightsError(
                f"weights {self._name} have sha256 {digest}, their manifest says {self.manifest.sha256}"
            )

    def load_into(self, model: CortexModel) -> None:
        """Copies the weights into a model of the same architecture: all of them, or none.

        Raises:
            WeightsError: damaged, forged, not finite, or of a different architecture; the model is unchanged.
        """
        import torch  # noqa: PLC0415

        state = self._read()
        if model.frozen:
            raise RuntimeError(f"weights {self._name} cannot be loaded into a frozen model")
        if model.config.to_dict() != self.manifest.architecture:
            raise WeightsError(
                f"weights {self._name} have architecture {self.manifest.architecture}, the model has "
                f"{model.config.to_dict()}: create a model with to_model()"
            )
        own = model.state_dict()
        if set(own) != set(state):
            raise WeightsError(
                f"weights {self._name} lack tensors {sorted(set(own) - set(state))} and have unknown tensors "
                f"{sorted(set(state) - set(own))}"
            )
        for name, tensor in state.items():
            if tensor.shape != own[name].shape or tensor.dtype != own[name].dtype:
                raise WeightsError(
                    f"weights {self._name}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected "
                    f"{own[name].dtype} {tuple(own[name].shape)}"
                )
        _check_finite(state)
        with torch.no_grad():
            for name, tensor in state.items():
                own[name].copy_(tensor)

    def to_model(self) -> CortexModel:
        """A new model in evaluation mode with these weights; raises `WeightsError` like `load_into`."""
        from cortex_core.model import SIZES, CortexModel, ModelConfig  # noqa: PLC0415 - loads torch

        state = self._read()
        try:
            config = ModelConfig.from_dict(self.manifest.architecture)
        except ConfigError as error:
            raise WeightsError(f"weights {self._name}: {error}") from error
        # Before anything is allocated: a manifest may claim any size, the payload is bounded.
        for name, (tensor, axis) in SIZES.items():
            shape = state[tensor].shape if tensor in state else ()
            claimed = getattr(config, name)
            if len(shape) <= axis or shape[axis] != claimed:
                raise WeightsError(
                    f"weights {self._name}: {tensor} is {tuple(shape)}, but their architecture has {name} "
                    f"{claimed!r}"
                )
        model = CortexModel(config)
        self.load_into(model)
        return model.eval()

    def split(self, max_bytes: int = MAX_CHUNK) -> list[bytes]:
        """The payload in `manifest.chunks` parts, for brokers that limit the message size.

        Raises:
            WeightsError: the number of parts differs from the manifest.
        """
        parts = [self.payload[i : i + max_bytes] for i in range(0, len(self.payload), max_bytes)] or [b""]
        if max_bytes == MAX_CHUNK and len(parts) != self.manifest.chunks:
            raise WeightsError(
                f"weights {self._name} have {len(parts)} chunks, their manifest says {self.manifest.chunks}"
            )
        return parts

    @classmethod
    def join(cls, manifest: WeightsManifest, chunks: Sequence[bytes]) -> WeightsSnapshot:
        """The inverse of `split`; verifies the payload.

        Raises:
            WeightsError: a part is missing, damaged or from a different version.
        """
        snapshot = cls(manifest, b"".join(chunks))
        snapshot.verify()
        return snapshot

    @property
    def _name(self) -> str:
        return f"{self.manifest.model_id} v{self.manifest.version}"

    def _read(self) -> dict[str, Tensor]:
        from safetensors import SafetensorError  # noqa: PLC0415
        from safetensors.torch import load  # noqa: PLC0415 - loads torch

        self.verify()
        try:
            return load(self.payload)
        except (SafetensorError, ValueError, KeyError) as error:
            raise WeightsError(f"weights {self._name} are not valid safetensors: {error}") from error


def _check_finite(state: dict[str, Tensor]) -> None:
    bad = [name for name, tensor in state.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise WeightsError(f"weights contain NaN or infinity in {', '.join(bad)}")
