"""Edits of h-space at one timestep: images are inverted to it, one latent is moved, and the judge says what changed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from kinds import PATH, STEPS

from diffusers_sae import Directions, Inversion, Site, invert
from diffusers_sae.demo.pictures import Row, draw_grid
from diffusers_sae.demo.shipped import generate, load_judge, look
from diffusers_sae.demo.world import FACTORS, Scene
from diffusers_sae.layouts import LAYOUTS
from diffusers_sae.saes import SparseAutoencoder

IMAGES, OBJECTS = 6, 10
JUDGED = ("object", "style", "background")
NAMED = 1 / 3
"""Rise of the share of images that show a value, from which on a feature's effect is named after it."""


@dataclass(frozen=True)
class Setting:
    """How images are edited: inverted to `to`, at that step or at all from there on, at `strength` times a latent's
    largest activation; with how many latents, and how many random directions of the same lengths.

    With `guidance`, only the conditional branch is edited. As there is no prompt, the branches are the same but for the
    edit, so that guidance moves nothing else and multiplies what the edit does to the predicted noise.
    """

    to: float
    one_step: bool
    strength: float
    latents: int
    controls: int
    guidance: float = 1.0


SETTINGS = {
    "one step at 0.7 T": Setting(0.7, True, 100.0, 3, 0),
    "one step at 0.7 T, guidance 12": Setting(0.7, True, 20.0, 10, 4, 12.0),
    "all steps from 0.9 T": Setting(0.9, False, 30.0, 5, 3),
}


def by_concept(
    sae: SparseAutoencoder, seen: torch.Tensor, scenes: Sequence[Scene]
) -> dict[tuple[str, str], tuple[int, float]]:
    """`{(factor, value): (latent, largest activation)}` for the first objects: the latent that tells images with the
    value best from the others, by difference of means over standard deviation. `seen (N, C, H, W)`."""
    with torch.no_grad():
        z = sae.encode(LAYOUTS["vector"].to_rows(seen))[:, 0]  # (N, n)
    found = {}
    labels = torch.tensor([scene.labels()["object"] for scene in scenes])
    for i, value in enumerate(FACTORS["object"][:OBJECTS]):
        shows = labels == i
        gap = (z[shows].mean(0) - z[~shows].mean(0)) / (z.std(0) + 1e-3 * z.std())
        best = int(gap.argmax())
        found["object", value] = best, float(z[:, best].amax())
    return found


def shares(judge: Any, images: torch.Tensor) -> dict[tuple[str, str], float]:
    """Share of images `(N, 3, H, W)` in [0, 1] that show each value, as the judge sees them."""
    seen = look(judge, list(2 * images - 1))
    return {
        (factor, value): sum(one[factor][0] == value for one in seen) / len(seen)
        for factor in JUDGED
        for value in FACTORS[factor]
    }


def effect(judge: Any, before: torch.Tensor, after: torch.Tensor) -> tuple[str, str, float]:
    """The value whose share rose most, and by how much."""
    base, now = shares(judge, before), shares(judge, after)
    factor, value = max(now, key=lambda key: now[key] - base[key])
    return factor, value, now[factor, value] - base[factor, value]


