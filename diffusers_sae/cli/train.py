"""`diffusers-sae train`: an SAE from a store of activations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def train(
    store: Annotated[Path, typer.Argument(help="Folder of one site that `capture` made.")],
    out: Annotated[Path, typer.Option(help="Folder for the SAE; the checkpoint and the log lie in training/.")],
    latents: Annotated[int, typer.Option(help="Latents of the SAE.")],
    kind: Annotated[str, typer.Option(help="topk, batchtopk, matryoshka, relu, jumprelu or gated.")] = "topk",
    k: Annotated[int, typer.Option(help="Active latents of a row: topk, batchtopk, matryoshka.")] = 32,
    sparsity: Annotated[float, typer.Option(help="Weight of the penalty: relu, jumprelu, gated.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 5000,
    rows: Annotated[int, typer.Option(help="Rows a step.")] = 2048,
    lr: Annotated[float, typer.Option(help="Peak rate of Adam.")] = 4e-3,
    held_out: Annotated[int, typer.Option(help="Last shards that are kept for the figures.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the first weights and the order of the rows.")] = 0,
) -> None:
    """Train an SAE, measure it on rows held out, and write both. Stopped, it goes on where it was."""
    from ..capture import ActivationStore
    from ..checksums import write_checksums
    from ..errors import InputError
    from ..evaluation.reconstruction import measure_on_store
    from ..saes import ARCHITECTURES, BatchTopKSAE, TopKSAE
    from ..training import TrainingConfig, train_on_store
    from ..training.objectives import trainable

    kinds = {name.removesuffix("SAE").lower(): cls for name, cls in ARCHITECTURES.items() if trainable(cls)}
    if kind not in kinds:
        raise InputError(f"{kind!r} is not a kind of SAE; choose from {', '.join(kinds)}.")
    activations = ActivationStore(store)
    shards = len(activations.shard_rows)
    if not 0 < held_out < shards:
        raise InputError(f"held_out={held_out} must be at least 1 and less than the {shards} shards of {store}.")
    cls: Any = kinds[kind]
    own = {"k": k} if issubclass(cls, (TopKSAE, BatchTopKSAE)) else {}
    manifest = activations.manifest
    provenance = {
        "site": manifest["site"],
        "base_model": manifest["model"]["name"],
        "scheduler": manifest["scheduler"],
        **manifest["call"],
        "branch": ", ".join(manifest["config"]["branches"]),
        "training_images": sum(shard["images"] for shard in manifest["shards"][:-held_out]),
    }
    sae = train_on_store(
        activations.part(stop=-held_out),
        lambda width: cls(width, latents, **own, provenance=provenance),
        out / "training",
        TrainingConfig(steps=steps, batch_size=rows, lr=lr, sparsity=sparsity),
        seed=seed,
    )
    figures, statistics = measure_on_store(sae, activations.part(start=-held_out))
    sae.save_pretrained(out)
    statistics.save(out)
    (out / "held_out.json").write_text(json.dumps(figures, indent=1) + "\n")
    write_checksums(out)
    worst = max(figures["fvu_by_timestep"].values())  # type: ignore[attr-defined]
    typer.echo(
        f"FVU {figures['fvu']:.4f} (worst timestep {worst:.4f}), L0 {figures['l0']:.1f}, "
        f"dead {figures['dead']:.1%} on {figures['rows']:,} rows held out: {out}"
    )
