"""Channel-aware SAE of h-space (Ijishakin et al., 2024, "H-Space Sparse Autoencoders", equations 6 to 9)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..errors import InputError
from .base import ALL, SparseAutoencoder, SparseCode, register_architecture
from .precision import at_least_fp32


@register_architecture
class ChannelAwareSAE(SparseAutoencoder):
    """`z = ReLU(W_enc (x - b_dec) + W_index ζ(c, i) + b_enc)`, `x̂ = W_decᵀ z + b_dec`, for the map x of channel c.

    Made for rows of layout `channels`: each channel's K x K map is a row of `d_in = K²` numbers, and `channels` rows
    after one another are those of one image. ζ, a network of two layers, turns the numbers of the channel and of the
    image into (ρ, μ), which the paper appends to the row (equation 6): `W_index (n, 2)` are the columns of its encoder
    that read them. The two outputs of its decoder that it drops (equation 7) are left out here.

    **Threshold** (equation 9): with k, latents below τ are 0, where τ is the least, over the channels of an image, of
    a channel's k-th largest latent. The paper sets it after training; so does `thresholded_`.

    The number of an image in the training data is known while one trains (`of_images`). Other images have none, and
    get the middle of the range.

    Args:
        d_in: numbers of a channel's map.
        n_latents: number of latents.
        channels: channels of an image.
        images: images of the training data, or 1 if their numbers are not told.
        width: hidden units of ζ.
        k: latents that each channel keeps at least; without it, no threshold.
        provenance: where the activations came from; see `SparseAutoencoder`.
    """

    code_settings = ("channels", "k")
    rows_apart = False

    @register_to_config
    def __init__(
        self,
        d_in: int,
        n_latents: int,
        channels: int,
        images: int = 1,
        width: int = 32,
        k: int | None = None,
        provenance: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.images, self.k = channels, images, self._checked_k(k, n_latents)
        self._make_parameters(d_in, n_latents, None)
        self.W_index = nn.Parameter(torch.zeros(n_latents, 2))
        self.zeta = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))
        self._numbers: torch.Tensor | None = None

    @staticmethod
    def _checked_k(k: int | None, n_latents: int) -> int | None:
        if k is not None and not 0 < k <= n_latents:
            raise InputError(f"k is {k}, which must lie between 1 and n_latents ({n_latents}).")
        return k

    def thresholded_(self, k: int | None) -> ChannelAwareSAE:
        """Set how many latents each channel keeps at least, in place; `None` takes the threshold away."""
        self.k = self._checked_k(k, self.n_latents)
        self.register_to_config(k=k)
        return self

    @contextmanager
    def of_images(self, numbers: torch.Tensor) -> Iterator[None]:
        """Within it, the rows are of the training images with these numbers `(images,)`, in that order."""
        self._numbers = numbers
        try:
            yield
        finally:
            self._numbers = None

    def index(self, x: torch.Tensor) -> torch.Tensor:
        """`(ρ, μ) = ζ(c, i)` of every row of `x (..., d)`, `(..., 2)`; c and i are scaled to lie between -1 and 1.

        Raises:
            InputError: if the rows are not those of whole images, or of other images than `of_images` said.
        """
        rows = x.shape[:-1].numel()
        count, left = divmod(rows, self.channels)
        if left or not count:
            raise InputError(
                f"This SAE takes all {self.channels} channels of each image and got {rows} rows; "
                "pass (images, channels, width), as the layout 'channels' gives them."
            )
        c = (2 * torch.arange(self.channels, device=x.device) + 1) / self.channels - 1
        if self._numbers is None:
            i = c.new_zeros(count)
        elif len(self._numbers) == count:
            i = (2 * self._numbers.to(c) + 1) / self.images - 1
        else:
            raise InputError(f"of_images was told {len(self._numbers)} images and there are {count}; tell all of them.")
        both = torch.stack(torch.broadcast_tensors(c, i[:, None]), -1)  # (images, channels, 2)
        weights = {name: at_least_fp32(parameter) for name, parameter in self.zeta.named_parameters()}
        return torch.func.functional_call(self.zeta, weights, both).view(*x.shape[:-1], 2)

    def pre_activations(self, x: torch.Tensor, latents: torch.Tensor | slice = ALL) -> torch.Tensor:
        """`W_enc (x - b_dec) + W_index ζ(c, i) + b_enc`: `(..., d)` -> `(..., m)`, in fp32."""
        return super().pre_activations(x, latents) + self.index(x) @ at_least_fp32(self.W_index[latents]).T

    def pre_activations_at(self, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        by_index = self.index(x)[:, None, :] * self.W_index[indices]  # (N, m, 2)
        return super().pre_activations_at(x, indices) + by_index.sum(-1)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        z = self.pre_activations(x).relu()
        if self.k is None:
            return z
        by_image = z.reshape(-1, self.channels, self.n_latents)
        threshold = by_image.topk(self.k, dim=-1).values[..., -1].amin(-1)  # (images,)
        return (by_image * (by_image >= threshold[:, None, None])).view_as(z)

    def encode_only(self, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """With a threshold, all latents have to be looked at, since it depends on them."""
        return self.pre_activations(x, features).relu() if self.k is None else self.encode(x)[..., features]

    def encode_sparse(self, x: torch.Tensor) -> SparseCode:
        return SparseCode.of(self.encode(x))

    @torch.no_grad()
    def scale_input_(self, factor: float) -> None:
        super().scale_input_(factor)
        self.W_index.mul_(factor)
