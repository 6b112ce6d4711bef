"""The card of a saved SAE, from what its config and the figures beside it tell."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

FIGURES = "held_out.json"
LABELS = "labels.json"
PICTURE = "picture.png"
TOLD_APART = ("site", "base_model", "note", "license")
"""Parts of the provenance that stand outside of the table."""


def write_card(
    folder: Path, kind: str, arguments: Mapping[str, Any], provenance: Mapping[str, Any], statistics: bool
) -> None:
    """Write `README.md` for an SAE saved in `folder`, unless there is one; people may have edited it."""
    file = folder / "README.md"
    if file.exists():
        return
    site = provenance.get("site") or {}
    path = site.get("path") if isinstance(site, Mapping) else site
    picture = (folder / PICTURE).is_file()
    data = ModelCardData(
        library_name="diffusers_sae",
        base_model=provenance.get("base_model"),
        license=provenance.get("license"),
        tags=["sparse-autoencoder", "diffusers", kind],
        widget=[{"text": "steered", "output": {"url": PICTURE}}] if picture else None,
    )
    lines = [f"# {kind} of {path or 'an activation'}", ""]
    lines += _table("", {**_of_site(site), "base model": provenance.get("base_model"), **arguments})
    lines += [str(provenance["note"]) + ".", ""] if provenance.get("note") else []
    captured = {k.replace("_", " "): v for k, v in provenance.items() if k not in TOLD_APART and _is_plain(v)}
    lines += _table("## Where the activations came from", captured)
    lines += _table("## Figures on activations held out", _figures(folder))
    lines += _labels(folder)
    lines += [f"![]({PICTURE})", ""] if picture else []
    lines += _snippet(path, provenance.get("base_model"), statistics)
    ModelCard(f"---\n{data}\n---\n\n" + "\n".join(lines)).save(file)


def _of_site(site: Any) -> dict[str, Any]:
    return dict(site) if isinstance(site, Mapping) else {"path": site}


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool))


def _table(title: str, rows: Mapping[str, Any]) -> list[str]:
    told = [f"| {name} | {_shown(value)} |" for name, value in rows.items() if value is not None]
    return [*([title, ""] if title else []), "| | |", "|---|---|", *told, ""] if told else []


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _figures(folder: Path) -> dict[str, Any]:
    file = folder / FIGURES
    figures = json.loads(file.read_text()) if file.is_file() else {}
    return {name: value for name, value in figures.items() if isinstance(value, (int, float))}


def _labels(folder: Path) -> Iterator[str]:
    file = folder / LABELS
    if file.is_file():
        labels = json.loads(file.read_text())
        some = ", ".join(f"{feature} {label}" for feature, label in list(labels.items())[:12])
        yield from (f"Labels of {len(labels)} features, such as: {some}.", "")


def _snippet(path: str | None, base_model: str | None, statistics: bool) -> list[str]:
    unit = '{0: 4.0}, unit="mean"' if statistics else "{0: 8.0}"
    site = "" if path else ', site="..."'
    return [
        "## Use",
        "",
        "```python",
        "from diffusers_sae import SAESteeringPipeline",
        "",
        f'pipe = SAESteeringPipeline.from_pretrained("{base_model or "..."}")',
        f'pipe.load_sae("THIS REPOSITORY OR FOLDER"{site})',
        f"pipe.steer({unit})",
        'image = pipe("a prompt").images[0]',
        "```",
    ]
