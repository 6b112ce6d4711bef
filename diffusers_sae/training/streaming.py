"""Training several SAEs, at one site or more, in one pass over a generating pipeline; only checkpoints are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..capture import ShuffleBuffer, StreamBatch, stream_activations
from ..capture.descriptions import (
    checked_prompts,
    describe_call,
    describe_pipeline,
    describe_prompts,
    digest_weights,
    refuse_differences,
)
from ..disk import append_to_log, cut_log, hold_folder
from ..errors import InputError
from ..ranges import Range, check_ranges
from ..saes import SparseAutoencoder
from ..saes.precision import NO_SPREAD
from .checkpoints import CHECKPOINT, DELETE, check_contents, check_run, read_checkpoint, write_checkpoint
from .config import COUNT, POSITIVE, TrainingConfig
from .losses import fraction_of_variance_unexplained
from .trainer import SAETrainer

FURTHER = 2**40
"""How far the seeds of further noises lie from those of the images."""
RANGES = {
    "images": COUNT,
    "batch_size": COUNT,
    "rows": Range(2, whole=True),
    "reuse": POSITIVE,
    "buffer": COUNT,
    "emphasis": Range(0),
    "first_steps": Range(0, whole=True),
    "checkpoint_every": COUNT,
    "seed": Range(whole=True),
}


@dataclass(frozen=True)
class StreamingConfig:
    """How a stream feeds the trainers.

    Args:
        images: images to generate; the run ends after them.
        batch_size: images generated at a time.
        rows: rows of an optimiser step.
        reuse: how often a row is drawn, on average.
        buffer: rows that each site's shuffle buffer holds, at least `rows`. A batch of images that gives more goes
            through it in parts, with training steps in between: each part holds all timesteps at a random choice of
            images and places, so that every row comes in and every timestep is trained on alike.
        branch: guidance branch whose rows are learned.
        balance: whether rows are weighted by one over the variance of their timestep, so that every timestep counts
            alike; timesteps whose rows are all the same in a batch have the weight 1.
        emphasis: power of a timestep's FVU, over the mean one, that its weight is multiplied by; above 0, timesteps
            that are hard to reconstruct count more.
        first_steps: how many further noises of each prompt go through the first step alone. What a site holds of pure
            noise is the most varied, and such rows cost one step.
        checkpoint_every: images between checkpoints.
        seed: image i starts from the noise of seed `seed + i`.

    Raises:
        InputError: if a setting has a value that it may not have.
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

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        if self.buffer < self.rows:
            raise InputError(f"buffer={self.buffer} holds fewer rows than a step takes (rows={self.rows}); raise it.")


@dataclass(frozen=True)
class StreamedSAE:
    """One of the SAEs of a pass.

    Args:
        site: whose activations it learns.
        make: function of the width that gives a new SAE, or a trained one to go on with.
        training: arguments of `TrainingConfig` that are its own.
    """

    site: str
    make: Callable[[int], SparseAutoencoder]
    training: Mapping[str, Any] = field(default_factory=dict)


def train_on_stream(
    pipe: Any,
    saes: Mapping[str, StreamedSAE | Callable[[int], SparseAutoencoder]],
    prompts: Iterable[str],
    config: StreamingConfig,
    folder: Path,
    *,
    training: Mapping[str, Any] | None = None,
    trained: bool = False,
    **call: Any,
) -> dict[str, SparseAutoencoder]:
    """Train SAEs on the activations of `config.images` generated images, all of them in one pass.

    SAEs of the same site share its shuffle buffer and see the same rows in the same order. The plan rests: activations
    are those of the unsteered model.

    Args:
        saes: `{name: SAE}`; for one SAE a site, `{site: function of the width that gives it}` will do.
        trained: whether the SAEs are trained already.
        prompts: at least `config.images` prompts, of which the first are taken.
        folder: the checkpoint, and the log of each SAE. A run that was stopped, by whatever means, goes on from the
            checkpoint and, on the CPU with as many threads, ends with the bits of one that was not. A checkpoint of
            another run is refused: of other SAEs, settings, prompts or arguments, or of another pipeline.
        training: arguments of `TrainingConfig` other than the numbers of steps and rows, for all.
        call: goes to the pipeline (`num_inference_steps`, `guidance_scale`, ...).

    Raises:
        InputError: if a setting is none, the checkpoint is another run's, there are too few prompts or rows, or a site
            held numbers that are not finite; the checkpoint is then as it was.
        FloatingPointError: if a loss is not finite although the rows are.
    """
    wanted = checked_prompts(prompts, config.images)
    folder = Path(folder)
    runs: dict[str, dict[str, _Run]] = {}  # by site and name
    for name, sae in saes.items():
        asked = sae if isinstance(sae, StreamedSAE) else StreamedSAE(name, sae)
        own = {**(training or {}), **asked.training}
        _checked_training(own, config)
        runs.setdefault(asked.site, {})[name] = _Run(folder / f"{name}.jsonl", asked.make, own, trained)
    sites = {site: _Site(site, each, config) for site, each in runs.items()}
    with hold_folder(folder):
        description = _describe(pipe, runs, wanted, config, trained, call)
        first = _restore(folder / CHECKPOINT, sites, description)
        _train(pipe, sites, wanted, config, folder, first, description, call)
    return {name: runs[site][name].finished() for site in runs for name in runs[site]}


