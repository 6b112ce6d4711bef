"""SAEs whose latents act each on its own: a latent's code depends on its own pre-activation and on no other's."""

from __future__ import annotations

import torch
from torch import nn

from .base import SparseAutoencoder, SparseCode

ALL = slice(None)


class ElementwiseSAE(SparseAutoencoder):
    """A subclass defines `activate`; what an edit of a few features costs is then a few encoder rows."""

    def activate(self, pre: torch.Tensor, latents: torch.Tensor | slice = ALL) -> torch.Tensor:
        """Codes from the pre-activations `(..., m)` of some latents, or of all."""
        raise NotImplementedError

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.activate(self.pre_activations(x))

    def encode_only(self, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        pre = nn.functional.linear(self.normalized(x) - self.b_dec, self.W_enc[features], self.b_enc[features])
        return self.activate(pre, features)

    def encode_sparse(self, x: torch.Tensor) -> SparseCode:
        """As many values as the fullest row has active latents; rows with fewer end in zeros."""
        z = self.encode(x)
        width = max(1, int((z > 0).sum(-1).max()))
        return SparseCode(*z.topk(width, dim=-1))
