"""Masks and strength maps on the grid of a site, whatever their own size is."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def average_areas(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """`(N, C, H, W)` -> `(N, C, *size)`: every new cell is the mean over the area of the old ones that it covers."""
    if all(old % new == 0 or new % old == 0 for old, new in zip(maps.shape[-2:], size, strict=True)):
        return F.interpolate(maps, size, mode="area")
    rows, columns = (_shares(old, new, maps) for old, new in zip(maps.shape[-2:], size, strict=True))
    return rows @ maps @ columns.T


def resize_map(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """`(N, C, H, W)` -> `(N, C, *size)`: averaged over areas where it is finer, and interpolated where it is coarser.

    Sampling a finer map would lose what lies between the samples.
    """
    height, width = (min(old, new) for old, new in zip(maps.shape[-2:], size, strict=True))
    if (height, width) != tuple(maps.shape[-2:]):
        maps = average_areas(maps, (height, width))
    return maps if (height, width) == size else F.interpolate(maps, size, mode="bilinear", align_corners=False)


def _shares(old: int, new: int, like: torch.Tensor) -> torch.Tensor:
    """`(new, old)`: which share of each of `new` cells lies in each of `old` cells along the same line."""
    # in units of which an old cell has `new` and a new one `old`, so that all edges are whole numbers
    left, right = (torch.arange(start, start + new, device=like.device) * old for start in (0, 1))
    edges = torch.arange(old + 1, device=like.device) * new
    overlap = torch.minimum(right[:, None], edges[1:]) - torch.maximum(left[:, None], edges[:-1])
    return overlap.clamp(min=0).to(like.dtype) / old
