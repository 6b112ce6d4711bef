"""`diffusers-sae train`: an SAE from a store of activations."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from .call_option import check_seed
from .configs import RECORD, Config, read_record, record
from .extras import advise_install
from .files import check_output_folder

SAME = ("latents", "training", "kind", "k", "seed", "held_out")
"""What a run cannot change when it goes on."""
OF_A_SCALE = ("steps", "batch_size", "dead_after")
"""Settings that a scale sets."""


def train(
    ctx: typer.Context,
    store: Annotated[Path, typer.Argument(help="Folder of one site that `capture` made.")],
    out: Annotated[Path, typer.Option(help="Folder for the SAE; the checkpoint and the log lie in training/.")],
    scale: Annotated[str | None, typer.Option(help="Sizes for a run of 1s, 10s, 1m, 10m, 1h or 10h.")] = None,
    latents: Annotated[int | None, typer.Option(help="Latents of the SAE; by default the scale's.")] = None,
    kind: Annotated[str, typer.Option(help="topk, batchtopk, matryoshka, relu, jumprelu or gated.")] = "topk",
    k: Annotated[int, typer.Option(help="Active latents of a row: topk, batchtopk, matryoshka.")] = 32,
    sparsity: Annotated[
        float | None, typer.Option(help="Weight of the penalty: relu, jumprelu, gated; 1 by default.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps, without a scale.")] = 5000,
    rows: Annotated[int | None, typer.Option(help="Rows per step, without a scale; 2048 by default.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak rate; 0.008 by default.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adam by default; adafactor takes less memory.")] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Of TopK's search: float32, bfloat16, or by default auto, which depends on the hardware."),
    ] = None,
    ema: Annotated[float | None, typer.Option(help="Average the weights, keeping this much per step.")] = None,
    dead_after: Annotated[
        int | None,
        typer.Option(help="Rows without firing after which a latent is dead; 100000, or a tenth of a shorter run."),
    ] = None,
    resample_every: Annotated[int | None, typer.Option(help="Steps between resamplings of dead latents.")] = None,
    held_out: Annotated[int, typer.Option(help="Last shards that are kept for the figures.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the first weights and the order of the rows.")] = 0,
    tracker: Annotated[str | None, typer.Option(help="A tracker of accelerate: tensorboard, wandb, ...")] = None,
    config: Config = None,
) -> None:
    """Train an SAE, measure it on rows held out, and write both. Stopped, it goes on where it was."""
    from ..capture import ActivationStore
    from ..evaluation.reconstruction import measure_on_store
    from ..saes import ARCHITECTURES, BatchTopKSAE, TopKSAE
    from ..training import SCALES, TrainingConfig, train_on_store
    from ..training.memory import keep_freed_memory
    from ..training.objectives import trainable
    from ..training.processes import make_accelerator, run_in_main

    trained = {name: cls for name, cls in ARCHITECTURES.items() if trainable(cls) and cls.rows_apart}
    kinds = {name.removesuffix("SAE").lower(): cls for name, cls in trained.items()}
    if kind not in kinds:
        raise InputError(f"{kind!r} is not a kind of SAE; choose from {', '.join(kinds)}.")
    if latents is None and scale is None:
        raise InputError("Neither latents nor a scale is given; pass --latents 5120, or --scale 1m.")
    if latents is not None and latents < 1:
        raise InputError(f"latents={latents} must be at least 1.")
    check_seed(seed)
    _check_tracker(tracker)
    check_output_folder(out)
    given: dict[str, Any] = {
        "batch_size": rows,
        "lr": lr,
        "dead_after": dead_after,
        "sparsity": sparsity,
        "ema": ema,
        "resample_every": resample_every,
        "optimizer": optimizer,
        "precision": precision,
    }
    try:
        settings = TrainingConfig(steps, **{name: value for name, value in given.items() if value is not None})
    except InputError as error:
        raise InputError(str(error).replace("batch_size", "rows")) from None
    _check_store(store)
    activations = ActivationStore(store)
    shards = len(activations.shard_rows)
    if not 0 < held_out < shards:
        raise InputError(f"held_out={held_out} must be at least 1 and less than the {shards} shards of {store}.")
    cls: Any = kinds[kind]
    own = {"k": k} if issubclass(cls, (TopKSAE, BatchTopKSAE)) else {}
    if scale in SCALES:
        _refuse_idle(ctx, f"scale={scale}", ("steps", "rows"))
    seen, unseen = activations.part(stop=-held_out), activations.part(start=-held_out)
    _check_sizes(cls, own, latents, seen, unseen, None if scale else settings.batch_size)
    manifest = activations.manifest
    provenance = {
        "site": manifest["site"],
        "base_model": manifest["model"]["name"],
        "scheduler": manifest["scheduler"],
        **manifest["call"],
        "branch": ", ".join(manifest["config"]["branches"]),
        "tokens": manifest["config"].get("tokens"),
        "training_images": sum(shard["images"] for shard in manifest["shards"][:-held_out]),
    }
    keep_freed_memory()
    accelerator = make_accelerator(log_with=tracker, project_dir=out / "training" / "tracker" if tracker else None)
    sizes = partial(_settle, ctx, out / "training", scale, latents, settings, seen, partial(cls, **own), accelerator)
    run_in_main(accelerator, sizes)
    told = read_record(out / "training")
    latents, settings = told["latents"], TrainingConfig(**told["training"])
    if tracker:
        accelerator.init_trackers("diffusers-sae", config={"latents": latents, "kind": kind, **asdict(settings)})
    try:
        sae = train_on_store(
            seen,
            lambda width: cls(width, latents, **own, provenance=provenance),
            out / "training",
            settings,
            seed=seed,
            accelerator=accelerator,
        )
    except FloatingPointError as error:
        raise InputError(
            f"{error} The rate was {settings.lr:g}: pass a lower --lr, and another --out or delete {out / 'training'}."
        ) from error
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    figures, statistics = measure_on_store(sae, unseen)
    sae.statistics = statistics
    sae.save_pretrained(out, figures=figures)
    typer.echo(
        f"{_fvu_in_words(figures)}, L0 {figures['l0']:.1f}, "
        f"dead {figures['dead']:.1%} on {figures['rows']:,} rows held out: {out}"
    )


def _check_store(folder: Path) -> None:
    """Raise `InputError` if the folder is not of one site but of a whole capture, which has one in it for each."""
    from ..capture.store import MANIFEST

    inside = sorted(str(file.parent) for file in folder.glob(f"*/{MANIFEST}"))
    if inside and not (folder / MANIFEST).exists():
        raise InputError(
            f"{folder} is the folder of a whole capture; pass the folder of a site in it: {', '.join(inside)}."
        )


def _check_tracker(name: str | None) -> None:
    """Raise `InputError` unless accelerate has this tracker and its package is there; it would be passed over."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name is None:
        return
    if name not in LOGGER_TYPE_TO_CLASS:
        raise InputError(f"{name!r} is not a tracker; choose from {', '.join(LOGGER_TYPE_TO_CLASS)}.")
    if name not in [str(getattr(each, "value", each)) for each in get_available_trackers()]:
        raise InputError(f"The tracker {name} is not installed; {advise_install(name)}.")


