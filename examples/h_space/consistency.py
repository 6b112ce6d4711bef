"""Counterfactual consistency: images are edited, then the edit is undone from the edited image alone.

Each time the image is inverted anew, as in the paper: what comes back is `undo(invert(do(invert(x))))`. Editing by the
prompt's object word, forth and back, is what it is compared with; inverting twice without an edit is the floor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from edits import OBJECTS, SETTINGS, by_concept
from kinds import AT, STEPS

from diffusers_sae import invert
from diffusers_sae.demo.pictures import Row, draw_grid
from diffusers_sae.demo.shipped import generate, load_judge, look
from diffusers_sae.demo.world import FACTORS, Scene
from diffusers_sae.evaluation.paired import paired_t_test
from diffusers_sae.layouts import LAYOUTS
from diffusers_sae.saes import SparseAutoencoder

TO, ITERATIONS, KAPPA = 0.9, 2, 1000.0
STRENGTH = SETTINGS["all steps from 0.9 T"].strength
SHOWN = 4


def judge_distance(judge: Any, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """LPIPS `(N,)` with the judge as network and weights of 1 (1801.03924, equation 1); images in [0, 1].

    At every block of the judge, features are unit vectors along the channels; their square distances are averaged over
    places and added up over blocks.
    """
    found = torch.zeros(len(images))
    a, b = judge.stem(2 * images - 1), judge.stem(2 * others - 1)
    for block in judge.body:
        a, b = block(a), block(b)
        unit = [torch.nn.functional.normalize(h, dim=1, eps=1e-8) for h in (a, b)]
        found += (unit[0] - unit[1]).square().sum(1).mean((1, 2))
    return found


def by_prompt(pipe: Any, images: torch.Tensor, source: Sequence[str], target: Sequence[str], to: float) -> torch.Tensor:
    """Images `(N, 3, H, W)` inverted with one prompt and denoised with another."""
    inversion = invert(pipe, images, source, to, num_inference_steps=STEPS, iterations=ITERATIONS)
    return inversion.run(pipe, prompt=list(target), output_type="pt").images.float().cpu()


def by_latents(
    pipe: Any, images: torch.Tensor, prompts: Sequence[str], to: float, features: Mapping[int, Any],
    one_step: bool = False, **steer: Any,
) -> torch.Tensor:  # fmt: skip
    """Images inverted and denoised with one prompt each, with latents edited while they are denoised."""
    inversion = invert(pipe, images, prompts, to, num_inference_steps=STEPS, iterations=ITERATIONS)
    window = inversion.window(at=to) if one_step else {}
    with pipe.steering(features, **steer, **window):
        return inversion.run(pipe, output_type="pt").images.float().cpu()


def without_latents(
    pipe: Any, images: torch.Tensor, prompts: Sequence[str], to: float, features: Mapping[int, Any], **steer: Any
) -> torch.Tensor:
    """Images that were made with latents added, inverted with these in force and denoised without them."""
    with pipe.steering(features, **steer):
        inversion = invert(pipe, images, prompts, to, num_inference_steps=STEPS, iterations=ITERATIONS, edited=True)
    return inversion.run(pipe, output_type="pt").images.float().cpu()


def other_objects(scenes: Sequence[Scene], prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """For each scene one of the first objects that it does not show, and its prompt with that object."""
    targets, changed = [], []
    for i, (scene, prompt) in enumerate(zip(scenes, prompts, strict=True)):
        target = next(o for o in FACTORS["object"][i % OBJECTS :] if o != scene.object)
        template = next(t for t in range(3) if scene.caption(t) == prompt)
        targets.append(target)
        changed.append(replace(scene, object=target, gender=None, skin=None).caption(template))
    return targets, changed


def round_trips(
    pipe: Any, saes: Mapping[str, SparseAutoencoder], seen: torch.Tensor, seen_scenes: Sequence[Scene],
    images: torch.Tensor, prompts: Sequence[str], targets: Sequence[str], changed: Sequence[str],
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:  # fmt: skip
    """Of every way to edit: the images edited, and those with the edit undone."""
    count = len(images)
    found = {}

    def trip(name: str, there: Any, back: Any) -> None:
        y = there(images)
        found[name] = y, back(y)
        print(f"  {name}", flush=True)

    trip("no edit", *2 * (lambda x: by_prompt(pipe, x, prompts, prompts, TO),))
    trip(
        "prompt",
        lambda x: by_prompt(pipe, x, prompts, changed, TO),
        lambda y: by_prompt(pipe, y, changed, prompts, TO),
    )
    chosen = by_concept(saes["TopK, vector"], seen, seen_scenes)
    added: dict[int, list[float]] = {}
    for i, target in enumerate(targets):
        latent, most = chosen["object", target]
        added.setdefault(latent, [0.0] * count)[i] = STRENGTH * most
    removed = {j: [-s for s in strengths] for j, strengths in added.items()}
    trip(
        "latent added",
        *(lambda x, f=f: by_latents(pipe, x, prompts, TO, f, adapter_name="vector") for f in (added, removed)),
    )
    trip(
        "latent added, inverted with it",
        lambda x: by_latents(pipe, x, prompts, TO, added, adapter_name="vector"),
        lambda y: without_latents(pipe, y, prompts, TO, added, adapter_name="vector"),
    )
    channel, latent = most_active_entry(saes["channel-aware"], seen)
    trip(
        "channel-aware entry times κ, one step",
        *(
            lambda x, s=s: by_latents(
                pipe, x, prompts, AT, {latent: s}, True, mode="scale", tokens=[channel], adapter_name="aware"
            )
            for s in (KAPPA, 1 / KAPPA)
        ),
    )
    return found


def most_active_entry(sae: SparseAutoencoder, seen: torch.Tensor) -> tuple[int, int]:
    """Channel and latent of the entry of the flattened code with the largest mean."""
    with torch.no_grad():
        mean = sae.encode(LAYOUTS["channels"].to_rows(seen[:256])).mean(0)
    return divmod(int(mean.argmax()), sae.n_latents)


@torch.no_grad()
def measures(
    judge: Any, x: torch.Tensor, y: torch.Tensor, back: torch.Tensor, targets: Sequence[str]
) -> dict[str, list[float]]:
    """Per image: distances of the edited image and of what came back to the original, and the judge's verdicts."""
    original, edited, restored = (look(judge, list(2 * images - 1)) for images in (x, y, back))
    mse = (x - back).square().mean((1, 2, 3))
    found = {
        "edit_pixels": (x - y).abs().mean((1, 2, 3)).tolist(),
        "edit_lpips": judge_distance(judge, x, y).tolist(),
        "edit_shows_target": [float(e["object"][0] == t) for e, t in zip(edited, targets, strict=True)],
        "edit_changes_object": [float(e["object"][0] != o["object"][0]) for e, o in zip(edited, original, strict=True)],
        "pixels": (x - back).abs().mean((1, 2, 3)).tolist(),
        "psnr": (-10 * mse.clamp(min=1e-10).log10()).tolist(),
        "lpips": judge_distance(judge, x, back).tolist(),
    }
    for factor in ("object", "style", "background"):
        found[f"same_{factor}"] = [float(r[factor][0] == o[factor][0]) for r, o in zip(restored, original, strict=True)]
    for kind in ("pixels", "lpips"):
        left, size = found[kind], found[f"edit_{kind}"]
        found[f"share_left_{kind}"] = [a / max(b, 1e-6) for a, b in zip(left, size, strict=True)]
    return found


