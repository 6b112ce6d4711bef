"""Training several SAEs, at one site or more, in one pass over a generating pipeline; only checkpoints are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..capture import StreamBatch, stream_activations
from ..capture.descriptions import (
    checked_prompts,
    describe_call,
    describe_pipeline,
    describe_prompts,
)
from ..disk import hold_folder
from ..errors import InputError
from ..saes import SparseAutoencoder
from .checkpoints import CHECKPOINT, check_contents, check_run, read_checkpoint, write_checkpoint
from .config import TrainingConfig
from .site_training import SAERun, SiteTraining
from .streaming_config import StreamingConfig

FURTHER = 2**40
"""How far the seeds of further noises lie from those of the images."""


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
    runs: dict[str, dict[str, SAERun]] = {}  # by site and name
    for name, sae in saes.items():
        asked = sae if isinstance(sae, StreamedSAE) else StreamedSAE(name, sae)
        own = {**(training or {}), **asked.training}
        _checked_training(own, config)
        runs.setdefault(asked.site, {})[name] = SAERun(folder / f"{name}.jsonl", asked.make, own, trained)
    sites = {site: SiteTraining(site, each, config) for site, each in runs.items()}
    with hold_folder(folder):
        description = _describe(pipe, runs, wanted, config, trained, call)
        first = _restore(folder / CHECKPOINT, sites, description)
        _train(pipe, sites, wanted, config, folder, first, description, call)
    return {name: runs[site][name].finished() for site in runs for name in runs[site]}


def _train(
    pipe: Any,
    sites: Mapping[str, SiteTraining],
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
    runs: Mapping[str, Mapping[str, SAERun]],
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


def _restore(checkpoint: Path, sites: Mapping[str, SiteTraining], description: Mapping[str, Any]) -> int:
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
