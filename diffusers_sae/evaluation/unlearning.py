"""Unlearning accuracy over a grid of styles and objects, as UnlearnCanvas (2402.11846) defines it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .shares import Share


@dataclass(frozen=True)
class Outcome:
    """One image of the grid: what was asked for, what was seen, and whether every factor could be named."""

    style: str
    object: str
    seen_style: str
    seen_object: str
    artefact: bool


@dataclass
class UnlearningAccuracy:
    """Figures of removing one concept, or, added up, of several.

    `ua`: share of the target's images no longer seen as the target. `ira`: share of images of the other concepts of
    the same domain still seen right. `cra`: share of all images seen right in the other domain. `cra_target`: the same
    over the target's images alone, where the edit acts. `artefacts`: share of images with a factor that the judge
    cannot name with confidence.
    """

    ua: Share
    ira: Share
    cra: Share
    cra_target: Share
    artefacts: Share

    def __add__(self, other: UnlearningAccuracy) -> UnlearningAccuracy:
        return UnlearningAccuracy(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))

    def as_dict(self) -> dict[str, object]:
        return {f: getattr(self, f).as_dict() for f in self.__dataclass_fields__}


def unlearning_accuracy(outcomes: Iterable[Outcome], domain: str, target: str) -> UnlearningAccuracy:
    """Figures of removing `target` from `domain` (`style` or `object`) over the images of a grid."""
    other = "object" if domain == "style" else "style"
    result = UnlearningAccuracy(Share(), Share(), Share(), Share(), Share())
    for o in outcomes:
        asked, seen = getattr(o, domain), getattr(o, f"seen_{domain}")
        kept = getattr(o, other) == getattr(o, f"seen_{other}")
        if asked == target:
            result.ua.count(seen != target)
            result.cra_target.count(kept)
        else:
            result.ira.count(seen == asked)
        result.cra.count(kept)
        result.artefacts.count(o.artefact)
    return result