def measure_consistency(
    pipe: Any, saes: Mapping[str, SparseAutoencoder], seen: torch.Tensor, seen_scenes: Sequence[Scene],
    scenes: Sequence[Scene], prompts: Sequence[str], out: Path,
) -> dict[str, Any]:  # fmt: skip
    """Round trips of images held out, generated from `prompts`, which say what `scenes` show."""
    images = torch.stack(list(generate(pipe, prompts, range(100, 100 + len(prompts))))) / 2 + 0.5
    targets, changed = other_objects(scenes, prompts)
    trips = round_trips(pipe, saes, seen, seen_scenes, images, prompts, targets, changed)
    judge = load_judge()
    per_image = {name: measures(judge, images, y, back, targets) for name, (y, back) in trips.items()}
    figures: dict[str, Any] = {"images": len(images), "strength": STRENGTH, "kappa": KAPPA}
    figures["ways"] = {
        name: {key: sum(values) / len(values) for key, values in one.items()} for name, one in per_image.items()
    }
    figures["against_prompt_editing"] = {
        name: {
            key: paired_t_test(per_image["prompt"][key], one[key]).as_dict()
            for key in ("pixels", "lpips", "share_left_pixels", "share_left_lpips")
        }
        for name, one in per_image.items()
        if name != "prompt"
    }
    for name, one in figures["ways"].items():
        print(name, {key: round(value, 4) for key, value in one.items()}, flush=True)
    blank = [""] * SHOWN
    rows = [Row("original", list(2 * images[:SHOWN] - 1), blank)]
    for name in ("prompt", "latent added"):
        y, back = trips[name]
        wanted = [f"to {t}" for t in targets[:SHOWN]]
        rows += [
            Row(f"{name}: edited", list(2 * y[:SHOWN] - 1), wanted),
            Row(f"{name}: undone", list(2 * back[:SHOWN] - 1), blank),
        ]
    back = trips["latent added, inverted with it"][1]
    rows.append(Row("latent added: undone, inverted with it", list(2 * back[:SHOWN] - 1), blank))
    draw_grid(rows, "Edits, and what comes back when they are undone", out / "consistency.png")
    return figures
