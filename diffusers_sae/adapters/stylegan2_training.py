"""Training SAEs on StyleGAN2's w, which costs so little to draw that no row is seen twice and nothing is stored."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..errors import InputError
from ..evaluation.reconstruction import ReconstructionMeter
from ..saes import LatentStatistics, SparseAutoencoder, StatisticsAccumulator
from ..training import SAETrainer, TrainingConfig
from .stylegan2 import StyleGAN2Generator

SITE = {"path": "generator.w", "kind": "output", "stream": "image", "layout": "positions"}
"""What the config of an SAE for w says of its site."""


@torch.no_grad()
def sampled_w(generator: StyleGAN2Generator, rows: int, seed: int = 0) -> Iterator[torch.Tensor]:
    """Batches of `rows` w's, `(rows, w_dim)` in fp32, without end and without truncation; classes are drawn evenly.

    Not truncated, since truncation only draws w towards its mean, and an SAE of all w knows those too.
    """
    z_dim, classes = generator.config.z_dim, generator.config.c_dim
    draws = torch.Generator().manual_seed(seed)
    while True:
        z = torch.randn(rows, z_dim, generator=draws).to(generator.device, generator.dtype)
        labels = None
        if classes:
            chosen = torch.randint(classes, (rows,), generator=draws)
            labels = torch.nn.functional.one_hot(chosen, classes).to(z)
        yield generator.mapping(z, labels)[:, 0].float()


def train_on_w(
    generator: StyleGAN2Generator, sae: SparseAutoencoder, config: TrainingConfig, seed: int = 0, sample: int = 8192
) -> SparseAutoencoder:
    """Train a new SAE on `config.steps` batches of fresh w's; `sample` of them give centre and scale.

    Raises `InputError` if the SAE has another width than w.
    """
    if sae.d_in != generator.config.w_dim:
        raise InputError(
            f"The SAE has d_in={sae.d_in} and w a width of {generator.config.w_dim}; make one of that width."
        )
    trainer = SAETrainer(sae, config, next(sampled_w(generator, sample, seed)))
    batches = sampled_w(generator, config.batch_size, seed + 1)
    for _ in range(config.steps):
        trainer.step(next(batches))
    return trainer.finish()


def measured_on_w(
    generator: StyleGAN2Generator, sae: SparseAutoencoder, rows: int = 65536, seed: int = 2**31, batch: int = 4096
) -> tuple[LatentStatistics, dict[str, object]]:
    """Statistics of every latent, and `ReconstructionMeter`'s figures, on fresh w's of another seed.

    They have one timestep, 0, since nothing is denoised.
    """
    statistics, meter = StatisticsAccumulator(sae.n_latents), ReconstructionMeter(sae)
    batches = sampled_w(generator, batch, seed)
    for _ in range(-(-rows // batch)):
        statistics.add(0.0, meter.add(0.0, next(batches)))
    return statistics.finish(), meter.figures()
