"""`diffusers-sae demo`: the shipped model, bare and steered, as one captioned picture."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from .extras import require
from .files import check_output_folder


def demo(
    out: Annotated[Path, typer.Option(help="Folder for grid.png and report.json.")] = Path("outputs/demo"),
) -> None:
    """Steer the embedded model: styles added, backgrounds turned, an object removed, a strength sweep, time windows."""
    require("matplotlib", "PIL")
    check_output_folder(out)
    from ..demo.measure_steering import load_towards
    from ..demo.pictures import draw_grid
    from ..demo.shipped import MODELS, SITES, load_detectors, load_judge, load_pipeline, load_scores
    from ..demo.showcase import draw, stories

    start = time.perf_counter()
    pipe, judge = load_pipeline(), load_judge()
    for site in SITES:
        pipe.load_sae(MODELS / "saes" / site, adapter_name=site)
    rows, report = draw(pipe, judge, stories(load_scores(), load_detectors(), load_towards()))
    out.mkdir(parents=True, exist_ok=True)
    draw_grid(rows, "One diffusers pipeline, steered by the features of a sparse autoencoder", out / "grid.png")
    seconds = round(time.perf_counter() - start, 1)
    (out / "report.json").write_text(json.dumps({"seconds": seconds, "images": report}, indent=1) + "\n")
    typer.echo(f"{len(report)} images in {seconds} s: {out / 'grid.png'}, {out / 'report.json'}")
