"""One picture of an SAE: how it was trained, how well it reconstructs, how its latents fire."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..loaders import load_sae
from ..saes import LatentStatistics


def draw_sae(folder: Path, path: Path) -> dict[str, Any]:
    """Draw what lies in an SAE's folder (log, figures, statistics) as a PNG; returns the figures.

    Raises `InputError` if the folder holds no SAE, or nothing beside it that could be drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sae = load_sae(folder)
    statistics = sae.statistics
    log, held_out = folder / "training" / "log.jsonl", folder / "held_out.json"
    told: dict[str, Any] = {"kind": type(sae).__name__, "latents": sae.n_latents, "width": sae.d_in}
    panels: list[Callable[[Any], None]] = []
    if log.is_file():
        panels.append(partial(_draw_training, steps=[json.loads(line) for line in log.read_text().splitlines()]))
    if held_out.is_file():
        figures = json.loads(held_out.read_text())
        told |= {key: value for key, value in figures.items() if key not in ("fvu_by_timestep", "density")}
        panels.append(partial(_draw_timesteps, figures=figures))
    if statistics is not None:
        told["never_fired"] = int(statistics.dead.sum())
        panels += [partial(_draw_density, statistics=statistics), partial(_draw_firing, statistics=statistics)]
    if not panels:
        raise InputError(f"{folder} holds an SAE alone; diffusers-sae train writes figures and statistics beside it.")
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4), layout="constrained", squeeze=False)
    words = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in told.items())
    figure.suptitle(f"{folder.name}: {', '.join(words)}", fontsize=11)
    for axis, draw in zip(axes[0], panels, strict=True):
        draw(axis)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return told


def _draw_training(axis: Any, steps: list[dict[str, float]]) -> None:
    axis.set(title="training", xlabel="step", ylabel="FVU of the batch", yscale="log")
    axis.plot([s["step"] for s in steps], [s["fvu"] for s in steps], lw=1, color="tab:blue")
    dead = axis.twinx()
    dead.plot([s["step"] for s in steps], [100 * s["dead"] for s in steps], lw=1, color="tab:red")
    dead.set_ylim(bottom=0)
    dead.set_ylabel("dead latents, %", color="tab:red")


def _draw_timesteps(axis: Any, figures: dict[str, Any]) -> None:
    by_timestep = figures["fvu_by_timestep"]
    axis.set(title="held-out rows", xlabel="timestep, from noise to image", ylabel="FVU")
    axis.plot([float(t) for t in by_timestep], list(by_timestep.values()), marker="o", ms=3, label="by timestep")
    axis.axhline(figures["fvu"], ls="--", lw=1, color="grey", label="pooled")
    axis.set_ylim(bottom=0)
    axis.invert_xaxis()
    axis.legend()


def _draw_density(axis: Any, statistics: LatentStatistics) -> None:
    axis.set(title="how often latents fire", xlabel="share of rows, log10", ylabel="latents")
    axis.hist(statistics.rate.mean(0)[~statistics.dead].log10().numpy(), bins=50)


def _draw_firing(axis: Any, statistics: LatentStatistics) -> None:
    """A line for each latent that fires: its rate over its highest one, early latents above late ones."""
    rate = statistics.rate[:, ~statistics.dead]
    share = rate / rate.amax(0)
    when = (share * torch.arange(len(share))[:, None]).sum(0) / share.sum(0)
    axis.imshow(share[:, when.argsort()].T.numpy(), aspect="auto", interpolation="nearest", cmap="magma")
    axis.set(title="when latents fire", xlabel="timestep, from noise to image", ylabel="latents, early above late")
    ticks = torch.linspace(0, len(share) - 1, min(4, len(share))).round().long().tolist()
    axis.set_xticks(ticks, [f"{statistics.timesteps[i]:.0f}" for i in ticks])
