"""Random places of an image or a prompt that a store keeps."""

from __future__ import annotations

import hashlib

import torch


def random_places(key: tuple[int, int, int], total: int, count: int) -> torch.Tensor:
    """`count` random places of `total`, in order, which follow from the key (seed, image, entry of that image)."""
    if count == total:
        return torch.arange(total)
    digest = hashlib.sha256(repr(key).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.randperm(total, generator=generator)[:count].sort().values
