"""Which features to look at first, and which undo each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..saes import LatentStatistics, SparseAutoencoder


def most_active(statistics: LatentStatistics, count: int) -> list[int]:
    """The latents of the largest mean activation over all rows and timesteps, at most `count`; dead ones are left out.

    So Zhang and Prasanna (2025) choose the features that they name. Of signed codes, the magnitude of the mean counts.
    """
    mean = statistics.mean.mean(0).abs().masked_fill(statistics.dead, -torch.inf)
    alive = int((~statistics.dead).sum())
    return mean.topk(min(count, alive)).indices.tolist()


class OppositePair(NamedTuple):
    """Two features, the lower index first, and the cosine of their directions."""

    first: int
    second: int
    cosine: float


@torch.no_grad()
def opposite_pairs(
    sae: SparseAutoencoder,
    features: Sequence[int] | None = None,
    *,
    below: float = -0.5,
    count: int | None = None,
    chunk: int = 1024,
) -> list[OppositePair]:
    """Pairs of features whose directions have a cosine under `below`, the most opposite first: they undo each other.

    Equal strengths of a pair of cosine -1 change nothing together. `features` are those that are compared, by default
    all; `count` limits the pairs. Cosines are taken of `chunk` features with all others at a time.
    """
    compared = torch.arange(sae.n_latents) if features is None else torch.tensor(sorted(set(features)))
    directions = F.normalize(sae.decoder_rows(compared.tolist()), dim=-1)
    found: list[OppositePair] = []
    for start in range(0, len(compared), chunk):
        cosines = directions[start : start + chunk] @ directions.T
        for i, j in (cosines < below).nonzero().tolist():
            if start + i < j:
                found.append(OppositePair(int(compared[start + i]), int(compared[j]), cosines[i, j].item()))
    return sorted(found, key=lambda pair: pair.cosine)[:count]
