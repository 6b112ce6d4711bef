"""`diffusers-sae evaluate`: all quality figures of the shipped models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

PARTS = ("model", "sae", "steering", "bare", "curves", "styles", "objects")


def evaluate(
    parts: Annotated[str, typer.Option(help="Which parts, with commas between them.")] = ",".join(PARTS),
    out: Annotated[Path, typer.Option(help="JSON file of the figures.")] = Path("benchmarks/results/demo_quality.json"),
    work: Annotated[Path, typer.Option(help="Folder where finished pieces are kept.")] = Path("outputs/evaluate"),
) -> None:
    """Measure the embedded models: images drawn right, reconstruction, steering, removal. Stopped, it resumes.

    A part that is left out keeps the figures that the JSON file has of it.
    """
    from ..demo.pictures import draw_curves
    from ..demo.quality import Quality, fingerprint
    from ..errors import InputError
    from ..evaluation.ledger import Ledger

    wanted = [part.strip() for part in parts.split(",")]
    if unknown := [part for part in wanted if part not in PARTS]:
        raise InputError(f"{unknown[0]!r} is not a part; choose from {', '.join(PARTS)}.")
    weights = fingerprint()
    quality = Quality(Ledger(work / "ledger.jsonl", weights))
    figures = json.loads(out.read_text()) if out.exists() else {}
    if figures.get("weights") != weights:
        figures = {"weights": weights}
    for part in wanted:
        figures[part] = getattr(quality, part)()
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(figures, indent=1) + "\n")
        typer.echo(f"{part}: in {out}")
    if "curves" in wanted:
        draw_curves(figures["curves"], out.with_name("demo_removal.png"))
