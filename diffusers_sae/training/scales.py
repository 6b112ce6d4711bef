"""Sizes for a run of about a given length."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from ..capture import ActivationStore
from ..errors import InputError
from ..saes import SparseAutoencoder
from .config import TrainingConfig
from .trainer import SAETrainer

PROBES = 5
FEWEST = 50


class Scale(NamedTuple):
    """Seconds of training, latents for each number of the width, and rows a step."""

    seconds: float
    expansion: int
    rows: int


SCALES = {
    "1s": Scale(1, 1, 256),
    "10s": Scale(10, 2, 512),
    "1m": Scale(60, 4, 1024),
    "10m": Scale(600, 8, 2048),
    "1h": Scale(3600, 16, 2048),
    "10h": Scale(36_000, 16, 4096),
}


def sizes_for(
    scale: str,
    store: ActivationStore,
    make_sae: Callable[[int, int], SparseAutoencoder],
    config: TrainingConfig,
    latents: int | None = None,
) -> tuple[int, TrainingConfig]:
    """The number of latents and `config` with the steps and rows of one of `SCALES`, timed on this machine and store.

    Args:
        make_sae: function of width and number of latents.
        latents: if they are not the scale's.

    Raises:
        InputError: if the scale is unknown, or the store has too few rows for it.
    """
    if scale not in SCALES:
        raise InputError(f"{scale!r} is not a scale; choose from {', '.join(SCALES)}.")
    seconds, expansion, rows = SCALES[scale]
    latents = expansion * store.width if latents is None else latents
    rows = min(rows, len(store) // 4)
    if rows < 2:
        raise InputError(f"{store.folder} has {len(store)} rows, too few to train on; store more.")
    config = replace(config, batch_size=rows)
    probe = replace(config, steps=PROBES, k_aux=0)  # since no latent is dead so soon
    batches = store.batches(rows, epochs=PROBES + 2)
    with torch.random.fork_rng(devices=[]):
        trainer = SAETrainer(make_sae(store.width, latents).train(), probe, next(batches))
    times = []
    for _ in range(PROBES):
        start = time.perf_counter()
        trainer.step(next(batches))
        times.append(time.perf_counter() - start)
    steps = max(FEWEST, round(seconds / statistics.median(times)))
    config = replace(config, steps=steps)
    longest = replace(config, dead_after=None).rows_until_dead
    return latents, replace(config, dead_after=min(longest, config.dead_after or longest))
