"""Training SAEs for several sites in one pass over a generating pipeline; nothing is stored but checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..capture import ShuffleBuffer, StreamBatch, stream_activations
from ..errors import InputError
from ..saes import SparseAutoencoder
from .trainer import SAETrainer, TrainingConfig

FURTHER = 2**40
"""How far the seeds of further noises lie from those of the images."""


@dataclass(frozen=True)
class StreamingConfig:
    """How a stream feeds the trainers.

    Args:
        images: images to generate; the run ends after them.
        batch_size: images generated at a time.
        rows: rows of an optimiser step.
        reuse: how often a row is drawn, on average.
        buffer: rows that each site's shuffle buffer holds.
        branch: guidance branch whose rows are learned.
        balance: whether rows are weighted by one over the variance of their timestep, so that every timestep counts
            alike.
        emphasis: power of a timestep's FVU, over the mean one, that its weight is multiplied by; above 0, timesteps
            that are hard to reconstruct count more.
        first_steps: how many further noises of each prompt go through the first step alone. What a site holds of pure
            noise is the most varied, and such rows cost one step.
        checkpoint_every: images between checkpoints.
        seed: image i starts from the noise of seed `seed + i`.
    """

    images: int
    batch_size: int = 16
    rows: int = 1024
    reuse: float = 1.0
    buffer: int = 2**17
    branch: str = "cond"
    balance: bool = True
    emphasis: float = 0.0
    first_steps: int = 0
    checkpoint_every: int = 256
    seed: int = 0


def train_on_stream(
    pipe: Any,
    make_sae: Mapping[str, Callable[[int], SparseAutoencoder]],
    prompts: Iterable[str],
    config: StreamingConfig,
    folder: Path,
    *,
    training: Mapping[str, Any] | None = None,
    trained: bool = False,
    **call: Any,
) -> dict[str, SparseAutoencoder]:
    """Train one SAE for each site on the activations of `config.images` generated images.

    Args:
        make_sae: `{site: function of the width that gives a new SAE, or a trained one to go on with}`.
        trained: whether the SAEs are trained already.
        prompts: at least `config.images` prompts.
        folder: checkpoints and logs; a run that stopped goes on from there, with a buffer that fills anew.
        training: arguments of `TrainingConfig` other than the numbers of steps and rows.
        call: goes to the pipeline (`num_inference_steps`, `guidance_scale`, ...).
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs = {
        site: _SiteRun(site, make, config, folder, dict(training or {}), trained) for site, make in make_sae.items()
    }
    positions = {run.saved_position() for run in runs.values()}
    if len(positions) > 1:
        raise InputError(
            f"The checkpoints in {folder} are of different images {sorted(positions)}; delete them to begin anew."
        )
    (first,) = positions
    stream = stream_activations(
        pipe, list(make_sae), prompts, batch_size=config.batch_size, seed=config.seed, skip=first, **call
    )
    with tqdm(total=config.images, initial=first, desc="images", mininterval=5) as bar:
        for batch in stream:
            done = batch.first_image + len(batch.prompts)
            further = _first_steps(pipe, batch, config, call) if config.first_steps else None
            for run in runs.values():
                rows, _ = batch.rows(run.site, config.branch)  # (T, images, P, d)
                run.feed(rows, further.rows(run.site, config.branch)[0] if further else rows[:0])
            bar.update(len(batch.prompts))
            bar.set_postfix({site: f"{run.figures.get('fvu', 0):.3f}" for site, run in runs.items()})
            if done // config.checkpoint_every > batch.first_image // config.checkpoint_every:
                for run in runs.values():
                    run.save(done)
            if done >= config.images:
                break
    return {site: run.finished() for site, run in runs.items()}


def _first_steps(pipe: Any, batch: StreamBatch, config: StreamingConfig, call: Mapping[str, Any]) -> StreamBatch:
    """The first step of other noises for the prompts of a batch."""
    prompts = batch.prompts * config.first_steps
    seed = config.seed + FURTHER + batch.first_image * config.first_steps
    sites = list(batch.sites)
    return next(
        stream_activations(pipe, sites, prompts, batch_size=len(prompts), seed=seed, first_step_only=True, **call)
    )


