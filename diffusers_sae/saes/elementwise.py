"""SAEs whose latents act each on its own: a latent's code depends on its own pre-activation and on no other's."""

from __future__ import annotations

import torch

from .base import ALL, SparseAutoencoder, SparseCode


class ElementwiseSAE(SparseAutoencoder):
    """A subclass defines `activate`; what an edit of a few features costs is then a few encoder rows."""

    def activate(self, pre: torch.Tensor, latents: torch.Tensor | slice = ALL) -> torch.Tensor:
        """Codes from the pre-activations `(..., m)` of some latents, or of all."""
        raise NotImplementedError

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.activate(self.pre_activations(x))

    def encode_only(self, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return self.activate(self.pre_activations(x, features), features)

    def encode_sparse(self, x: torch.Tensor) -> SparseCode:
        """As many values as the fullest row has active latents; rows with fewer end in zeros."""
        return SparseCode.of(self.encode(x))
