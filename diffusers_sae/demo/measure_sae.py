"""How well the shipped SAEs reconstruct what they were not trained on, and the statistics of their latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tqdm import tqdm

from ..capture import stream_activations
from ..evaluation.reconstruction import ReconstructionMeter
from ..saes import SparseAutoencoder, StatisticsAccumulator
from .shipped import CALL
from .world import sample_captions

SEED = 10_000_000


@torch.no_grad()
def reconstruction(
    pipe: Any, saes: Mapping[str, SparseAutoencoder], images: int = 256, batch_size: int = 32
) -> tuple[dict[str, dict[str, Any]], dict[str, StatisticsAccumulator]]:
    """For every site, reconstruction figures and statistics on the cond branch of fresh captions."""
    meters = {site: ReconstructionMeter(sae) for site, sae in saes.items()}
    accumulators = {site: StatisticsAccumulator(sae.n_latents) for site, sae in saes.items()}
    stream = stream_activations(
        pipe, list(saes), sample_captions(images, SEED), batch_size=batch_size, seed=SEED, **CALL
    )
    for batch in tqdm(stream, total=-(-images // batch_size), desc="held-out", mininterval=5):
        for site in saes:
            for rows, timestep in zip(*batch.rows(site), strict=True):
                accumulators[site].add(float(timestep), meters[site].add(float(timestep), rows))
    return {site: meter.figures() for site, meter in meters.items()}, accumulators
