"""How well an SAE reconstructs: FVU pooled and at each timestep, L0, dead latents."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..capture import ActivationStore
from ..saes import LatentStatistics, SparseAutoencoder, SparseCode, StatisticsAccumulator


@dataclass
class _Sums:
    """Sums over rows, in float64, from which the variance and the error follow."""

    rows: int = 0
    total: torch.Tensor | float = 0.0  # (d,)
    square: float = 0.0
    error: float = 0.0
    active: float = 0.0

    def fvu(self) -> float:
        """`Σ‖x - x̂‖² / Σ‖x - x̄‖²`."""
        return self.error / (self.square - float(torch.as_tensor(self.total).square().sum()) / self.rows)


@dataclass
class ReconstructionMeter:
    """Adds up reconstruction errors over batches of held-out rows, and tells the figures at the end."""

    sae: SparseAutoencoder
    _steps: dict[float, _Sums] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._pooled = _Sums()
        self._fired = torch.zeros(self.sae.n_latents, dtype=torch.bool)

    @torch.no_grad()
    def add(self, timestep: float, x: torch.Tensor) -> SparseCode:
        """Take in rows `(..., d)` seen at one timestep; returns their code, `(N, k)`."""
        x = x.reshape(-1, x.shape[-1])
        code = self.sae.encode_sparse(x)
        error = float((x - self.sae.decode_sparse(code)).double().square().sum())
        active = code.values > 0
        self._fired[code.indices[active]] = True
        for sums in (self._pooled, self._steps.setdefault(timestep, _Sums())):
            sums.rows += len(x)
            sums.total = sums.total + x.double().sum(0)
            sums.square += float(x.double().square().sum())
            sums.error += error
            sums.active += float(active.sum())
        return code

    def figures(self) -> dict[str, object]:
        """`fvu` pooled, `fvu_by_timestep`, `l0`, `dead` (share of latents that never fired here) and `rows`."""
        return {
            "fvu": self._pooled.fvu(),
            "fvu_by_timestep": {t: self._steps[t].fvu() for t in sorted(self._steps, reverse=True)},
            "l0": self._pooled.active / self._pooled.rows,
            "dead": float((~self._fired).float().mean()),
            "rows": self._pooled.rows,
        }


@torch.no_grad()
def measure_on_store(
    sae: SparseAutoencoder, store: ActivationStore, rows: int = 2**14
) -> tuple[dict[str, object], LatentStatistics]:
    """Figures of reconstruction and statistics of every latent over all rows of a store, `rows` of them at a time."""
    meter, statistics = ReconstructionMeter(sae), StatisticsAccumulator(sae.n_latents)
    for i in range(len(store.shard_rows)):
        shard = store.shard(i)
        for timestep in shard["timestep"].unique().tolist():
            for x in shard["rows"][shard["timestep"] == timestep].split(rows):
                statistics.add(timestep, meter.add(timestep, x.float()))
    return meter.figures(), statistics.finish()
