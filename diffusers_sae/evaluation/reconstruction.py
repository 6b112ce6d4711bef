"""How well an SAE reconstructs: FVU pooled and at each timestep, other errors, L0, dead latents, densities."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from ..capture import ActivationStore
from ..errors import InputError
from ..saes import LatentStatistics, SparseAutoencoder, SparseCode, StatisticsAccumulator, TopKSAE
from ..saes.precision import NO_SPREAD


@dataclass
class _Sums:
    """Sums over rows, in float64, from which the variance and the error follow."""

    rows: int = 0
    total: torch.Tensor | float = 0.0  # (d,)
    square: float = 0.0
    error: float = 0.0
    absolute: float = 0.0
    cosine: float = 0.0
    active: float = 0.0

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def fvu(self) -> float:
        """`Σ‖x - x̂‖² / Σ‖x - x̄‖²`; NaN for rows that are all the same, such as a single one."""
        spread = self.square - float(torch.as_tensor(self.total).square().sum()) / self.rows
        return self.error / spread if spread > NO_SPREAD * self.square else math.nan


@dataclass
class ReconstructionMeter:
    """Adds up reconstruction errors over batches of held-out rows, and tells the figures at the end."""

    sae: SparseAutoencoder
    _steps: dict[Any, _Sums] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._pooled = _Sums()
        self._fired = torch.zeros(self.sae.n_latents, dtype=torch.long)  # rows

    @torch.no_grad()
    def add(self, timestep: Any, x: torch.Tensor) -> SparseCode:
        """Take in rows `(..., d)` seen at one timestep, or under another label; returns their code, `(N, k)`.

        Raises:
            InputError: if the rows, or their reconstructions, are not finite; nothing was added.
        """
        x = x.reshape(-1, x.shape[-1]).float()
        if not torch.isfinite(x).all():
            raise InputError(f"The rows of {timestep!r} hold numbers that are not finite; capture them in fp32.")
        code = self.sae.encode_sparse(x)
        x_hat = self.sae.restored(self.sae.decode_sparse(code), x)
        if not torch.isfinite(x_hat).all():
            raise InputError(f"The SAE's reconstruction of the rows of {timestep!r} is not finite; check its weights.")
        active, exact, error = code.values != 0, x.double(), (x - x_hat).double()
        self._fired += torch.bincount(code.indices[active].cpu(), minlength=len(self._fired))
        seen = _Sums(
            rows=len(x),
            total=exact.sum(0),
            square=float(exact.square().sum()),
            error=float(error.square().sum()),
            absolute=float(error.abs().sum()),
            cosine=float(torch.cosine_similarity(x, x_hat, dim=-1).double().sum()),
            active=float(active.sum()),
        )
        self._pooled += seen
        self._steps[timestep] = self._steps.get(timestep, _Sums()) + seen
        return code

    @property
    def rows(self) -> int:
        return self._pooled.rows

    @property
    def mean(self) -> torch.Tensor:
        """The mean row, `(d,)` in float64."""
        return torch.as_tensor(self._pooled.total) / self.rows

    @property
    def variance(self) -> float:
        """Mean square distance of the rows from their mean."""
        return self._pooled.square / self.rows - float(self.mean.square().sum())

    def figures(self) -> dict[str, Any]:
        """`fvu` pooled, `fvu_by_timestep`, and over all rows `mse` and `mae` a number, `cosine` of a row with its
        reconstruction, `l0`, `dead` (share of latents that never fired), `rows`, and `density`: how many latents fire
        on a share of rows of 10^-6 to 10^-5, and so on; the first decade counts all rarer ones too. An FVU is NaN if
        its rows are all the same.
        """
        pooled, width = self._pooled, self.sae.d_in
        rates = self._fired[self._fired > 0].double() / pooled.rows
        decades = rates.log10().floor().clamp(-6, -1).long()
        return {
            "fvu": pooled.fvu(),
            "fvu_by_timestep": {t: self._steps[t].fvu() for t in sorted(self._steps, reverse=True)},
            "mse": pooled.error / pooled.rows / width,
            "mae": pooled.absolute / pooled.rows / width,
            "cosine": pooled.cosine / pooled.rows,
            "l0": pooled.active / pooled.rows,
            "dead": float((self._fired == 0).float().mean()),
            "density": {f"1e{i}": int((decades == i).sum()) for i in range(-6, 0)},
            "rows": pooled.rows,
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


def baselines(seen: torch.Tensor, held_out: torch.Tensor, k: int, n_latents: int) -> dict[str, float]:
    """FVU on rows held out `(M, d)` of what an SAE has to beat, made from rows `(N, d)` that are seen.

    `pca`: projection on the k first principal components. `random`: a TopK SAE of n random directions, k of them
    active, each as long as it is in the row, which is not fitted further. `mean`: 1 by definition, but for the shift
    between both sets of rows. The identity has 0, at an L0 of d.
    """
    mean = seen.double().mean(0)
    _, components = torch.linalg.eigh((seen.double() - mean).T @ (seen.double() - mean))
    x = held_out.double() - mean
    spread = (held_out.double() - held_out.double().mean(0)).square().sum()

    def fvu(x_hat: torch.Tensor) -> float:
        return float((x - x_hat).square().sum() / spread)

    top = components[:, -k:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sae = TopKSAE(seen.shape[1], n_latents, k)
    with torch.no_grad():
        drawn = sae(x.float()).double()
    return {"pca": fvu(x @ top @ top.T), "random": fvu(drawn), "mean": fvu(torch.zeros_like(x))}
