"""Fetching SAEs from the hub, no more of a repository than is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..errors import InputError
from .known import record_of
from .reading import is_weights


class Found(NamedTuple):
    """Where an SAE was found: its folder here, and the repository that it came from."""

    folder: Path
    repository: str | None = None
    subfolder: str = ""


def download(repository: str, subfolder: str | None, hub_kwargs: Mapping[str, Any]) -> Found:
    """Fetch one folder of a repository, or what lies at its root."""
    record = record_of(repository)
    nicknames = record.nicknames if record else {}
    if subfolder is None and nicknames:
        raise InputError(f"{repository} holds several SAEs; pass subfolder, one of {', '.join(nicknames)}.")
    wanted = nicknames.get(subfolder or "", subfolder)
    only: dict[str, Any] = {"allow_patterns": [f"{wanted}/*"]} if wanted else {"ignore_patterns": ["*/*"]}
    try:
        root = Path(snapshot_download(repository, **only, **hub_kwargs))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{repository!r} is no folder or file here and could not be fetched from the hub ({reason}); "
            "check the name, the network and the token."
        ) from error
    if wanted and subfolder in nicknames:
        return _the_one(root, wanted, repository)
    return Found(root / (subfolder or ""), repository, subfolder or "")


def _the_one(root: Path, pattern: str, repository: str) -> Found:
    """The only folder of that pattern, or in it, that holds weights."""
    folders = sorted({file.parent for file in root.glob(f"{pattern}/**/*") if is_weights(file)})
    if len(folders) == 1:
        subfolder = folders[0].relative_to(root).as_posix()
        return Found(folders[0], repository, subfolder)
    names = ", ".join(folder.relative_to(root).as_posix() for folder in folders) or "none"
    raise InputError(
        f"{repository} has {len(folders)} folders {pattern} with weights ({names}); pass one as subfolder."
    )
