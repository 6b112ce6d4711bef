"""Training an SAE on rows that are in memory, such as the tokens of some captions."""

from __future__ import annotations

import torch

from ..errors import InputError
from ..saes import SparseAutoencoder
from .config import TrainingConfig
from .trainer import SAETrainer


def train_on_rows(
    rows: torch.Tensor, sae: SparseAutoencoder, config: TrainingConfig, *, seed: int = 0, sample: int = 8192
) -> SparseAutoencoder:
    """Train a new SAE on `rows (N, d)`, `config.steps` batches of them drawn at random; `sample` give centre and scale.

    Raises `InputError` if the rows are none, of another width than the SAE's, or not finite.
    """
    if rows.ndim != 2 or len(rows) == 0 or rows.shape[1] != sae.d_in:
        raise InputError(f"The rows have shape {tuple(rows.shape)}; the SAE takes (N, {sae.d_in}), with N above 0.")
    if not torch.isfinite(rows).all():
        raise InputError("Some rows hold numbers that are not finite; leave those out.")
    generator = torch.Generator().manual_seed(seed)

    def drawn(count: int) -> torch.Tensor:
        return rows[torch.randint(len(rows), (count,), generator=generator)].float()

    trainer = SAETrainer(sae.train(), config, drawn(sample))
    for _ in range(config.steps):
        trainer.step(drawn(config.batch_size))
    return trainer.finish()
