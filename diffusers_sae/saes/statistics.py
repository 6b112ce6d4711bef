"""How active every latent is at every timestep of the denoising."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import InputError
from .base import SparseCode

FILE = "statistics.safetensors"
UNITS = ("raw", "mean", "max")


class StepStatistics(NamedTuple):
    """One timestep's statistics, each `(n,)`."""

    mean: torch.Tensor
    max: torch.Tensor
    rate: torch.Tensor

    def scale(self, unit: str) -> torch.Tensor:
        """What one `unit` of a latent is in raw activation: its mean while it fires, or its largest value."""
        return self.mean / self.rate.clamp(min=1e-12) if unit == "mean" else self.max


@dataclass
class LatentStatistics:
    """Mean and largest activation and firing rate of every latent at every timestep, over all rows.

    `timesteps (T,)`, from noise to image; `mean`, `max`, `rate`, each `(T, n)` in fp32. A latent fires where it is not
    0. Of signed codes (`Directions`, TopK without ReLU), mean and max may be below 0. A max that is not known, as from
    files of others, is NaN everywhere.
    """

    timesteps: torch.Tensor
    mean: torch.Tensor
    max: torch.Tensor
    rate: torch.Tensor

    def at(self, timestep: float) -> StepStatistics:
        """Statistics of the nearest timestep."""
        i = int((self.timesteps - timestep).abs().argmin())
        return StepStatistics(self.mean[i], self.max[i], self.rate[i])

    @property
    def dead(self) -> torch.Tensor:
        """`(n,)`: latents that fired at no timestep."""
        return self.rate.amax(0) == 0

    def fingerprint(self, unit: str) -> str:
        """SHA-256 of what strengths in multiples of a unit, `mean` or `max`, depend on."""
        digest = hashlib.sha256()
        for name in ("timesteps", "mean", "rate") if unit == "mean" else ("timesteps", "max"):
            values = getattr(self, name).detach().cpu().float().contiguous()
            digest.update(f"{name} {tuple(values.shape)}".encode() + values.numpy().tobytes())
        return digest.hexdigest()

    def check(self, n_latents: int, whose: str) -> None:
        """Raise `InputError` unless these are statistics of an SAE of so many latents; `whose` begins the sentence."""
        steps = self.timesteps.numel()
        for name in ("timesteps", "mean", "max", "rate"):
            shape = tuple(getattr(self, name).shape)
            if not steps or shape != ((steps,) if name == "timesteps" else (steps, n_latents)):
                raise InputError(
                    f"{whose} have a {name} of shape {shape}; an SAE of {n_latents} latents has statistics of shape "
                    f"(timesteps, {n_latents}), so measure them on this SAE again."
                )
            if not getattr(self, name).is_floating_point():
                raise InputError(f"{whose} have a {name} of whole numbers; measure them on this SAE again.")
            values = getattr(self, name).float()
            is_unknown = name == "max" and bool(values.isnan().all())
            if not is_unknown and not values.isfinite().all():
                raise InputError(f"{whose} have a {name} that is not finite; measure them on this SAE again.")
        if len(self.timesteps.unique()) != steps:
            raise InputError(f"{whose} have the same timestep twice; measure them on this SAE again.")
        if not ((self.rate >= 0) & (self.rate <= 1)).all():
            raise InputError(f"{whose} have a rate outside 0 to 1; measure them on this SAE again.")

    def save(self, folder: Path) -> None:
        """Write `statistics.safetensors` into an SAE's folder."""
        # clones, since tensors that share memory cannot be saved
        tensors = {f.name: getattr(self, f.name).float().contiguous().clone() for f in fields(self)}
        save_file(tensors, folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> LatentStatistics | None:
        """The statistics that lie in `folder`, or `None`."""
        file = folder / FILE
        if not file.exists() and not file.is_symlink():
            return None
        try:
            return cls(**load_file(folder / FILE))
        except (SafetensorError, TypeError, OSError, ValueError) as error:
            raise InputError(f"{folder / FILE} cannot be read ({error}); fetch or save the SAE again.") from None


class StatisticsAccumulator:
    """Gathers `LatentStatistics` from sparse codes, a timestep at a time."""

    def __init__(self, n_latents: int) -> None:
        self._n = n_latents
        self._steps: dict[float, list[torch.Tensor]] = {}
        self._rows: dict[float, int] = {}

    def add(self, timestep: float, code: SparseCode) -> None:
        """Count the codes `(..., k)` of rows that were seen at `timestep`."""
        values, indices = code.values.flatten().cpu().double(), code.indices.flatten().cpu()
        rows = code.indices[..., 0].numel()
        if not rows:
            return
        total, top, fired = self._steps.setdefault(timestep, [torch.zeros(self._n).double() for _ in range(3)])
        total.index_add_(0, indices, values)
        before, seen = fired.clone(), self._rows.get(timestep, 0)
        fired.index_add_(0, indices, (values != 0).double())
        self._rows[timestep] = seen + rows
        here = torch.full_like(top, -torch.inf).scatter_reduce_(0, indices, values, "amax")
        here = torch.where(fired - before < rows, here.clamp(min=0), here)  # 0 in some row
        top.copy_(torch.maximum(top, here) if seen else here)

    def finish(self) -> LatentStatistics:
        """The statistics of all codes so far; raises `InputError` if there are none."""
        if not self._steps:
            raise InputError("There are no codes to take statistics of; add those of some rows first.")
        steps = sorted(self._steps, reverse=True)
        rows = torch.tensor([self._rows[t] for t in steps])[:, None]
        total, top, fired = (torch.stack([self._steps[t][i] for t in steps]) for i in range(3))
        return LatentStatistics(torch.tensor(steps), (total / rows).float(), top.float(), (fired / rows).float())
