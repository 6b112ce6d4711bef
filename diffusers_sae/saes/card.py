"""The card of a saved SAE, from what its config and the figures beside it tell."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

CARD = "README.md"
FIGURES = "held_out.json"
LABELS = "labels.json"
PICTURE = "picture.png"
TOLD_APART = ("site", "base_model", "note", "license")
"""Parts of the provenance that stand outside of the table."""


MARK = "<!-- Written by diffusers_sae. Once it is edited, saving the same SAE again keeps it. sha256 {} -->\n"


def card_of(
    kind: str,
    arguments: Mapping[str, Any],
    provenance: Mapping[str, Any],
    statistics: bool,
    figures: Mapping[str, Any],
    labels: Mapping[str, str],
    *,
    picture: bool,
) -> str:
    """The text of a saved SAE's `README.md`; its last line tells whether it was edited (`is_generated`)."""
    site = provenance.get("site") or {}
    path = site.get("path") if isinstance(site, Mapping) else site
    base_model = provenance.get("base_model")
    data = ModelCardData(
        library_name="diffusers_sae",
        base_model=base_model if is_repository(base_model) else None,
        license=provenance.get("license"),
        tags=["sparse-autoencoder", "diffusers", kind],
        widget=[{"text": "steered", "output": {"url": PICTURE}}] if picture else None,
    )
    lines = [f"# {kind} of {path or 'an activation'}", ""]
    lines += _table("", {**_of_site(site), "base model": base_model, **arguments})
    lines += [str(provenance["note"]) + ".", ""] if provenance.get("note") else []
    captured = {k.replace("_", " "): v for k, v in provenance.items() if k not in TOLD_APART and _is_plain(v)}
    lines += _table("## Where the activations came from", captured)
    lines += _table("## Figures on activations held out", _numbers(figures))
    lines += _some_labels(labels)
    lines += [f"![]({PICTURE})", ""] if picture else []
    lines += _snippet(path, base_model, statistics)
    text = f"---\n{data}\n---\n\n" + "\n".join(lines) + "\n"
    return text + MARK.format(_digest(text))


def is_generated(text: str) -> bool:
    """Whether a card is as `card_of` wrote it."""
    body, _, last = text.rstrip("\n").rpartition("\n")
    return last + "\n" == MARK.format(_digest(body + "\n"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def is_local(name: Any) -> bool:
    """Whether a model's name is a path on this machine."""
    if not isinstance(name, str):
        return False
    return name.startswith((".", "~")) or "\\" in name or name.count("/") > 1 or Path(name).exists()


def name_of(path: str) -> str:
    """The last part of a path, of whatever system."""
    return re.split(r"[\\/]", str(Path(path).expanduser()).rstrip("\\/"))[-1]


def is_repository(name: Any) -> bool:
    """Whether a model's name is that of a repository, `owner/name`, and no path on this machine."""
    return isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not is_local(name)


def _of_site(site: Any) -> dict[str, Any]:
    return dict(site) if isinstance(site, Mapping) else {"path": site}


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool))


def _table(title: str, rows: Mapping[str, Any]) -> list[str]:
    told = [f"| {name} | {_shown(value)} |" for name, value in rows.items() if value is not None]
    return [*([title, ""] if title else []), "| | |", "|---|---|", *told, ""] if told else []


def _shown(value: Any) -> str:
    """A value without what lies before the name of a local file."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return name_of(value) if is_local(value) else str(value)


def _numbers(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if isinstance(value, (int, float))}


def _some_labels(labels: Mapping[str, str]) -> Iterator[str]:
    if labels:
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
        f'pipe = SAESteeringPipeline.from_pretrained("{base_model if is_repository(base_model) else "..."}")',
        f'pipe.load_sae("THIS REPOSITORY OR FOLDER"{site})',
        f"pipe.steer({unit})",
        'image = pipe("a prompt").images[0]',
        "```",
    ]
