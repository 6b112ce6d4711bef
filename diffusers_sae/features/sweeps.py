"""The same image at many strengths of one feature, or of two.

Every call of the pipeline must begin alike, so that only the edit differs: pass latents, seeds, or w, and no generator,
which goes on from call to call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def sweep(
    pipe: Any, feature: int, strengths: Sequence[float], steer: Mapping[str, Any] | None = None, **call: Any
) -> list[list[Any]]:
    """Images `[image of the call][strength]` of one feature at each strength.

    `steer` are further arguments of `pipe.steer` (`adapter_name`, `tokens`, `unit`, ...), `call` those of the pipeline.
    The plan in force stays, and is as it was afterwards.
    """
    columns = []
    for strength in strengths:
        with pipe.steering({feature: strength}, **(steer or {})):
            columns.append(list(pipe(**call).images))
    return [list(row) for row in zip(*columns, strict=True)]


def sweep_two(
    pipe: Any,
    features: tuple[int, int],
    strengths: Sequence[float],
    steer: Mapping[str, Any] | None = None,
    **call: Any,
) -> list[list[Any]]:
    """The call's first image `[strength of the first feature][strength of the second]`; otherwise as `sweep`."""
    first, second = features
    rows = []
    for down in strengths:
        with pipe.steering({first: down}, **(steer or {})):
            rows.append(sweep(pipe, second, strengths, steer, **call)[0])
    return rows


def one_after_another(
    pipe: Any, features: Mapping[int, float], steer: Mapping[str, Any] | None = None, **call: Any
) -> list[Any]:
    """The call's first image: as it is, with the first feature at its strength, with the first two, and so on."""
    chosen = list(features.items())
    images = [pipe(**call).images[0]]
    for i in range(1, len(chosen) + 1):
        with pipe.steering(dict(chosen[:i]), **(steer or {})):
            images.append(pipe(**call).images[0])
    return images
