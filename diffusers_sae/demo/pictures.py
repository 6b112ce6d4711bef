"""Captioned grids of small images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
            axis.set_title(caption, fontsize=8.5, pad=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