def timestep_weights(rows: torch.Tensor) -> torch.Tensor:
    """One over the variance of each timestep, for rows `(T, images, P, d)`, as `(T, images, P, 1)`."""
    variance = rows.flatten(1, 2).var(1).sum(-1)  # (T,)
    weights = variance.mean() / variance.clamp(min=1e-12)
    return weights[:, None, None, None].expand_as(rows[..., :1])


class _SiteRun:
    """One site's buffer, trainer and checkpoint."""

    def __init__(
        self,
        site: str,
        make: Callable[[int], SparseAutoencoder],
        config: StreamingConfig,
        folder: Path,
        training: dict[str, Any],
        trained: bool,
    ) -> None:
        self.site, self._make, self._config, self._training, self._trained = site, make, config, training, trained
        self._hardness: torch.Tensor | None = None
        self._checkpoint, self._log = folder / f"{site}.pt", folder / f"{site}.jsonl"
        self.trainer: SAETrainer | None = None
        self.figures: dict[str, float] = {}
        self._owed = 0.0

    def saved_position(self) -> int:
        """Images that the checkpoint had seen; 0 if there is none."""
        return SAETrainer.position(self._checkpoint)["images"] if self._checkpoint.exists() else 0

    def feed(self, rows: torch.Tensor, further: torch.Tensor) -> None:
        """Take one batch of rows `(T, images, P, d)` in and make the steps that are due for it.

        `further (1, noises, P, d)` are more of the first timestep, whose weight all of them share; `(0, ...)` if none.
        """
        config, count = self._config, rows[..., 0].numel() + further[..., 0].numel()
        if self.trainer is None:
            self._buffer = ShuffleBuffer(config.buffer, rows.shape[-1] + 1)
            total = config.images * count / rows.shape[1] * config.reuse / config.rows
            settings = TrainingConfig(steps=int(total), batch_size=config.rows, **self._training)
            sample = rows.flatten(0, 2)[:: max(1, rows[..., 0].numel() // config.buffer)]
            self.trainer = SAETrainer(self._make(rows.shape[-1]), settings, sample, trained=self._trained)
            if self._checkpoint.exists():
                self.trainer.restore(self._checkpoint)
        weights = timestep_weights(rows) if config.balance else torch.ones_like(rows[..., :1])
        if config.emphasis:
            weights = weights * self._emphasis(rows)[:, None, None, None]
        shared = weights[:1] * rows.shape[1] / (rows.shape[1] + further.shape[1] * len(further))
        self._buffer.add(torch.cat([rows, torch.cat([shared, weights[1:]])], -1))
        self._buffer.add(torch.cat([further, shared[: len(further), :1, :, :].expand_as(further[..., :1])], -1))
        self._owed += count * config.reuse / config.rows
        while self._owed >= 1 and self.trainer.step_count < self.trainer.config.steps:
            sample = self._buffer.sample(config.rows)
            self.figures = self.trainer.step(sample[:, :-1], sample[:, -1])
            self._owed -= 1

    @torch.no_grad()
    def _emphasis(self, rows: torch.Tensor) -> torch.Tensor:
        """How much each timestep counts, `(T,)`, by its FVU over the last batches or so."""
        assert self.trainer is not None
        sae, x = self.trainer.sae, rows.flatten(1, 2)[:, ::4] * self.trainer.scale
        lost = torch.stack([(step - sae(step)).square().sum() for step in x])
        fvu = lost / (x - x.mean(1, keepdim=True)).square().sum((1, 2))
        self._hardness = fvu if self._hardness is None else torch.lerp(self._hardness, fvu, 0.1)
        return (self._hardness / self._hardness.mean()) ** self._config.emphasis

    def finished(self) -> SparseAutoencoder:
        """The trained SAE; the checkpoint's, if that had seen all images."""
        if self.trainer is None:
            self.trainer = SAETrainer.from_checkpoint(self._checkpoint, self._make)
        return self.trainer.finish()

    def save(self, images: int) -> None:
        assert self.trainer is not None
        self.trainer.save(self._checkpoint, images=images)
        with self._log.open("a") as log:
            log.write(json.dumps({"images": images, **self.figures}) + "\n")
