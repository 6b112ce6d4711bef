"""Two images mixed in the code of h, from one end to the other, and what else could be mixed.

Both are inverted to 0.9 T and run once, which gives h of each at every step. Then the first is run again with
`h' = h + share (dec(z_b) - dec(z_a))`: its code is mixed with the other's, and what the SAE leaves out stays its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from kinds import PATH, STEPS

from diffusers_sae import Directions, Inversion, Site, invert
from diffusers_sae.demo.pictures import Row, draw_grid
from diffusers_sae.demo.shipped import generate, load_judge, look
from diffusers_sae.layouts import LAYOUTS
from diffusers_sae.saes import SparseAutoencoder

TO, ITERATIONS = 0.9, 2
SHARES = (0.0, 0.5, 1.0)


def h_of_steps(pipe: Any, inversion: Inversion) -> torch.Tensor:
    """h `(steps, N, C, H, W)` of an unedited run."""
    with pipe.capture([PATH]) as activations:
        inversion.run(pipe, output_type="latent")
    seen = activations[PATH]
    return torch.stack([seen.select("cond", t).float().cpu() for t in inversion.timesteps])


@torch.no_grad()
def decoded(sae: SparseAutoencoder, h: torch.Tensor) -> torch.Tensor:
    """What an SAE of whole maps has of h `(steps, N, C, H, W)`: `(steps, N, d)`."""
    return sae(LAYOUTS["vector"].to_rows(h.flatten(0, 1)))[:, 0].unflatten(0, h.shape[:2])


def moved_h(
    pipe: Any, inversion: Inversion, change: torch.Tensor, steps: Sequence[int]
) -> Callable[[float], torch.Tensor]:
    """Images `(N, 3, H, W)` of a run in which h moves by a share of `change (steps, N, d)`, at some steps."""
    count = change.shape[1]

    def run(share: float) -> torch.Tensor:
        pipe.load_sae(Directions.of(change.flatten(0, 1)), Site(PATH, layout="vector"), adapter_name="change")
        for s in steps:
            strengths = {s * count + i: [share * (i == j) for j in range(count)] for i in range(count)}
            at = inversion.timesteps[s] / inversion.training_timesteps
            pipe.steer(strengths, adapter_name="change", **inversion.window(at=at))
        images = inversion.run(pipe, output_type="pt").images.float().cpu()
        pipe.delete_saes("change")
        return images

    return run


def mixed_noise(pipe: Any, a: Inversion, b: Inversion) -> Callable[[float], torch.Tensor]:
    """Images of a run from latents between those of two inversions, on the arc between them, without an edit."""

    def run(share: float) -> torch.Tensor:
        x, y = a.latents.flatten(1), b.latents.flatten(1)
        angle = torch.cosine_similarity(x, y).clamp(-1, 1).acos()[:, None]
        mixed = (((1 - share) * angle).sin() * x + (share * angle).sin() * y) / angle.sin()
        return replace(a, latents=mixed.view_as(a.latents)).run(pipe, output_type="pt").images.float().cpu()

    return run


def measure_interpolation(
    pipe: Any, sae: SparseAutoencoder, prompts: Sequence[str], out: Path, judged: bool, pairs: int = 2
) -> dict[str, Any]:
    """Pairs of images generated from `prompts`, the first half with the second; `sae` is of whole maps."""
    images = torch.stack(list(generate(pipe, prompts[: 2 * pairs], range(200, 200 + 2 * pairs)))) / 2 + 0.5
    a, b = (invert(pipe, half, "", TO, num_inference_steps=STEPS, iterations=ITERATIONS) for half in images.chunk(2))
    h_a, h_b = h_of_steps(pipe, a), h_of_steps(pipe, b)
    code, whole = decoded(sae, h_b) - decoded(sae, h_a), (h_b - h_a).flatten(2)
    every = range(len(a.timesteps))
    at_07 = [min(every, key=lambda s: abs(a.timesteps[s] - 0.7 * a.training_timesteps))]
    ways = {
        "whole h, one step at 0.7 T": moved_h(pipe, a, whole, at_07),
        "code of h, all steps from 0.9 T": moved_h(pipe, a, code, every),
        "whole h, all steps from 0.9 T": moved_h(pipe, a, whole, every),
        "noise at 0.9 T, no edit": mixed_noise(pipe, a, b),
    }
    first = a.run(pipe, output_type="pt").images.float().cpu()  # a share of 0, whichever way
    strips = {name: [first, *(run(share) for share in SHARES[1:])] for name, run in ways.items()}
    last = strips["noise at 0.9 T, no edit"][-1]
    judge = load_judge() if judged else None
    figures: dict[str, Any] = {"pairs": pairs, "shares": list(SHARES)}
    figures["between_the_ends"] = _distance(first, last)
    for name, strip in strips.items():
        figures[name] = {
            "from_first": [_distance(x, first) for x in strip],
            "from_last": [_distance(x, last) for x in strip],
            **(_as_judged(judge, strip, first, last) if judge is not None else {}),
        }
        print(name, {k: [round(v, 3) for v in values] for k, values in figures[name].items()}, flush=True)
    for i in range(2):
        rows = [
            Row(name, [2 * x[i] - 1 for x in strip], [f"{s:.2f}" for s in SHARES]) for name, strip in strips.items()
        ]
        draw_grid(rows, "From one image to another", out / f"interpolation_{i}.png")
    return figures


def _as_judged(
    judge: Any, strip: Sequence[torch.Tensor], first: torch.Tensor, last: torch.Tensor
) -> dict[str, list[float]]:
    """Shares of images that show the other image's object, style and background, where the two differ."""
    ends = [look(judge, list(2 * x - 1)) for x in (first, last)]
    found = {}
    for factor in ("object", "style", "background"):
        begin, end = ([seen[factor][0] for seen in one] for one in ends)
        differ = [i for i in range(len(begin)) if begin[i] != end[i]]
        shown = [look(judge, list(2 * x - 1)) for x in strip]
        found[factor] = [sum(s[i][factor][0] == end[i] for i in differ) / max(len(differ), 1) for s in shown]
    return found


def _distance(images: torch.Tensor, others: torch.Tensor) -> float:
    return float((images - others).abs().mean())
