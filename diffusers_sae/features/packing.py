"""Score tensors in files: most scores are 0, the others span many orders of magnitude."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

LARGEST = 2.0**15
"""What the largest score of a latent is scaled up to, at most; float16 ends at 65,504. Values down to 2^-29 of it keep
11 bits."""
SMALLEST_UNIT = 2.0**-126
"""The least normal number of float32."""


def pack(name: str, scores: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tensors that hold `scores (..., n)` in files: where they are not 0, as bits, their values there, and units.

    Values are in float16, in multiples of a unit `(n,)` of their latent. Units are powers of two, so that packing what
    was unpacked changes no bit.
    """
    scores = scores.float().cpu()
    unit = _units(scores.flatten(0, -2).abs().amax(0))
    values = scores / unit
    there = values.half() != 0
    bits = torch.from_numpy(np.packbits(there.numpy(), axis=-1))
    return {f"{name}.there": bits, f"{name}.values": values[there].half(), f"{name}.unit": unit}


def unpack(name: str, stored: Mapping[str, torch.Tensor], n_latents: int) -> torch.Tensor:
    """The scores `(..., n)` of that name among tensors that `pack` made, in float32. Files without units have 1.

    Raises:
        ValueError: the tensors do not fit each other.
    """
    bits, values = stored[f"{name}.there"], stored[f"{name}.values"].float()
    there = torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1, count=n_latents)).bool()
    if bits.shape[-1] != -(-n_latents // 8) or values.shape != (int(there.sum()),):
        raise ValueError(f"its {name} has {int(there.sum())} places for {values.numel()} values")
    scores = torch.zeros(there.shape).masked_scatter_(there, values)
    return scores * stored[f"{name}.unit"] if f"{name}.unit" in stored else scores


def _units(largest: torch.Tensor) -> torch.Tensor:
    """The power of two that brings each of `largest (n,)` to between `LARGEST / 2` and `LARGEST`; 1 where it is 0."""
    _, exponent = torch.frexp(largest)  # largest = m 2^exponent, m in [1/2, 1)
    unit = torch.ldexp(torch.ones_like(largest), exponent - 15).clamp(min=SMALLEST_UNIT)
    return torch.where(largest > 0, unit, 1.0)
