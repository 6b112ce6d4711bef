"""Dead latents begun anew where the SAE reconstructs worst (Bricken et al., 2023, "Neuron resampling")."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..saes import SparseAutoencoder

ENCODER_SHARE = 0.2
"""Norm of a new encoder row, in mean norms of those of live latents."""


@torch.no_grad()
def resample(
    sae: SparseAutoencoder,
    optimizer: torch.optim.Optimizer,
    dead: torch.Tensor,
    x: torch.Tensor,
    x_hat: torch.Tensor,
    generator: torch.Generator,
) -> None:
    """Point each latent of `dead (n,)` at a row of `x (N, d)`, drawn by the square of its loss; forget its moments.

    Rows are drawn without repetition while there are enough, since latents that begin alike stay alike.
    """
    latents = dead.nonzero().flatten()
    if len(latents) == 0:
        return
    chances = (x - x_hat).square().sum(-1).square().cpu()
    chosen = torch.multinomial(chances, len(latents), len(latents) > len(chances), generator=generator).to(x.device)
    directions = F.normalize(x[chosen] - sae.b_dec, dim=-1)
    live = sae.W_enc[~dead] if not dead.all() else sae.W_enc
    sae.W_dec[latents] = directions
    if sae.W_enc is not sae.W_dec:
        sae.W_enc[latents] = directions * ENCODER_SHARE * live.norm(dim=-1).mean()
    for name, parameter in sae.named_parameters():
        if name in ("b_enc", "b_mag", "r_mag"):
            parameter[latents] = 0.0
        if len(parameter) == len(dead):  # all but the decoder's bias
            _forget(optimizer.state[parameter], dead)


def _forget(state: dict[str, torch.Tensor], dead: torch.Tensor) -> None:
    """Let the moments of `dead (n,)` begin anew: Adam's at 0, and Adafactor's at the mean of the others, since a latent
    without any would make a far longer step than these."""
    for name, moment in state.items():
        if moment.ndim and len(moment) == len(dead):
            moment[dead] = 0.0 if name.startswith("exp_avg") or dead.all() else moment[~dead].mean(0)
