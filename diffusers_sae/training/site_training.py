"""Training at one site of a stream: its shuffle buffer, the steps that are due, and the SAEs that learn from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..capture import ShuffleBuffer
from ..capture.descriptions import digest_weights, refuse_differences
from ..disk import append_to_log, cut_log
from ..errors import InputError
from ..saes import SparseAutoencoder
from ..saes.precision import NO_SPREAD
from ..sites import Site
from .checkpoints import DELETE, check_contents
from .config import TrainingConfig
from .losses import fraction_of_variance_unexplained
from .streaming_config import StreamingConfig
from .trainer import SAETrainer


def timestep_weights(rows: torch.Tensor) -> torch.Tensor:
    """One over the variance of each timestep, for rows `(T, images, P, d)`, as `(T, images, P, 1)`.

    In units in which the mean variance has the weight 1; so have timesteps whose rows are all the same.
    """
    x = rows.flatten(1, 2)  # (T, N, d)
    variance = x.var(1).sum(-1) if x.shape[1] > 1 else x.new_zeros(len(x))  # (T,)
    varies = variance > NO_SPREAD * x.mean(1).square().sum(-1)
    mean_variance = variance[varies].mean() if varies.any() else variance.new_ones(())
    weights = torch.where(varies, mean_variance / torch.where(varies, variance, 1.0), 1.0)
    return weights[:, None, None, None].expand_as(rows[..., :1])


class SAERun:
    """One SAE: its trainer and its log."""

    def __init__(
        self, log: Path, make: Callable[[int], SparseAutoencoder], training: Mapping[str, Any], trained: bool
    ) -> None:
        self._log, self._make, self._training, self._trained = log, make, training, trained
        self.trainer: SAETrainer | None = None
        self._start: str | None = None
        self.figures: dict[str, float] = {}

    def begin(self, sample: torch.Tensor, steps: int, rows: int) -> None:
        """Make the trainer, with the centre and the scale of `sample (N, d)`."""
        settings = TrainingConfig(steps=steps, batch_size=rows, **self._training)
        sae = self._make(sample.shape[1])
        self._start = self._digest(sae)
        self.trainer = SAETrainer(sae, settings, sample, trained=self._trained)

    def _digest(self, sae: SparseAutoencoder) -> str | None:
        """What a trained SAE starts from; the weights of a new one may be random."""
        return digest_weights(sae) if self._trained else None

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {**self.trainer.state_dict(), "start": self._start}

    def restore(self, state: dict[str, Any], width: int) -> None:
        """Make the trainer as it was saved."""
        check_contents(state, ("config", "start"), f"The checkpoint of {self._log.stem}")
        sizes = {name: state["config"].get(name) for name in ("steps", "batch_size")}
        check_contents({name: size for name, size in sizes.items() if size}, sizes, "The checkpoint's config")
        sae = self._make(width)
        self._start = self._digest(sae)
        self.trainer = SAETrainer(sae, TrainingConfig(**sizes, **self._training), None)
        self.trainer.load_state_dict(state)
        holder = f"The checkpoint of {self._log.stem}"
        refuse_differences({"start": state["start"]}, {"start": self._start}, holder, "the checkpoint", DELETE)

    @torch.no_grad()
    def hardness(self, rows: torch.Tensor) -> torch.Tensor:
        """FVU at each timestep, `(T,)`, of a quarter of the rows `(T, images, P, d)`; NaN if these are all the same."""
        assert self.trainer is not None
        sae, x = self.trainer.sae, rows.flatten(1, 2)[:, ::4] * self.trainer.scale
        return torch.stack([fraction_of_variance_unexplained(step, sae(step)) for step in x])

    def finished(self) -> SparseAutoencoder:
        assert self.trainer is not None
        return self.trainer.finish()

    def log(self, images: int) -> None:
        append_to_log(self._log, {"images": images, **self.figures})

    def cut_log(self, images: int) -> None:
        cut_log(self._log, "images", images)


class SiteTraining:
    """One site's shuffle buffer and the SAEs that learn from it."""

    def __init__(self, site: Site, runs: Mapping[str, SAERun], config: StreamingConfig) -> None:
        self.site, self.runs, self._config = site, dict(runs), config
        self._buffer: ShuffleBuffer | None = None
        self._generator = torch.Generator().manual_seed(config.seed)
        self._hardness: torch.Tensor | None = None
        self._owed = 0.0

    def state_dict(self) -> dict[str, Any]:
        """All that the following batches depend on."""
        assert self._buffer is not None
        return {
            "rows": self._buffer.rows.clone(),  # no more of the buffer than is filled
            "generator": self._generator.get_state(),
            "hardness": self._hardness,
            "owed": self._owed,
            "saes": {name: run.state_dict() for name, run in self.runs.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_contents(state, ("rows", "generator", "hardness", "owed", "saes"), "The checkpoint's site")
        check_contents(state["saes"], list(self.runs), "The checkpoint's site")
        self._buffer = ShuffleBuffer(self._config.buffer, state["rows"].shape[1], self._generator)
        self._buffer.add(state["rows"])
        self._generator.set_state(state["generator"])
        self._hardness, self._owed = state["hardness"], state["owed"]
        for name, run in self.runs.items():
            run.restore(state["saes"][name], state["rows"].shape[1] - 1)

    def feed(self, rows: torch.Tensor, further: torch.Tensor) -> None:
        """Take one batch of rows `(T, images, P, d)` in and make the steps that are due for it.

        `further (1, noises, P, d)` are more of the first timestep, whose weight all of them share; `(0, ...)` if none.

        Raises:
            InputError: if the rows are not finite, or too few for a step.
        """
        config, count = self._config, rows[..., 0].numel() + further[..., 0].numel()
        self._check_finite(rows, further)
        if self._buffer is None:
            self._begin(rows, count)
        assert self._buffer is not None
        weights = timestep_weights(rows) if config.balance else torch.ones_like(rows[..., :1])
        if config.emphasis:
            weights = weights * self._emphasis(rows)[:, None, None, None]
        shared = weights[:1] * rows.shape[1] / (rows.shape[1] + further.shape[1] * len(further))
        rows = torch.cat([rows, torch.cat([shared, weights[1:]])], -1)
        further = torch.cat([further, shared[: len(further), :1, :, :].expand_as(further[..., :1])], -1)
        for part, more in self._parts(rows, further):
            self._buffer.add(part)
            self._buffer.add(more)
            self._owed += (part[..., 0].numel() + more[..., 0].numel()) * config.reuse / config.rows
            self._make_steps()

    def _begin(self, rows: torch.Tensor, count: int) -> None:
        """Make the buffer and the trainers, for batches like this first one, of `count` rows."""
        config = self._config
        steps = int(config.images * count / rows.shape[1] * config.reuse / config.rows)
        if steps < 1:
            raise InputError(
                f"images={config.images} give {config.images * count // rows.shape[1]} rows of {self.site}, too few "
                f"for a step of rows={config.rows}; generate more images, or take fewer rows per step."
            )
        sample = rows.flatten(0, 2)[:: max(1, rows[..., 0].numel() // config.buffer)]
        for run in self.runs.values():
            run.begin(sample, steps, config.rows)
        self._buffer = ShuffleBuffer(config.buffer, rows.shape[-1] + 1, self._generator)

    def _check_finite(self, rows: torch.Tensor, further: torch.Tensor) -> None:
        finite = torch.isfinite(rows).flatten(1).all(1)  # (T,)
        if not (finite.all() and torch.isfinite(further).all()):
            step = int((~finite).nonzero()[0]) if not finite.all() else 0
            raise InputError(
                f"{self.site} held numbers that are not finite at step {step}; run the pipeline in fp32 or bfloat16."
            )

    def _parts(self, rows: torch.Tensor, further: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batch whole, if the buffer can hold it; else in parts of half a buffer at most, where that can be.

        Each part has all timesteps of a random choice of (image, place), `(T, 1, m, d)`, and of `further`, `(1, 1, m',
        d)`.
        """
        count, capacity = rows[..., 0].numel() + further[..., 0].numel(), self._config.buffer
        if count <= capacity:
            yield rows, further
            return
        parts = -(-2 * count // capacity)
        chosen = [self._shuffled(each).tensor_split(parts, 2) for each in (rows, further)]
        yield from zip(*chosen, strict=True)

    def _shuffled(self, rows: torch.Tensor) -> torch.Tensor:
        """`(T, images, P, d)` with images and places in random order, as `(T, 1, images x P, d)`."""
        rows = rows.flatten(1, 2)[:, None]
        return rows[:, :, torch.randperm(rows.shape[2], generator=self._generator)]

    def _make_steps(self) -> None:
        """The steps that are due for the rows that have come."""
        assert self._buffer is not None
        while self._owed >= 1 - 1e-6 and self._steps_left():  # parts of a step add up to a step but for rounding
            sample = self._buffer.sample(self._config.rows)
            for run in self.runs.values():
                assert run.trainer is not None
                run.figures = run.trainer.step(sample[:, :-1], sample[:, -1])
            self._owed -= 1

    def _steps_left(self) -> bool:
        trainer = next(iter(self.runs.values())).trainer
        return trainer is not None and trainer.step_count < trainer.config.steps

    def _emphasis(self, rows: torch.Tensor) -> torch.Tensor:
        """How much each timestep counts, `(T,)`, by the mean FVU of the site's SAEs over the last batches or so.

        Timesteps whose rows are all the same, which have no FVU, count as the mean of the others.
        """
        fvu = torch.stack([run.hardness(rows) for run in self.runs.values()]).mean(0)
        fvu = torch.where(fvu.isnan(), fvu.nanmean(), fvu).nan_to_num(1.0)
        self._hardness = fvu if self._hardness is None else torch.lerp(self._hardness, fvu, 0.1)
        return (self._hardness / self._hardness.mean()) ** self._config.emphasis
