"""One picture of an SAE: how it was trained, how well it reconstructs, how its latents fire."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..disk import write_whole
from ..errors import InputError
from ..loaders import load_sae
from ..saes import LatentStatistics


def draw_sae(folder: Path, path: Path) -> dict[str, Any]:
    """Draw what lies in an SAE's folder (log, figures, statistics), as what the path ends in; returns the figures.

    Raises `InputError` if the folder holds no SAE, or nothing beside it that could be drawn, or what lies there cannot
    be read, or there is no such format of pictures.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise InputError(f"{path} ends in no format of pictures; choose from {', '.join(sorted(known))}.")
    sae = load_sae(folder)
    statistics = sae.statistics
    log, held_out = folder / "training" / "log.jsonl", folder / "held_out.json"
    told: dict[str, Any] = {"kind": type(sae).__name__, "latents": sae.n_latents, "width": sae.d_in}
    panels: list[Callable[[Any], None]] = []
    if log.is_file():
        steps = _read_json(log, lines=True)
        panels.append(partial(_draw_training, steps=steps))
    if held_out.is_file():
        figures = _read_json(held_out)
        told |= {key: value for key, value in figures.items() if key not in ("fvu_by_timestep", "density")}
        if len(figures["fvu_by_timestep"]) > 1:  # rows of a text encoder have no timestep
            panels.append(partial(_draw_timesteps, figures=figures))
    if statistics is not None:
        told["never_fired"] = int(statistics.dead.sum())
        panels.append(partial(_draw_density, statistics=statistics))
        if len(statistics.timesteps) > 1:
            panels.append(partial(_draw_firing, statistics=statistics))
    if not panels:
        raise InputError(f"{folder} holds an SAE alone; diffusers-sae train writes figures and statistics beside it.")
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4), layout="constrained", squeeze=False)
    words = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in told.items())
    figure.suptitle(f"{folder.name}: {', '.join(words)}", fontsize=11)
    for axis, draw in zip(axes[0], panels, strict=True):
        draw(axis)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=90, format=path.suffix[1:].lower())
    plt.close(figure)
    write_whole(path, lambda partial: partial.write_bytes(drawn.getvalue()))
    return told


def _read_json(file: Path, lines: bool = False) -> Any:
    """What training wrote beside an SAE: an object, or with `lines` a list of one a line; raises `InputError`."""
    try:
        text = file.read_text()
        return [_with("fvu", line) for line in text.splitlines()] if lines else _with("fvu_by_timestep", text)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{file} cannot be read ({reason}); delete it, or train the SAE again.") from None


def _with(name: str, text: str) -> Any:
    value = json.loads(text)
    _ = value[name]
    return value


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
    defined = {float(t): fvu for t, fvu in by_timestep.items() if fvu is not None}  # equal rows have none
    axis.plot(list(defined), list(defined.values()), marker="o", ms=3, label="by timestep")
    if figures["fvu"] is not None:
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
