"""How well emoji-sd draws what it is asked for: the judge's accuracy on fresh captions, the time an image takes."""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

from ..evaluation.rows import Rows
from .judge import Judge
from .shipped import generate, look
from .world import FACTORS, Scene, leave_out, sample_scene

SEED = 40_000_000


def fresh_scenes(count: int) -> list[Scene]:
    """Scenes of which a caption tells only some factors at times."""
    rng = random.Random(SEED)
    return [leave_out(sample_scene(rng), rng) for _ in range(count)]


def accuracy(pipe: Any, judge: Judge, count: int = 512) -> Rows:
    """Whether the judge sees each factor that the caption tells, in images made from captions of every template."""
    scenes = fresh_scenes(count)
    images = list(generate(pipe, [s.caption(i) for i, s in enumerate(scenes)], range(SEED, SEED + count)))
    columns: dict[str, list[bool | None]] = {factor: [] for factor in FACTORS}
    for scene, seen in zip(scenes, look(judge, images), strict=True):
        for factor, label in scene.labels().items():
            columns[factor].append(seen[factor][0] == getattr(scene, factor) if label >= 0 else None)
    return Rows(range(count), columns)


def seconds_an_image(pipe: Any, runs: int = 7) -> float:
    """Median time of one image, 20 steps with guidance, after one to warm up."""
    prompt = "a 3d render of a panda on a red background"
    times = []
    for i in range(runs + 1):
        start = time.perf_counter()
        list(generate(pipe, [prompt], [i]))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
