"""Optimisers of the trainer by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

Optimizers = dict[str, Callable[[Iterable[nn.Parameter], float], torch.optim.Optimizer]]


def _adam(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.999), fused=True)


def _adafactor(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Shazeer and Stern (2018, 1804.04235), without first moment: a matrix `(n, d)` has n + d numbers of state.

    The second of `eps` makes the rate absolute, as Adam's, where torch makes it relative to the mean square of a
    parameter; the first lies below the square of the gradients of an SAE's many numbers, which torch's own exceeds.
    Each parameter is a group of its own, after which the memory of its update is freed.
    """
    groups = [{"params": [parameter]} for parameter in parameters]
    return torch.optim.Adafactor(groups, lr=lr, eps=(1e-16, 1.0), foreach=False)


OPTIMIZERS: Optimizers = {"adam": _adam, "adafactor": _adafactor}
