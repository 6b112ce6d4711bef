"""The demo: what steering does, in five rows of captioned images."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from ..features.concepts import ConceptScores
from ..features.detectors import ConceptDetectors
from ..strengths import StrengthMap, StrengthTable
from .judge import Judge
from .measure_removal import REMOVAL, edits_away
from .measure_steering import Towards, edits_towards
from .pictures import Row
from .shipped import SITES, generate, look

Edits = Sequence[dict[str, Any]]
"""Arguments of `steer`, one dict an edit."""


class Panel(NamedTuple):
    """One image of the demo: how it is captioned, what is asked for, and how it is steered."""

    caption: str
    prompt: str
    seed: int
    edits: Edits = ()


class Story(NamedTuple):
    """One row of the demo."""

    headline: str
    panels: Sequence[Panel]


def stories(
    scores: Mapping[str, ConceptScores], detectors: ConceptDetectors, towards: Mapping[str, Towards]
) -> list[Story]:
    """The rows of the demo."""
    return [
        _style(scores, towards),
        _background(scores, towards),
        _removal(scores, detectors),
        _sweep(scores),
        _windows(scores, towards),
    ]


def _pairs(cases: Sequence[tuple[str, int, str, Edits]]) -> list[Panel]:
    """Bare and steered, side by side, for cases of (prompt, seed, what is done, edits)."""
    return [
        panel
        for prompt, seed, done, edits in cases
        for panel in (Panel(f"“{prompt}”", prompt, seed), Panel(done, prompt, seed, edits))
    ]


def _style(scores: Mapping[str, ConceptScores], towards: Mapping[str, Towards]) -> Story:
    cases = [("a panda on a yellow background", 1, "neon"), ("a house on a white background", 2, "pixel art"),
             ("a fox on a blue background", 3, "ink")]  # fmt: skip
    return Story(
        "A style is added: the prompt names none, the edit does",
        _pairs(
            [
                (prompt, seed, f"+ {style}", edits_towards(scores, style, towards[style]))
                for prompt, seed, style in cases
            ]
        ),
    )


def _background(scores: Mapping[str, ConceptScores], towards: Mapping[str, Towards]) -> Story:
    cases = [("a 3d render of a rocket", 4, "green background"), ("a flat icon of a cat", 5, "red background"),
             ("a cartoon of an owl", 6, "yellow background")]  # fmt: skip
    return Story(
        "A background is turned: the prompt names no colour, the edit does",
        _pairs([(prompt, seed, f"+ {new}", edits_towards(scores, new, towards[new])) for prompt, seed, new in cases]),
    )


def _removal(scores: Mapping[str, ConceptScores], detectors: ConceptDetectors) -> Story:
    edits = edits_away(scores, detectors, "panda", REMOVAL["object"])
    prompts = (
        "a 3d render of a panda on a white background",
        "a cartoon of a panda on a green background",
        "a hamburger on a blue background",
    )
    return Story(
        "An object is removed: no panda where one is asked for; other prompts keep every bit of their image",
        _pairs([(prompt, 7 + i, "− panda", edits) for i, prompt in enumerate(prompts)]),
    )


def _sweep(scores: Mapping[str, ConceptScores]) -> Story:
    """One feature at the second site, the one that belongs to ink drawings most clearly."""
    site = SITES[1]
    at_site = scores[site]
    feature = int(at_site.importance("ink").mean(0).argmax())
    mean = at_site.activity[at_site.index("ink"), :, feature]  # (T,)
    steps = tuple(at_site.timesteps.tolist())

    def edits(strength: float) -> Edits:
        table = StrengthTable(steps, tuple((strength * mean).tolist()))
        return [{"features": {feature: table}, "adapter_name": site}]

    prompt = "a house on a white background"
    return Story(
        f"One feature, number {feature} at {site}, at rising strength (× its mean on ink drawings)",
        [Panel(f"× {s:g}" if s else f"“{prompt}”", prompt, 2, edits(s)) for s in (0, 0.5, 1, 2, 3, 6)],
    )


def _windows(scores: Mapping[str, ConceptScores], towards: Mapping[str, Towards]) -> Story:
    prompt = "a 3d render of a cat on a white background"

    def edits(start: float, stop: float) -> Edits:
        return edits_towards(scores, "neon", towards["neon"]._replace(start=start, stop=stop), "3d")

    return Story(
        "One edit, towards neon, on early steps only and on late steps only",
        [
            Panel(f"“{prompt}”", prompt, 11),
            Panel("all steps", prompt, 11, edits(0, 1)),
            Panel("first third", prompt, 11, edits(0, 0.35)),
            Panel("second third", prompt, 11, edits(0.35, 0.7)),
            Panel("last third", prompt, 11, edits(0.7, 1)),
        ],
    )


def draw(pipe: Any, judge: Judge, story: Sequence[Story]) -> tuple[list[Row], list[dict[str, Any]]]:
    """Make every image; returns the rows to draw and, for each image, what was done and what the judge sees."""
    rows, report = [], []
    bar = tqdm(total=sum(len(s.panels) for s in story), desc="images")
    for headline, panels in story:
        images = []
        for panel in panels:
            start = time.perf_counter()
            images.append(_image(pipe, panel))
            seen = look(judge, images[-1:])[0]
            report.append(
                {
                    "row": headline,
                    "prompt": panel.prompt,
                    "seed": panel.seed,
                    "edits": [_told(edit) for edit in panel.edits],
                    "seen": {factor: {"value": v, "confidence": round(p, 4)} for factor, (v, p) in seen.items()},
                    "seconds": round(time.perf_counter() - start, 2),
                }
            )
            bar.update()
        rows.append(Row(headline, images, [p.caption for p in panels]))
    return rows, report


def _image(pipe: Any, panel: Panel) -> torch.Tensor:
    try:
        for edit in panel.edits:
            pipe.steer(**edit)
        return next(generate(pipe, [panel.prompt], [panel.seed]))
    finally:
        pipe.reset_steering()


def _told(edit: Mapping[str, Any]) -> dict[str, Any]:
    """An edit in words that JSON knows; strengths as their largest over the timesteps, a rule as its size and bound."""
    told = {**edit, "features": {str(j): round(_largest(table), 4) for j, table in edit["features"].items()}}
    rule = told.pop("when", None)
    if rule is not None:
        features = len(rule.features)
        told["when"] = {"adapter_name": rule.adapter_name, "features": features, "above": round(rule.above, 4)}
    return told


def _largest(strength: StrengthTable | StrengthMap) -> float:
    values = strength.values if isinstance(strength, StrengthTable) else strength.values.flatten().tolist()
    return max(values, key=lambda v: abs(v))
