"""Reconstruction of h on images held out: SAEs, PCA at equal sizes of the code, β-VAEs and random weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from kinds import KINDS

from diffusers_sae.evaluation.beta_vae import train_beta_vae
from diffusers_sae.layouts import LAYOUTS
from diffusers_sae.saes import SparseAutoencoder

RANKS = (16, 48, 128, 512, 768, 1024, 1536)
BETA, VAE_LATENTS, VAE_STEPS = 4.0, (16, 512), 150


def figures_of(h: torch.Tensor, h_hat: torch.Tensor, mean: torch.Tensor) -> dict[str, float]:
    """EV around the mean map `(C, H, W)` of the training data, and mean cosine of whole maps `(N, C, H, W)`."""
    return {
        "ev": 1 - float((h - h_hat).square().sum() / (h - mean).square().sum()),
        "cosine": float(torch.cosine_similarity(h.flatten(1), h_hat.flatten(1)).mean()),
        "mse": float((h - h_hat).square().mean()),
        "mae": float((h - h_hat).abs().mean()),
    }


class PCA:
    """Principal components of rows `(N, d)`."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.mean = rows.mean(0)
        centred = rows - self.mean
        if len(rows) < rows.shape[1]:
            self.components = torch.linalg.svd(centred, full_matrices=False).Vh[
                : len(rows) - 1
            ]  # the last one is noise
        else:
            self.components = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1).T  # (d, d)

    def code(self, rows: torch.Tensor, rank: int) -> torch.Tensor:
        return (rows - self.mean) @ self.components[:rank].T

    def __call__(self, rows: torch.Tensor, rank: int) -> torch.Tensor:
        """Rows `(..., d)` as the first components have them."""
        return self.mean + self.code(rows, rank) @ self.components[:rank]


@torch.no_grad()
def reconstruction(
    sae: SparseAutoencoder, name: str, seen: torch.Tensor, held: torch.Tensor, of_maps: PCA
) -> dict[str, Any]:
    """Figures on h held out, with those of PCA beside them at two sizes of the code.

    `equal_nonzeros`: PCA has as many numbers as the SAE has active latents. `equal_numbers`: twice as many, since of an
    active latent its number has to be told too. Each is done for rows (as many a row, rounded up) and for whole maps
    (as many an image, at most as many as there are components).
    """
    to_rows, from_rows = LAYOUTS[KINDS[name].layout]
    rows, mean = to_rows(held), seen.mean(0)
    z = sae.encode(rows)
    active = float((z != 0).sum()) / z[..., 0].numel()
    of_rows = PCA(to_rows(seen).flatten(0, 1)[: 2**17])
    torch.manual_seed(1)
    drawn = KINDS[name].make(seen.shape[1:], len(seen))  # random weights, unit directions

    def pca(numbers: float) -> dict[str, Any]:
        a_row = min(math.ceil(numbers), len(of_rows.components))
        an_image = min(math.ceil(numbers * rows.shape[1]), len(of_maps.components))
        return {
            "same_rows": {"rank": a_row, **figures_of(held, from_rows(of_rows(rows, a_row), held), mean)},
            "whole_map": {
                "rank": an_image, **figures_of(held, of_maps(held.flatten(1), an_image).view_as(held), mean),
            },
        }  # fmt: skip

    return {
        **figures_of(held, from_rows(sae.decode(z), held), mean),
        "zeros": float((z == 0).double().mean()),
        "active_a_row": active,
        "active_an_image": active * rows.shape[1],
        "parameters": sum(p.numel() for p in sae.parameters()),
        "pca": {"equal_nonzeros": pca(active), "equal_numbers": pca(2 * active)},
        "random": figures_of(held, from_rows(drawn(rows), held), mean),
    }


def pca_by_rank(seen: torch.Tensor, held: torch.Tensor, of_maps: PCA) -> dict[str, dict[str, float]]:
    """Of the flattened map, by numbers an image."""
    return {
        str(rank): figures_of(held, of_maps(held.flatten(1), rank).view_as(held), seen.mean(0))
        for rank in RANKS
        if rank <= len(of_maps.components)
    }


def beta_vaes(seen: torch.Tensor, held: torch.Tensor, few: bool = False) -> dict[str, dict[str, Any]]:
    """Figures of β-VAEs of the flattened map; with `few`, trained for four steps only."""
    figures = {}
    for latents in VAE_LATENTS:
        vae = train_beta_vae(seen.flatten(1), latents, beta=BETA, steps=4 if few else VAE_STEPS)
        figures[f"β-VAE, {latents}"] = {
            "beta": BETA,
            **figures_of(held, vae(held.flatten(1)).view_as(held), seen.mean(0)),
            "ev_seen": figures_of(seen, vae(seen.flatten(1)).view_as(seen), seen.mean(0))["ev"],
            "latents_in_use": int((vae.encode(seen.flatten(1)).var(0) > 0.01).sum()),
            "parameters": sum(p.numel() for p in vae.parameters()),
        }
    return figures