def ran(pipe: Any, inversion: Inversion, guidance: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `(N, 3, H, W)` and h `(N, C, H, W)` of the first step."""
    with pipe.capture([PATH]) as activations:
        images = inversion.run(pipe, output_type="pt", guidance_scale=guidance).images.float().cpu()
    seen = activations[PATH]
    return images, seen.select("cond", seen.timestep.max().item())


def measured(
    pipe: Any, judge: Any, inversion: Inversion, base: tuple[torch.Tensor, torch.Tensor],
    guidance: float = 1.0, **steer: Any,
) -> tuple[torch.Tensor, dict[str, Any]]:  # fmt: skip
    """Images of a run with an edit, and what it did."""
    with pipe.steering(**steer):
        images, h = ran(pipe, inversion, guidance)
    told: dict[str, Any] = {
        "mean_change": float((images - base[0]).abs().mean()),
        "h_changed": float((h != base[1]).double().mean()),
    }
    if judge is not None:
        factor, value, rise = effect(judge, base[0], images)
        told |= {"effect": f"{factor}: {value}", "rise": rise, "named": rise >= NAMED}
    return images, told


def measure_edits(
    pipe: Any, saes: dict[str, SparseAutoencoder], seen: torch.Tensor, scenes: Sequence[Scene],
    prompts: Sequence[str], out: Path, few: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Edits of images held out, generated from `prompts` and inverted without a prompt; with `scenes`, by concept;
    with `few`, of one latent of one image.

    The SAEs are loaded into the pipeline already: that of whole maps as `vector`, the channel-aware one as `aware`.
    """
    some = list(prompts[: 1 if few else IMAGES])
    images = torch.stack(list(generate(pipe, some, range(len(some))))) / 2 + 0.5
    judge = load_judge() if scenes else None
    figures: dict[str, Any] = {"images": len(some), "named_from_rise": NAMED}
    vector, aware = saes["TopK, vector"], saes["channel-aware"]
    chosen = by_concept(vector, seen, scenes) if scenes else _most_active(vector, seen)
    torch.manual_seed(5)
    drawn = torch.nn.functional.normalize(torch.randn(len(chosen), vector.d_in), dim=-1)
    pipe.load_sae(Directions.of(drawn), Site(PATH, layout="vector"), adapter_name="random")
    for name, how in SETTINGS.items():
        inversion = invert(pipe, images, "", how.to, num_inference_steps=STEPS, iterations=2)
        base = ran(pipe, inversion)
        window = inversion.window(at=how.to) if how.one_step else {}
        steer: dict[str, Any] = {"guidance": how.guidance, "branch": "both" if how.guidance == 1 else "cond", **window}
        features: list[dict[str, Any]] = []
        at_random: list[dict[str, Any]] = []
        rows = [Row("not edited", list(2 * base[0] - 1), [""] * len(some))]
        for i, ((factor, value), (latent, most)) in enumerate(islice(chosen.items(), 1 if few else how.latents)):
            edited, told = measured(
                pipe, judge, inversion, base, features={latent: how.strength * most}, adapter_name="vector", **steer
            )
            features.append({"chosen_for": f"{factor}: {value}", "latent": latent, **told})
            effect_of = f"{told['effect']} +{told['rise']:.0%}" if told.get("named") else "no named effect"
            rows.append(
                Row(f"latent {latent}, chosen for {value}: {effect_of}", list(2 * edited - 1), [""] * len(some))
            )
            if i < (0 if few else how.controls):
                _, control = measured(
                    pipe, judge, inversion, base, features={i: how.strength * most}, adapter_name="random", **steer
                )
                at_random.append(control)
        named = [f for f in features if f.get("named")]
        counts = {
            "named": len(named), "of": len(features),
            "different_names": len({f["effect"] for f in named}),
            "as_chosen": sum(f["effect"] == f["chosen_for"] for f in named),
            "named_at_random": sum(one.get("named", False) for one in at_random), "of_random": len(at_random),
        }  # fmt: skip
        figures[name] = {
            "strength": how.strength, "guidance": how.guidance, "unedited": _distance(base[0], images), **counts,
            "features": features, "random": at_random,
        }  # fmt: skip
        print(name, counts, flush=True)
        draw_grid(rows, f"One latent of h-space, {name}", out / f"{re.sub('[^a-z0-9]+', '_', name.lower())}.png")
        if name == "one step at 0.7 T":
            figures["components"] = components(pipe, judge, aware, seen, inversion, base, window)
    return figures


def components(
    pipe: Any, judge: Any, aware: SparseAutoencoder, seen: torch.Tensor, inversion: Inversion, base: Any,
    window: dict[str, float], count: int = 3, kappas: Sequence[float] = (1000.0,),
) -> list[dict[str, Any]]:  # fmt: skip
    """The paper's own edit: the most active entries of the flattened code, one latent of one channel, times κ."""
    with torch.no_grad():
        mean = aware.encode(LAYOUTS["channels"].to_rows(seen[:256])).mean(0)  # (channels, n)
    found = []
    for entry in mean.flatten().topk(count).indices.tolist():
        channel, latent = divmod(entry, aware.n_latents)
        for kappa in kappas:
            _, told = measured(
                pipe, judge, inversion, base, features={latent: kappa}, mode="scale", tokens=[channel],
                adapter_name="aware", **window,
            )  # fmt: skip
            found.append({"channel": channel, "latent": latent, "kappa": kappa, **told})
    return found


def _most_active(sae: SparseAutoencoder, seen: torch.Tensor) -> dict[tuple[str, str], tuple[int, float]]:
    with torch.no_grad():
        z = sae.encode(LAYOUTS["vector"].to_rows(seen))[:, 0]
    top = z.mean(0).topk(OBJECTS).indices.tolist()
    return {("most active", str(j)): (j, float(z[:, j].amax())) for j in top}


def _distance(images: torch.Tensor, others: torch.Tensor) -> float:
    return float((images - others).abs().mean())
