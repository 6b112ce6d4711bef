"""What linear probes read from 512 numbers of each representation of h."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from diffusers_sae.demo.world import Scene
from diffusers_sae.evaluation.probes import SELECTIONS, fit_probe
from diffusers_sae.evaluation.shares import Share

PROBED = ("style", "background")
"""Factors that every image shows; objects are read without error from everything, and of people there are too few."""
ENTRIES, FOLDS = 512, 2


def measure_probes(
    codes: Iterable[tuple[str, tuple[torch.Tensor, torch.Tensor]]], scenes: Sequence[Scene]
) -> dict[str, dict[str, Any]]:
    """Accuracy on images held out, for each code (of the training images and of those held out) and factor.

    One protocol for all: the 512 entries are selected by mean activation, by variance or by the labels' F; `chosen` is
    the way that does best in cross-validation on the training images, as the penalty is; all noises of an image are on
    the same side of it. Of raw h there is also a probe of all numbers, beside which the others are to be seen.

    Args:
        codes: of the training images `(noises * images, M)`, all images once and then again, and of those held out.
        scenes: what the images show: those trained on, then those held out.
    """
    return {name: _of(name, seen, held, scenes) for name, (seen, held) in codes}


def _of(name: str, seen: torch.Tensor, held: torch.Tensor, scenes: Sequence[Scene]) -> dict[str, Any]:
    used = (seen != seen[:1]).any(0)  # an entry that never varies says nothing
    x, new = seen[:, used].numpy(), held[:, used].numpy()
    image = np.arange(len(x)) % (len(scenes) - len(new))
    found: dict[str, Any] = {"entries_in_use": x.shape[1]}
    for factor in PROBED:
        labels = np.array([scene.labels()[factor] for scene in scenes])
        y, expected = labels[image], labels[-len(new) :]
        ways = {way: (ENTRIES, [way]) for way in SELECTIONS} if x.shape[1] > ENTRIES else {"all": (None, ["mean"])}
        if name == "raw h":
            ways["all"] = None, ["mean"]
        told = {}
        for way, (entries, selections) in ways.items():
            probe = fit_probe(
                x, y, entries=entries, selections=selections, scalings=["common"], folds=FOLDS, groups=image
            )
            told[way] = {
                **Share.of(probe.predict(new) == expected, range(len(new))).as_dict(),
                "cross_validated": round(probe.cross_validated, 4),
                "penalty": probe.penalty,
            }
        candidates = [way for way in told if way != "all"] or ["all"]
        best = max(candidates, key=lambda way: told[way]["cross_validated"])
        found[factor] = {"chosen": {"way": best, **told[best]}, **told}
    print(name, {f: {w: v["value"] for w, v in found[f].items()} for f in PROBED}, flush=True)
    return found
