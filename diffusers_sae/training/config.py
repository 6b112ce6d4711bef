"""How an SAE is trained: every setting, its default and the values that it may have."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch

from ..errors import InputError
from ..ranges import Range, check_choice, check_ranges
from .optimizers import OPTIMIZERS
from .precision import PRECISIONS, resolve_precision

log = logging.getLogger(__name__)

CENTRES = ("geometric_median", "mean")
DEAD_AFTER = 100_000
"""Rows without firing after which a latent counts as dead, in runs long enough for it."""

POSITIVE = Range(0, open=True)
SHARE = Range(0, 1)
COUNT = Range(1, whole=True)
OPTIONAL_COUNT = Range(1, whole=True, optional=True)
RANGES = {
    "steps": COUNT,
    "batch_size": Range(2, whole=True),  # one row has no variance to explain
    "lr": POSITIVE,
    "warmup": SHARE,
    "decay": SHARE,
    "k_aux": Range(0, whole=True),
    "aux_weight": Range(0),
    "dead_after": OPTIONAL_COUNT,
    "sparsity": Range(0),
    "sparsity_warmup": SHARE,
    "bandwidth": POSITIVE,
    "clip": Range(0, open=True, infinite=True),
    "resample_every": OPTIONAL_COUNT,
    "ema": Range(0, 1, open=True, optional=True),
}


@dataclass(frozen=True)
class TrainingConfig:
    """How an SAE is trained.

    Args:
        steps: optimiser steps of the whole run, which the schedule of the rate follows.
        batch_size: rows per step.
        lr: peak rate, for rows whose mean square distance from the centre is scaled to `d`.
        warmup, decay: shares of the run for the linear rise and the linear fall of the rate; 0 for none.
        k_aux, aux_weight, dead_after: AuxK: latents that model the residual, weight of that loss, and the rows without
            firing after which a latent counts as dead: by default 100,000, or a tenth of the run's rows if that is
            less, so that AuxK acts in short runs, too.
        centre: `geometric_median` or `mean`: where the decoder bias starts.
        sparsity: weight of the L1 penalty of ReLU and gated SAEs, or of the L0 penalty of JumpReLU ones.
        sparsity_warmup: share of the run in which that weight rises from 0.
        bandwidth: width of JumpReLU's pseudo-derivative, for the same scale of rows.
        clip: largest norm of the gradient; infinity for no limit.
        resample_every: steps after which dead latents begin anew, in the first half of the run; never by default.
        ema: how much of the average of the weights a step keeps; if given, the trained SAE has that average.
        optimizer: `adam`, or `adafactor`, which keeps next to nothing beside weights and gradients.
        precision: `float32`, `bfloat16` or `auto`, which the trainer resolves by `resolve_precision` and records. It is
            the dtype in which TopK searches for the largest latents; codes, losses and weights stay float32.

    Raises:
        InputError: if a setting has a value that it may not have.
    """

    steps: int
    batch_size: int = 2048
    lr: float = 8e-3
    warmup: float = 0.02
    decay: float = 0.5
    k_aux: int = 64
    aux_weight: float = 1 / 32
    dead_after: int | None = None
    centre: str = "geometric_median"
    sparsity: float = 1.0
    sparsity_warmup: float = 0.1
    bandwidth: float = 0.1
    clip: float = 1.0
    resample_every: int | None = None
    ema: float | None = None
    optimizer: str = "adam"
    precision: str = "auto"

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        check_choice("centre", self.centre, CENTRES)
        if self.precision not in PRECISIONS:
            raise InputError(f"precision={self.precision!r} is not a precision; choose from {', '.join(PRECISIONS)}.")
        if self.optimizer not in OPTIMIZERS:
            raise InputError(f"{self.optimizer!r} is not an optimizer; choose from {', '.join(OPTIMIZERS)}.")

    def resolve(self, device: torch.device | str) -> TrainingConfig:
        """The same settings with the precision of a run on `device`, and the rows after which its latents are dead."""
        return replace(self, precision=resolve_precision(self.precision, device), dead_after=self.rows_until_dead)

    @property
    def rows_until_dead(self) -> int:
        """`dead_after`, or its default for a run of this length."""
        if self.dead_after is None:
            return min(DEAD_AFTER, max(1, self.steps * self.batch_size // 10))
        return self.dead_after

    @property
    def aux_k_acts(self) -> bool:
        """Whether a latent can count as dead before the last step, so that AuxK has something to do."""
        return self.dead_after is None or self.dead_after <= (self.steps - 1) * self.batch_size

    def rate_at(self, step: int) -> float:
        """Share of the peak rate at a step."""
        rise = min(1.0, (step + 1) / max(1.0, self.warmup * self.steps))
        return rise * (min(1.0, max(0.0, (1 - step / self.steps) / self.decay)) if self.decay else 1.0)