def _check_sizes(cls: Any, own: dict[str, Any], latents: int | None, seen: Any, unseen: Any, rows: int | None) -> None:
    """Raise `InputError` unless the stores have rows enough, and such an SAE can be made; none is."""
    import torch

    if len(unseen) == 0:
        raise InputError(f"The shards of {unseen.folder} that are held out have no rows; pass a larger --held-out.")
    if rows is not None and len(seen) < rows:
        raise InputError(
            f"{seen.folder} has {len(seen)} rows beside those held out, fewer than the {rows} of a step; store more "
            "rows, or pass fewer --rows."
        )
    if latents is not None:
        with torch.device("meta"):
            cls(seen.width, latents, **own)


def _fvu_in_words(figures: Mapping[str, Any]) -> str:
    """The FVU of all rows and of the worst timestep; rows that are all the same have none."""
    if math.isnan(figures["fvu"]):
        return "FVU undefined, as the rows held out are all the same"
    by_timestep = figures["fvu_by_timestep"].values()
    defined = [fvu for fvu in by_timestep if not math.isnan(fvu)]
    if len(by_timestep) == 1:
        return f"FVU {figures['fvu']:.4f}"
    worst = f"worst timestep {max(defined):.4f}" if defined else "undefined by timestep, as each has equal rows"
    return f"FVU {figures['fvu']:.4f} ({worst})"


def _refuse_idle(ctx: typer.Context, choice: str, options: tuple[str, ...]) -> None:
    """Raise `InputError` if one of `options` is given, which do nothing beside `choice`."""
    for name in options:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            raise InputError(f"{name}={ctx.params[name]} does nothing with {choice}; leave one of them out.")


def _settle(
    ctx: typer.Context,
    folder: Path,
    scale: str | None,
    latents: int | None,
    settings: Any,
    seen: Any,
    make_sae: partial,
    accelerator: Any,
) -> None:
    """Record the sizes of the run. One that has a checkpoint keeps a scale's sizes, since timing anew gives others."""
    from ..capture.descriptions import refuse_differences
    from ..disk import hold_folder
    from ..training import sizes_for
    from ..training.checkpoints import CHECKPOINT
    from ..training.precision import resolve_precision
    from ..training.processes import check_processes

    begun = _read_begun(folder) if (folder / CHECKPOINT).exists() else None
    if begun is not None and settings.precision == "auto":
        settings = replace(settings, precision=begun["training"].get("precision", "auto"))
    settings = replace(settings, precision=resolve_precision(settings.precision, accelerator.device))
    if begun is not None and scale is not None and begun["scale"] == scale:
        latents = begun["latents"] if latents is None else latents
        settings = replace(settings, **{name: begun["training"][name] for name in OF_A_SCALE})
    elif scale is not None:
        latents, settings = sizes_for(scale, seen, make_sae, settings, latents)
    check_processes(settings.batch_size, accelerator)
    asked = {**ctx.params, "latents": latents, "training": asdict(settings)}
    same = [name for name in SAME if name != "k" or "k" in make_sae.keywords]
    if begun is not None:
        there, here = ({name: values[name] for name in same} for values in (begun, asked))
        refuse_differences(there, here, str(folder), RECORD, "choose another folder, or delete it")
    with hold_folder(folder):
        record(ctx, folder, latents=latents, training=asdict(settings), processes=accelerator.num_processes)


def _read_begun(folder: Path) -> dict[str, Any]:
    """The record of the run that a checkpoint is of; raises `InputError` if it lacks what is compared."""
    begun = read_record(folder)
    training = begun.get("training")
    missing = [name for name in ("scale", *SAME) if name not in begun]
    missing += [name for name in OF_A_SCALE if not isinstance(training, dict) or name not in training]
    if missing:
        raise InputError(f"{folder / RECORD} does not say {', '.join(missing)}; delete {folder} to begin anew.")
    return begun
