"""Unlearning accuracy over a grid of styles and objects, as UnlearnCanvas (2402.11846) defines it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .rows import Rows, pooled
from .shares import Share


@dataclass(frozen=True)
class Outcome:
    """One image of the grid: what was asked for, what was seen, and what was seen in the bare model's image.

    `artefact`: an edit took away the judge's confidence in a factor other than the removed one; `None` for images that
    no edit changed.
    """

    image: int
    style: str
    object: str
    seen_style: str
    seen_object: str
    bare_style: str
    bare_object: str
    artefact: bool | None


@dataclass(frozen=True)
class UnlearningAccuracy:
    """Figures of removing one concept or, added up, of several; `rows` holds the judgements for each target.

    `ua`: share of the target's images no longer seen as the target. `ira`: share of images of the other concepts of
    the same domain still seen right. `cra`: share of all images seen right in the other domain. `cra_target`: the same
    over the target's images alone, where the edit acts. `edited`: share of images that an edit changed. `artefacts`:
    share of edited images in which the judge has lost confidence in a factor other than the removed one.

    `ira_bare` and `cra_bare` are `ira` and `cra` of the bare model's images. Images that no edit changed are seen as
    before, so that `ira` and `cra` differ from them by at most the share of edited images.
    """

    rows: Mapping[str, Rows] = field(default_factory=dict)

    def share(self, name: str) -> Share:
        return pooled(self.rows.values(), name)

    def __add__(self, other: UnlearningAccuracy) -> UnlearningAccuracy:
        return UnlearningAccuracy({**self.rows, **other.rows})

    def as_dict(self) -> dict[str, Any]:
        """Every share; intervals are over distinct images, see `Share`."""
        return {name: self.share(name).as_dict() for name in COLUMNS}

    def rows_as_dict(self) -> dict[str, dict[str, str]]:
        return {target: rows.as_dict() for target, rows in self.rows.items()}


def unlearning_accuracy(outcomes: Iterable[Outcome], domain: str, target: str) -> UnlearningAccuracy:
    """Figures of removing `target` from `domain` (`style` or `object`) over the images of a grid."""
    ordered = sorted(outcomes, key=lambda outcome: outcome.image)
    judged = [_judgements(outcome, domain, target) for outcome in ordered]
    columns = {name: [row[name] for row in judged] for name in COLUMNS}
    return UnlearningAccuracy({target: Rows([outcome.image for outcome in ordered], columns)})


COLUMNS = ("ua", "ira", "cra", "cra_target", "artefacts", "edited", "ira_bare", "cra_bare")


def _judgements(o: Outcome, domain: str, target: str) -> dict[str, bool | None]:
    other = "object" if domain == "style" else "style"
    asked, seen, bare = (getattr(o, f"{when}{domain}") for when in ("", "seen_", "bare_"))
    is_target = asked == target
    kept = getattr(o, other) == getattr(o, f"seen_{other}")
    return {
        "ua": seen != target if is_target else None,
        "ira": None if is_target else seen == asked,
        "cra": kept,
        "cra_target": kept if is_target else None,
        "artefacts": o.artefact,
        "edited": o.artefact is not None,
        "ira_bare": None if is_target else bare == asked,
        "cra_bare": getattr(o, other) == getattr(o, f"bare_{other}"),
    }
