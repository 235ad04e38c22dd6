"""SituationEncoder: combines message, history and metadata into one situation vector.

Text is encoded by a frozen `TextEncoder` (see `encode`); the situation encoder learns only a correction of
the message embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cortex_core.errors import ConfigError, DimensionError
from cortex_core.metadata import METADATA_KEYS, metadata_features
from cortex_core.text_encoder import TextEncoder, load_encoder

__all__ = ["METADATA_KEYS", "SituationEncoder", "metadata_features"]


class SituationEncoder(nn.Module):
    """situation = normalise(P message + MLP([message, history, metadata])).

    The last layer of the MLP is initialised to zero, so that the untrained situation is exactly the
    normalised message embedding and the untrained Memory Gate is exactly cosine similarity. P is the identity
    if S = D, else a fixed orthonormal projection.

    Args:
        text_dim: D, dimension of the text embeddings.
        output_dim: S, dimension of the situation; None means `text_dim`.
        hidden_dim: width of the MLP.
        dropout: applied to the hidden layer of the MLP during training.
        text_encoder: used by `encode`; created on first use if None.
    """

    projection: Tensor

    def __init__(
        self,
        text_dim: int = 384,
        output_dim: int | None = None,
        hidden_dim: int = 128,
        dropout: float = 0.1,
        *,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        super().__init__()
        output_dim = text_dim if output_dim is None else output_dim
        if min(text_dim, output_dim, hidden_dim) < 1 or not 0.0 <= dropout < 1.0:
            raise ConfigError(
                "SituationEncoder expects positive dimensions and dropout in [0, 1); "
                f"got {text_dim=}, {output_dim=}, {hidden_dim=}, {dropout=}"
            )
        self.text_dim = text_dim
        self.output_dim = output_dim
        self.text_encoder = text_encoder
        self.hidden = nn.Linear(2 * text_dim + len(METADATA_KEYS), hidden_dim)
        self.out = nn.Linear(hidden_dim, output_dim)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("projection", torch.zeros(0))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Resets to the untrained weights; the same generator state gives the same weights."""
        bound = self.hidden.in_features**-0.5
        nn.init.uniform_(self.hidden.weight, -bound, bound, generator=generator)
        nn.init.zeros_(self.hidden.bias)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        if self.output_dim != self.text_dim:
            tall = torch.randn(
                max(self.text_dim, self.output_dim), min(self.text_dim, self.output_dim), generator=generator
            )
            basis = torch.linalg.qr(tall).Q
            self.projection = basis if self.output_dim > self.text_dim else basis.T.contiguous()

    def forward(self, message_emb: Tensor, history_emb: Tensor, metadata_features: Tensor) -> Tensor:
        """(S,) situation of (D,), (D,) and (F,) inputs, or (B, S) with a batch axis. Rows have L2 norm 1."""
        for name, value, dim in (
            ("message_emb", message_emb, self.text_dim),
            ("history_emb", history_emb, self.text_dim),
            ("metadata_features", metadata_features, len(METADATA_KEYS)),
        ):
            if value.ndim not in (1, 2) or value.shape[-1] != dim:
                raise DimensionError(name, tuple(value.shape), f"({dim},) or (B, {dim})")
        delta = self.out(
            self.dropout(
                F.gelu(self.hidden(torch.cat([message_emb, history_emb, metadata_features], dim=-1)))
            )
        )
        return F.normalize(self.base(message_emb) + delta, dim=-1)

    def base(self, message_emb: Tensor) -> Tensor:
        """(…, S) the untrained situation: the projected message, normalised."""
        message = F.normalize(message_emb, dim=-1)
        return message if self.projection.numel() == 0 else F.normalize(message @ self.projection.T, dim=-1)

    def encode(self, text: str) -> Tensor:
        """(D,) embedding of a text, for `message_emb` and `history_emb`, from the frozen text encoder."""
        if self.text_encoder is None:
            self.text_encoder = load_encoder("minilm")
        if self.text_encoder.dim != self.text_dim:
            raise ConfigError(
                f"the text encoder {self.text_encoder.name} gives {self.text_encoder.dim} dimensions, this "
                f"SituationEncoder expects {self.text_dim}"
            )
        return torch.from_numpy(self.text_encoder.encode(text).copy())
