"""`diffusers-sae evaluate`: all quality figures of the shipped models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..disk import write_whole
from ..errors import InputError
from .extras import require
from .files import check_output_file, check_output_folder, read_text

PARTS = ("model", "sae", "steering", "bare", "curves", "styles", "objects")


def evaluate(
    parts: Annotated[str, typer.Option(help="Which parts, with commas between them.")] = ",".join(PARTS),
    out: Annotated[Path, typer.Option(help="JSON file of the figures.")] = Path("benchmarks/results/demo_quality.json"),
    work: Annotated[Path, typer.Option(help="Folder where finished pieces are kept.")] = Path("outputs/evaluate"),
) -> None:
    """Measure the embedded models: images drawn right, reconstruction, steering, removal. Stopped, it resumes.

    A part that is left out keeps the figures that the JSON file has of it.
    """
    wanted = list(dict.fromkeys(part.strip() for part in parts.split(",") if part.strip()))
    if unknown := [part for part in wanted if part not in PARTS]:
        raise InputError(f"{unknown[0]!r} is not a part; choose from {', '.join(PARTS)}.")
    if not wanted:
        raise InputError(f"There is no part in parts={parts!r}; choose from {', '.join(PARTS)}.")
    require("scipy", *(["matplotlib"] if "curves" in wanted else []))
    check_output_file(out)
    check_output_folder(work)
    figures = _read_figures(out) if out.exists() else {}
    from ..demo.pictures import draw_curves
    from ..demo.quality import Quality, fingerprint
    from ..evaluation.ledger import Ledger

    weights = fingerprint()
    quality = Quality(Ledger(work / "ledger.jsonl", weights))
    if figures.get("weights") != weights:
        figures = {"weights": weights}
    for part in wanted:
        figures[part] = getattr(quality, part)()
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, partial(_write_figures, figures))
        typer.echo(f"{part}: in {out}")
    if "curves" in wanted:
        draw_curves(figures["curves"], out.with_name("demo_removal.png"))


def _write_figures(figures: Mapping[str, Any], file: Path) -> None:
    file.write_text(json.dumps(figures, indent=1) + "\n")


def _read_figures(file: Path) -> dict[str, Any]:
    """The figures of an earlier run; raises `InputError` if the file is something else, which is not written over."""
    text = read_text(file)
    try:
        figures = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} holds no figures of an earlier run ({error}); choose another --out.") from None
    if not isinstance(figures, dict):
        raise InputError(f"{file} holds no figures of an earlier run; choose another --out.")
    return figures
