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
from ..site_mapping import distinct_sites
from ..sites import Site
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

    site: Site | str
    make: Callable[[int], SparseAutoencoder]
    training: Mapping[str, Any] = field(default_factory=dict)


def train_on_stream(
    pipe: Any,
    saes: Mapping[Any, StreamedSAE | Callable[[int], SparseAutoencoder]],
    prompts: Iterable[str],
    config: StreamingConfig,
    folder: Path,
    *,
    training: Mapping[str, Any] | None = None,
    trained: bool = False,
    **call: Any,
) -> dict[Any, SparseAutoencoder]:
    """Train SAEs on the activations of `config.images` generated images, all of them in one pass.

    SAEs of the same site share its shuffle buffer and see the same rows in the same order. The plan rests: activations
    are those of the unsteered model.

    Args:
        saes: `{name: SAE}`; for one SAE per site, `{site: function of the width that gives it}` will do. What is
            returned has the same keys, and the log of each SAE its name, or the text of its site.
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
    asked = _named(saes)
    runs: dict[Site, dict[str, SAERun]] = {}  # by site and name
    for name, sae in asked.values():
        own = {**(training or {}), **sae.training}
        _checked_training(own, config)
        runs.setdefault(Site.of(sae.site), {})[name] = SAERun(folder / f"{name}.jsonl", sae.make, own, trained)
    sites = {site: SiteTraining(site, each, config) for site, each in runs.items()}
    with hold_folder(folder):
        description = _describe(pipe, runs, wanted, config, trained, call)
        first = _restore(folder / CHECKPOINT, sites, description)
        _train(pipe, sites, wanted, config, folder, first, description, call)
    return {key: runs[Site.of(sae.site)][name].finished() for key, (name, sae) in asked.items()}


def _named(saes: Mapping[Any, Any]) -> dict[Any, tuple[str, StreamedSAE]]:
    """`{key: (name, SAE)}`; raises `InputError` if two SAEs have one name, or a site is a key twice."""
    distinct_sites(key for key, sae in saes.items() if not isinstance(sae, StreamedSAE))
    named: dict[Any, tuple[str, StreamedSAE]] = {}
    for key, sae in saes.items():
        given = sae if isinstance(sae, StreamedSAE) else StreamedSAE(Site.of(key), sae)
        if str(key) in [name for name, _ in named.values()]:
            raise InputError(f"Two SAEs are named {str(key)!r}; give each a name of its own.")
        named[key] = str(key), given
    return named


def _train(
    pipe: Any,
    sites: Mapping[Site, SiteTraining],
    prompts: list[str],
    config: StreamingConfig,
    folder: Path,
    first: int,
    description: Mapping[str, Any],
    call: Mapping[str, Any],
) -> None:
    """Train on all images from `first` on, with logs and checkpoints."""
    runs = {name: run for own in sites.values() for name, run in own.runs.items()}
    for run in runs.values():
        run.cut_log(first)
    stream = stream_activations(
        pipe, list(sites), prompts, batch_size=config.batch_size, seed=config.seed, skip=first, **call
    )
    with tqdm(total=config.images, initial=first, desc="images", mininterval=5) as bar:
        for batch in stream:
            done = batch.first_image + len(batch.prompts)
            further = _first_steps(pipe, batch, config, call) if config.first_steps else None
            for site, own in sites.items():
                rows, _ = batch.rows(site, config.branch)  # (T, images, P, d)
                own.feed(rows, further.rows(site, config.branch)[0] if further else rows[:0])
            bar.update(len(batch.prompts))
            bar.set_postfix({name: f"{run.figures.get('fvu', 0):.3f}" for name, run in runs.items()})
            due = done // config.checkpoint_every > batch.first_image // config.checkpoint_every
            if due or done == config.images:
                for run in runs.values():  # before the checkpoint: what a kill leaves of it is cut
                    run.log(done)
                state = {str(site): own.state_dict() for site, own in sites.items()}
                write_checkpoint(folder / CHECKPOINT, {"run": description, "images": done, "sites": state})


def _checked_training(training: Mapping[str, Any], config: StreamingConfig) -> None:
    """Raise `InputError` if these are no arguments of `TrainingConfig`, before anything is generated."""
    known = {each.name for each in fields(TrainingConfig)} - {"steps", "batch_size"}
    if unknown := set(training) - known:
        raise InputError(f"training has {', '.join(sorted(unknown))}; choose from {', '.join(sorted(known))}.")
    TrainingConfig(steps=1, batch_size=config.rows, **training)


def _describe(
    pipe: Any,
    runs: Mapping[Site, Mapping[str, SAERun]],
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
        "saes": {str(site): sorted(each) for site, each in runs.items()},
        "trained": trained,
        "prompts": describe_prompts(prompts),
        "call": describe_call(call, config.images),
        "model": describe_pipeline(pipe),
    }


def _restore(checkpoint: Path, sites: Mapping[Site, SiteTraining], description: Mapping[str, Any]) -> int:
    """Go on from the checkpoint, if there is one; returns how many images it has seen."""
    state = read_checkpoint(checkpoint)
    if state is None:
        return 0
    check_run(state, description, checkpoint, ("images", "sites"))
    check_contents(state["sites"], [str(site) for site in sites], str(checkpoint))
    for site, own in sites.items():
        own.load_state_dict(state["sites"][str(site)])
    return state["images"]


def _first_steps(pipe: Any, batch: StreamBatch, config: StreamingConfig, call: Mapping[str, Any]) -> StreamBatch:
    """The first step of other noises for the prompts of a batch."""
    prompts = batch.prompts * config.first_steps
    seed = config.seed + FURTHER + batch.first_image * config.first_steps
    sites = list(batch.sites)
    return next(
        stream_activations(pipe, sites, prompts, batch_size=len(prompts), seed=seed, first_step_only=True, **call)
    )