def _train(
    pipe: Any,
    sites: Mapping[str, _Site],
    prompts: list[str],
    config: StreamingConfig,
    folder: Path,
    first: int,
    description: Mapping[str, Any],
    call: Mapping[str, Any],
) -> None:
    """Train on all images from `first` on, with logs and checkpoints."""
    runs = {name: run for site in sites.values() for name, run in site.runs.items()}
    for run in runs.values():
        run.cut_log(first)
    stream = stream_activations(
        pipe, list(sites), prompts, batch_size=config.batch_size, seed=config.seed, skip=first, **call
    )
    with tqdm(total=config.images, initial=first, desc="images", mininterval=5) as bar:
        for batch in stream:
            done = batch.first_image + len(batch.prompts)
            further = _first_steps(pipe, batch, config, call) if config.first_steps else None
            for path, site in sites.items():
                rows, _ = batch.rows(path, config.branch)  # (T, images, P, d)
                site.feed(rows, further.rows(path, config.branch)[0] if further else rows[:0])
            bar.update(len(batch.prompts))
            bar.set_postfix({name: f"{run.figures.get('fvu', 0):.3f}" for name, run in runs.items()})
            due = done // config.checkpoint_every > batch.first_image // config.checkpoint_every
            if due or done == config.images:
                for run in runs.values():  # before the checkpoint: what a kill leaves of it is cut
                    run.log(done)
                state = {path: site.state_dict() for path, site in sites.items()}
                write_checkpoint(folder / CHECKPOINT, {"run": description, "images": done, "sites": state})


def _checked_training(training: Mapping[str, Any], config: StreamingConfig) -> None:
    """Raise `InputError` if these are no arguments of `TrainingConfig`, before anything is generated."""
    known = {each.name for each in fields(TrainingConfig)} - {"steps", "batch_size"}
    if unknown := set(training) - known:
        raise InputError(f"training has {', '.join(sorted(unknown))}; choose from {', '.join(sorted(known))}.")
    TrainingConfig(steps=1, batch_size=config.rows, **training)


def _describe(
    pipe: Any,
    runs: Mapping[str, Mapping[str, _Run]],
    prompts: list[str],
    config: StreamingConfig,
    trained: bool,
    call: Mapping[str, Any],
) -> dict[str, Any]:
    """What, besides the trainers' settings, two runs must have in common for one to go on where the other stopped."""
    streaming = asdict(config)
    del streaming["checkpoint_every"]
    return {
        "config": streaming,
        "saes": {path: sorted(each) for path, each in runs.items()},
        "trained": trained,
        "prompts": describe_prompts(prompts),
        "call": describe_call(call, config.images),
        "model": describe_pipeline(pipe),
    }


def _restore(checkpoint: Path, sites: Mapping[str, _Site], description: Mapping[str, Any]) -> int:
    """Go on from the checkpoint, if there is one; returns how many images it has seen."""
    state = read_checkpoint(checkpoint)
    if state is None:
        return 0
    check_run(state, description, checkpoint, ("images", "sites"))
    check_contents(state["sites"], list(sites), str(checkpoint))
    for path, site in sites.items():
        site.load_state_dict(state["sites"][path])
    return state["images"]


def _first_steps(pipe: Any, batch: StreamBatch, config: StreamingConfig, call: Mapping[str, Any]) -> StreamBatch:
    """The first step of other noises for the prompts of a batch."""
    prompts = batch.prompts * config.first_steps
    seed = config.seed + FURTHER + batch.first_image * config.first_steps
    sites = list(batch.sites)
    return next(
        stream_activations(pipe, sites, prompts, batch_size=len(prompts), seed=seed, first_step_only=True, **call)
    )


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


class _Run:
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


class _Site:
    """One site's shuffle buffer and the SAEs that learn from it."""

    def __init__(self, path: str, runs: Mapping[str, _Run], config: StreamingConfig) -> None:
        self.path, self.runs, self._config = path, dict(runs), config
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
                f"images={config.images} give {config.images * count // rows.shape[1]} rows of {self.path}, too few "
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
                f"{self.path} held numbers that are not finite at step {step}; run the pipeline in fp32 or bfloat16."
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
