"""Prompts and pictures from files."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from ..errors import InputError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")

EMBEDDED = "emoji-sd"


def read_prompts(file: Path, column: str) -> list[str]:
    """The prompts of a text file, one a line, or of a column of a `.csv` or `.jsonl` file."""
    text = file.read_text()
    if file.suffix not in (".csv", ".jsonl"):
        return [line for line in text.splitlines() if line.strip()]
    if file.suffix == ".csv":
        rows: list[dict[str, Any]] = list(csv.DictReader(text.splitlines(keepends=True)))
    else:
        try:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            raise InputError(f"{file} is no JSON Lines ({error}); write one object a line.") from None
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get(column), str):
            has = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise InputError(f"Row {i + 1} of {file} has no text in the column {column!r}; it has {has}.")
    return [row[column] for row in rows]


class Pictures:
    """The pictures of a folder in the order of their names, opened when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._files = sorted(file for file in folder.glob("*") if file.suffix.lower() in PICTURES)
        if not self._files:
            raise InputError(f"{folder} holds no pictures; put {', '.join(PICTURES)} files there.")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, part: slice) -> list[Any]:
        from PIL import Image

        return [Image.open(file).convert("RGB") for file in self._files[part]]

    def as_told(self) -> list[tuple[str, int]]:
        """What the manifest of a store says of them: names and sizes of the files."""
        return [(file.name, file.stat().st_size) for file in self._files]


def load_model(name: str) -> Any:
    """A steerable pipeline by its folder, its name on the hub, or `emoji-sd`, which ships with the package."""
    import torch

    from ..demo.shipped import MODELS
    from ..pipelines import SAESteeringPipeline

    if name == EMBEDDED and not Path(name).exists():
        name = str(MODELS / EMBEDDED)
    dtype = torch.float16 if torch.cuda.is_available() else torch.float32
    pipe = SAESteeringPipeline.from_pretrained(name, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe
