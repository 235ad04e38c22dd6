"""SituationEncoder: message, history and metadata become one situation vector.

It does not encode text itself: it owns a frozen `TextEncoder` for callers' convenience (`encode`), and learns
only what to add to the message's embedding.
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

    The MLP's last layer is zero at birth, so that the situation then is exactly the normalised message
    embedding (P is the identity where the dimensions agree, else a fixed orthonormal projection), and the
    Memory Gate is exactly cosine similarity. What training adds is bounded by the gradient steps taken.

    Args:
        text_dim: D of the text encoder.
        output_dim: S of the situation; None takes `text_dim`.
        hidden_dim: width of the MLP.
        dropout: on the MLP's hidden layer while training.
        text_encoder: what `encode` uses; made on first use when not given.
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
                f"SituationEncoder wants positive dimensions and dropout in [0, 1), got text_dim={text_dim}, "
                f"output_dim={output_dim}, hidden_dim={hidden_dim}, dropout={dropout}"
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
        """Back to birth; the same generator state gives the same weights."""
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
        """(S,) for (D,), (D,), (F,); or (B, S) for the same with a batch axis. Rows have L2 norm 1."""
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
        """(…, S) the situation at birth: the message alone, normalised."""
        unit = F.normalize(message_emb, dim=-1)
        return unit if self.projection.numel() == 0 else F.normalize(unit @ self.projection.T, dim=-1)

    def encode(self, text: str) -> Tensor:
        """(D,) of a text, from the frozen text encoder: what `message_emb` and `history_emb` want."""
        if self.text_encoder is None:
            self.text_encoder = load_encoder("minilm")
        if self.text_encoder.dim != self.text_dim:
            raise ConfigError(
                f"the text encoder {self.text_encoder.name} gives {self.text_encoder.dim} dimensions, this "
                f"SituationEncoder wants {self.text_dim}"
            )
        return torch.from_numpy(self.text_encoder.encode(text).copy())
