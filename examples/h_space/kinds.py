"""The SAEs of h-space that are tried, and how they are trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from diffusers_sae import ChannelAwareSAE, Site, TopKSAE
from diffusers_sae.layouts import LAYOUTS
from diffusers_sae.saes import SparseAutoencoder
from diffusers_sae.training import SAETrainer, TrainingConfig

PATH, AT, STEPS = "unet.mid_block", 0.7, 10
"""The site, the share of the noise schedule at which h is taken, and the steps of a run."""


@dataclass
class Kind:
    """An SAE that is tried: its layout, how it is made from the shape `(C, H, W)` of h, and how it is trained."""

    layout: str
    make: Callable[[Sequence[int], int], SparseAutoencoder]
    images: int
    steps: int
    sparsity: float = 0.0
    lr: float = 4e-3


def _channel_aware(shape: Sequence[int], images: int) -> SparseAutoencoder:
    return ChannelAwareSAE(shape[1] * shape[2], 512, shape[0], images=images)


KINDS = {
    "channel-aware": Kind("channels", _channel_aware, 16, 320, 0.1),
    "TopK, channels": Kind("channels", lambda s, _: TopKSAE(s[1] * s[2], 256, 10), 8, 1600, lr=1.2e-2),
    "TopK, positions": Kind("positions", lambda s, _: TopKSAE(s[0], 1024, 32), 64, 300),
    "TopK, vector": Kind("vector", lambda s, _: TopKSAE(s[0] * s[1] * s[2], 1024, 50), 512, 160, lr=3e-3),
}


def train(name: str, seen: torch.Tensor, base_model: str, few: bool = False) -> SparseAutoencoder:
    """An SAE of one kind, trained on h `(N, C, H, W)`; with `few`, for four steps only."""
    kind = replace(KINDS[name], steps=4) if few else KINDS[name]
    torch.manual_seed(0)
    sae = kind.make(seen.shape[1:], len(seen))
    site = Site(PATH, layout=kind.layout).as_dict()
    sae.register_to_config(provenance={"site": site, "base_model": base_model, "steps": STEPS, "guidance": 1.0})
    rows = LAYOUTS[kind.layout].to_rows(seen)  # (N, P, d)
    size = kind.images * rows.shape[1]
    config = TrainingConfig(kind.steps, size, lr=kind.lr, sparsity=kind.sparsity, dead_after=60 * size)
    trainer = SAETrainer(sae.train(), config, rows.flatten(0, 1)[: 2**14])
    generator = torch.Generator().manual_seed(0)
    for _ in range(kind.steps):
        chosen = torch.randperm(len(rows), generator=generator)[: kind.images]
        if isinstance(sae, ChannelAwareSAE):
            with sae.of_images(chosen):
                trainer.step(rows[chosen].flatten(0, 1))
        else:
            trainer.step(rows[chosen].flatten(0, 1))
    return trainer.finish()


@torch.no_grad()
def code_of(sae: SparseAutoencoder, name: str, h: torch.Tensor) -> torch.Tensor:
    """The flattened code `(N, rows * n_latents)` of h `(N, C, H, W)`."""
    to_rows = LAYOUTS[KINDS[name].layout].to_rows
    return torch.cat([sae.encode(to_rows(part)).flatten(1) for part in h.split(128)])
