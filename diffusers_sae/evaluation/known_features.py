"""Data made from features that are known, to see whether an SAE finds them."""

from __future__ import annotations

import torch
import torch.nn.functional as F


class KnownFeatures:
    """Rows that are sums of a few of `count` random unit directions of width `d`, with noise.

    A row takes `active` features, the i-th most common with a chance in proportion to `i^-skew`, each times a number
    between 0.5 and 1.5, and normal noise of standard deviation `noise` in every number.
    """

    def __init__(
        self, d: int, count: int, *, active: int = 8, skew: float = 0.5, noise: float = 0.02, seed: int = 0
    ) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.directions = F.normalize(torch.randn(count, d, generator=self._generator), dim=-1)
        self._chances = torch.arange(1, count + 1, dtype=torch.float64) ** -skew
        self._active, self._noise = active, noise

    def rows(self, n: int) -> torch.Tensor:
        """The next n rows, `(n, d)`."""
        d = self.directions.shape[1]
        chosen = torch.multinomial(self._chances, n * self._active, True, generator=self._generator).view(n, -1)
        amounts = 0.5 + torch.rand(chosen.shape, generator=self._generator)
        rows = F.embedding_bag(chosen, self.directions, per_sample_weights=amounts, mode="sum")
        return rows + self._noise * torch.randn(n, d, generator=self._generator)

    def recovered(self, directions: torch.Tensor, cosine: float = 0.9) -> float:
        """The share of features with one of `directions (n, d)` at a cosine above `cosine`; 0 if there is none."""
        if not len(directions):
            return 0.0
        return float(((self.directions @ F.normalize(directions.detach(), dim=-1).T).amax(1) > cosine).float().mean())
