"""Captioned grids of small images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import torch


@dataclass
class Row:
    """One row of a grid: a headline that says what is done, and images with a caption each."""

    headline: str
    images: Sequence[torch.Tensor]  # each (3, H, W) in [-1, 1]
    captions: Sequence[str]


def draw_grid(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw rows of captioned images, headlines above them, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = max(len(row.images) for row in rows)
    figure = plt.figure(figsize=(1.75 * columns, 2.35 * len(rows) + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=15, fontweight="bold")
    for row, part in zip(rows, figure.subfigures(len(rows), 1, squeeze=False)[:, 0], strict=True):
        part.suptitle(row.headline, fontsize=11, x=0.01, ha="left")
        axes = part.subplots(1, columns, squeeze=False)[0]
        for axis in axes:
            axis.axis("off")
        for axis, image, caption in zip(axes, row.images, row.captions, strict=False):
            axis.imshow(((image.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_title(fill(caption, 24), fontsize=8.5, pad=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


FIGURES = {"ua": "UA", "ira": "IRA", "cra": "CRA", "cra_target": "CRA of the target", "artefacts": "artefacts"}


def draw_curves(curves: dict[str, Any], path: Path) -> None:
    """Removal figures over each thing that was varied, a row for each domain; the chosen point is marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    varied = list(next(iter(curves.values())))
    figure, grid = plt.subplots(
        len(curves), len(varied), figsize=(3.2 * len(varied), 3.1 * len(curves)), sharey=True, layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for axes, (domain, points_of) in zip(grid, curves.items(), strict=True):
        axes[0].set_ylabel(f"removal of {domain}s\nshare of images")
        for axis, what in zip(axes, varied, strict=True):
            points = points_of[what]
            labels = [_tick(point["value"]) for point in points]
            for key, name in FIGURES.items():
                shares = [(label, point[key]) for label, point in zip(labels, points, strict=True)]
                counted = [(label, share) for label, share in shares if share["value"] is not None]
                values = [share["value"] for _, share in counted]
                low = [share["value"] - share["low"] for _, share in counted]
                high = [share["high"] - share["value"] for _, share in counted]
                axis.errorbar(
                    [label for label, _ in counted], values, [low, high],
                    marker="o", ms=4, capsize=2, lw=1.2, label=name,
                )  # fmt: skip
            for i in (i for i, point in enumerate(points) if point["chosen"]):
                axis.axvspan(i - 0.3, i + 0.3, color="gold", alpha=0.35, lw=0)
            axis.set(title=what.replace("_", " "), ylim=(-0.03, 1.03))
            axis.tick_params(axis="x", labelsize=8)
            axis.grid(alpha=0.3)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(FIGURES))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _tick(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "\n+ ".join(site.removeprefix("unet.").replace("attentions", "attn") for site in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)
