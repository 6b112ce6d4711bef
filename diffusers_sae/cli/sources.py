"""Pipelines and pictures that a command is given."""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path
from typing import Any

from ..checksums import sha256
from ..errors import InputError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")

EMBEDDED = "emoji-sd"
INDEX = "model_index.json"


class Pictures:
    """The pictures of a folder in the order of their names, opened when they are asked for.

    Raises `InputError` if the folder holds none; asked for some, if one cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._files = sorted(file for file in folder.glob("*") if file.suffix.lower() in PICTURES)
        if not self._files:
            raise InputError(f"{folder} holds no pictures; put {', '.join(PICTURES)} files there.")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, part: slice) -> list[Any]:
        return [_open_picture(file) for file in self._files[part]]

    def check(self, count: int) -> None:
        """Raise `InputError` unless each of the first `count` can be read, so that none stops a run half-way."""
        for file in self._files[:count]:
            _open_picture(file)

    def description(self, count: int) -> dict[str, Any]:
        """What the manifest of a store says of the first `count`."""
        digest = hashlib.sha256("".join(sha256(file) for file in self._files[:count]).encode())
        return {"count": count, "sha256": digest.hexdigest()}


def _open_picture(file: Path) -> Any:
    from PIL import Image

    from ..unit_range import rgb_image

    try:
        picture = Image.open(file)
        picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: of broken PNGs
        raise InputError(f"{file} is no picture that can be read ({error}); mend it or take it out.") from None
    return rgb_image(picture, f"The picture {file}")


def load_model(name: str) -> Any:
    """A steerable pipeline by its folder, its name on the hub, or `emoji-sd`, which ships with the package.

    Raises:
        InputError: there is no such model, or it cannot be loaded.
    """
    import torch
    from diffusers.utils import logging

    from ..demo.shipped import MODELS
    from ..pipelines import SAESteeringPipeline

    if name == EMBEDDED and not Path(name).exists():
        name = str(MODELS / EMBEDDED)
    _check_folder(Path(name))
    dtype = torch.float16 if torch.cuda.is_available() else torch.float32
    logging.disable_progress_bar()
    try:
        pipe = SAESteeringPipeline.from_pretrained(name, dtype=dtype)
    except InputError:
        raise
    except Exception as error:  # of any kind, since every component has a loader of its own
        raise InputError(_explain(name, error)) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _check_folder(folder: Path) -> None:
    if folder.is_file():
        raise InputError(f"{folder} is a file; pass the folder of a pipeline that save_pretrained wrote.")
    if folder.is_dir() and not (folder / INDEX).is_file():
        raise InputError(f"{folder} holds no pipeline: {INDEX} is missing; pass a folder that save_pretrained wrote.")


def _explain(name: str, error: Exception) -> str:
    reason = next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), "")
    reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    if Path(name).is_dir():
        return f"The pipeline in {name} cannot be loaded ({reason}); fetch or save it again."
    near = difflib.get_close_matches(name, [EMBEDDED], cutoff=0.6)
    advice = f"did you mean {near[0]}?" if near else "check the name, the network and the token."
    return f"{name!r} is no folder here and could not be fetched from the hub ({reason}); {advice}"
