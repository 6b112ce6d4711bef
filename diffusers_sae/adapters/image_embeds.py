"""SAEs of image embeddings, such as Kandinsky 2.2's: what the site `image_embeds` does, to rows in hand.

What the SAE does not reconstruct is kept, as at every site: `x' = x + dec(z') - dec(z)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..delta import moved
from ..edits import OPERATIONS
from ..errors import InputError
from ..saes import SparseAutoencoder


@torch.no_grad()
def turned(
    sae: SparseAutoencoder, embeds: torch.Tensor, features: Mapping[int, float], mode: str = "add"
) -> torch.Tensor:
    """Embeddings `(..., d)` with features turned, in their own type.

    Args:
        mode: `add`, `set`, `scale`, `cap` or `ablate`, as in `steer`.

    Raises:
        InputError: no such feature or mode, or another width.
    """
    known = [name for name, operation in OPERATIONS.items() if not operation.overwrites]
    if mode not in known:
        raise InputError(f"{mode!r} is not a mode for embeddings; choose one of {', '.join(known)}.")
    chosen = _checked(sae, embeds, list(features))
    strengths = torch.tensor([float(s) for s in features.values()], device=embeds.device)
    if not OPERATIONS[mode].needs_code:
        return _shifted(sae, embeds, strengths @ _directions(sae, chosen, embeds))
    z = _codes(sae, embeds, chosen)
    return _shifted(sae, embeds, (OPERATIONS[mode].apply(z, strengths) - z) @ _directions(sae, chosen, embeds))


@torch.no_grad()
def transferred(
    sae: SparseAutoencoder,
    embeds: torch.Tensor,
    source: torch.Tensor,
    features: Sequence[int] | None = None,
    *,
    instead_of: torch.Tensor | None = None,
    share: float = 1.0,
) -> torch.Tensor:
    """Embeddings `(..., d)` with features as another image has them.

    Args:
        source: `(..., d)`, the image whose activations of the features are taken.
        features: by default all.
        instead_of: take the difference of `source` to this image, instead of that to `embeds`: what one has more than
            the other is added.
        share: of the way; 0 changes nothing, and what lies between interpolates in the SAE's code.

    Raises:
        InputError: no such feature, or another width.
    """
    chosen = _checked(sae, embeds, features or [])
    origin = embeds if instead_of is None else instead_of
    for other in (source, origin):
        _checked(sae, other, [])
    if features is None:
        sae.fetch()
        change = sae.decode_sparse(sae.encode_sparse(source)) - sae.decode_sparse(sae.encode_sparse(origin))
    else:
        change = (_codes(sae, source, chosen) - _codes(sae, origin, chosen)) @ _directions(sae, chosen, embeds)
    return _shifted(sae, embeds, share * change)


def _checked(sae: SparseAutoencoder, embeds: torch.Tensor, features: Sequence[int]) -> list[int]:
    if embeds.shape[-1:] != (sae.d_in,):
        raise InputError(f"The embeddings have shape {tuple(embeds.shape)}, and the SAE takes width {sae.d_in}.")
    return [sae.checked_feature(feature) for feature in features]


def _codes(sae: SparseAutoencoder, x: torch.Tensor, features: list[int]) -> torch.Tensor:
    sae.fetch()
    return sae.encode_only(x, torch.tensor(features, device=x.device))


def _directions(sae: SparseAutoencoder, features: list[int], x: torch.Tensor) -> torch.Tensor:
    return sae.decoder_rows(features).to(x.device)


def _shifted(sae: SparseAutoencoder, x: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """`x` and a change `(..., d)` of what the SAE decodes."""
    scale = sae.row_scale(x)
    return moved(x, change if scale is None else scale * change)
