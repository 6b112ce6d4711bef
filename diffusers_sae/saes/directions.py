"""Features that come without an SAE: directions, from wherever they are known."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..errors import InputError
from .base import SparseAutoencoder, SparseCode, register_architecture
from .precision import at_least_fp32


@register_architecture
class Directions(SparseAutoencoder):
    """`z_j = ⟨x, d_j⟩ / ‖d_j‖²`: how many times x holds direction j, row j of `W_dec`.

    Edits work as on an SAE: `add` moves x along d_j, `set` puts it at a multiple, `ablate` projects d_j out. Each
    direction is read on its own, so that edits of several that are not orthogonal overlap.

    Args:
        d_in: width of the activations.
        n_latents: number of directions.
        provenance: where they came from; see `SparseAutoencoder`.
    """

    code_settings = ()

    @register_to_config
    def __init__(self, d_in: int, n_latents: int = 1, provenance: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.W_dec = nn.Parameter(nn.functional.normalize(torch.randn(n_latents, d_in), dim=-1))

    @classmethod
    def of(cls, directions: torch.Tensor, **provenance: Any) -> Directions:
        """From one direction `(d,)` or several, `(n, d)`; raises `InputError` for one that is zero or not finite."""
        rows = torch.as_tensor(directions).detach().float()
        rows = rows[None] if rows.ndim == 1 else rows
        if rows.ndim != 2 or 0 in rows.shape:
            raise InputError(f"Directions have shape {tuple(rows.shape)}; pass (width,), or (directions, width).")
        if not (torch.isfinite(rows).all() and rows.any(-1).all()):
            raise InputError("A direction is zero or not finite; pass others.")
        found = cls(rows.shape[1], rows.shape[0], provenance=provenance)
        found.W_dec = nn.Parameter(rows.clone())
        return found

    def encode_only(self, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        rows = at_least_fp32(self.W_dec[features])
        return x.float() @ (rows / rows.square().sum(-1, keepdim=True)).T

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.encode_only(x, torch.arange(self.n_latents, device=self.W_dec.device))

    def encode_sparse(self, x: torch.Tensor) -> SparseCode:
        z = self.encode(x)
        return SparseCode(z, torch.arange(self.n_latents, device=z.device).expand_as(z))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return at_least_fp32(z) @ at_least_fp32(self.W_dec)

    def decode_sparse(self, code: SparseCode) -> torch.Tensor:
        values = at_least_fp32(code.values)
        z = values.new_zeros(*values.shape[:-1], self.n_latents)
        return self.decode(z.scatter_add(-1, code.indices, values))

    def scale_input_(self, factor: float) -> None:
        """Nothing changes, since codes are linear."""
