"""Edits of a VAE's latents: sweeps, what the judge says of them, pairs that undo each other, paths between images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffusers_sae import Directions, Site
from diffusers_sae.adapters.image_embeds import transferred
from diffusers_sae.demo.judge import Judge
from diffusers_sae.demo.pictures import Row, draw_grid
from diffusers_sae.demo.world import FACTORS, Scene
from diffusers_sae.features.ranking import most_active, opposite_pairs
from diffusers_sae.features.sweeps import sweep
from diffusers_sae.saes import SparseAutoencoder

SWEPT = (-10.0, -4.0, 0.0, 5.0, 10.0)
"""Strengths of the paper, added to a latent's raw activation."""
JUDGED = ("object", "style", "background")
NAMED = 1 / 3
"""Rise of the share of images that show a value, from which on a feature is named after it."""
ALPHAS = tuple(i / 8 for i in range(9))
CARRIED = (1, 2, 4, 8, 16, 32, None)
"""How many features, those that differ most, are carried from the target to the source; `None`: all."""
TOP, IMAGES, PAIRS = 10, 32, 64


class Looker:
    """The judge, and what the images held out show."""

    def __init__(self, judge: Judge, scenes: Sequence[Scene]) -> None:
        self.judge, self.scenes = judge, scenes
        self.labels = {f: torch.tensor([scene.labels()[f] for scene in scenes]) for f in JUDGED}

    def seen(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Classes `(N,)` of every factor in images `(N, 3, 64, 64)` in [0, 1]."""
        found = [self.judge.look(2 * part - 1).classes for part in images.split(64)]
        return {factor: torch.cat([one[factor] for one in found]) for factor in JUDGED}

    def accuracy(self, images: torch.Tensor) -> dict[str, float]:
        """Share of the images held out that show what they should."""
        seen = self.seen(images)
        return {f: float((seen[f] == self.labels[f][: len(images)]).double().mean()) for f in JUDGED}

    def effect(self, base: Mapping[str, torch.Tensor], images: torch.Tensor) -> dict[str, Any]:
        """The value whose share of images rises most over what was `seen`, by how much, and if that makes a name."""
        now = self.seen(images)
        rises = {
            (f, value): float((now[f] == i).double().mean() - (base[f] == i).double().mean())
            for f in JUDGED
            for i, value in enumerate(FACTORS[f])
        }
        (factor, value), rise = max(rises.items(), key=lambda item: item[1])
        return {"factor": factor, "value": value, "rise": round(rise, 3), "named": rise >= NAMED}


def decoded(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Images `(N, 3, 64, 64)` in [0, 1] of latents `(N, d)`, with the edits in force."""
    return pipe(latents=latents, output_type="pt").images.float().cpu()


def effects(
    pipe: Any, looker: Looker, features: Sequence[int], adapter: str, latents: torch.Tensor, strength: float = 10.0
) -> dict[int, dict[str, Any]]:
    """What each feature does to images of `latents (N, d)` at plus and at minus `strength`."""
    base, found = looker.seen(decoded(pipe, latents)), {}
    for j in features:
        found[j] = {}
        for sign in (strength, -strength):
            with pipe.steering({j: sign}, adapter_name=adapter):
                found[j][f"{sign:+g}"] = looker.effect(base, decoded(pipe, latents))
    return found


def told_of(effect: Mapping[str, Any] | None) -> str:
    if effect is None:
        return ""
    named = [f"{sign}: {e['value']} {e['rise']:+.0%}" for sign, e in effect.items() if e["named"]]
    return "; ".join(named) or "no name"


def named_share(found: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    names = {j: [f"{sign} {e['factor']}: {e['value']}" for sign, e in both.items() if e["named"]]
             for j, both in found.items()}  # fmt: skip
    return {
        "named": sum(map(bool, names.values())),
        "of": len(names),
        "different": len({n for v in names.values() for n in v}),
    }


def undone(pipe: Any, sae: SparseAutoencoder, adapter: str, latents: torch.Tensor) -> list[dict[str, Any]]:
    """The most opposite pairs of live features; `left`: what both together move pixels by, over what the first does."""
    live = most_active(sae.statistics, sae.n_latents)
    base, found = decoded(pipe, latents), []
    for first, second, cosine in opposite_pairs(sae, live, below=0.0, count=5):
        moves = []
        for features in ({first: 10.0}, {first: 10.0, second: 10.0}):
            with pipe.steering(features, adapter_name=adapter):
                moves.append(float((decoded(pipe, latents) - base).abs().mean()))
        found.append(
            {"first": first, "second": second, "cosine": round(cosine, 3), "left": round(moves[1] / moves[0], 3)}
        )
    return found


def pairs_of(looker: Looker | None, count: int, total: int) -> list[tuple[int, int]]:
    """Pairs of images held out; with labels, only those that differ in object, style and background."""
    pairs = [(i, (i + step) % total) for step in (1, 2, 3) for i in range(total)]
    if looker is not None:
        pairs = [(i, j) for i, j in pairs if all(looker.labels[f][i] != looker.labels[f][j] for f in JUDGED)]
    return pairs[:count]


def interpolated(sae: SparseAutoencoder, source: torch.Tensor, target: torch.Tensor, alpha: float) -> torch.Tensor:
    """The paper's interpolation: `dec((1 - α) enc(source) + α enc(target))`, `(N, d)`."""
    with torch.no_grad():
        return sae.decode((1 - alpha) * sae.encode(source) + alpha * sae.encode(target))


def carried(sae: SparseAutoencoder, source: torch.Tensor, target: torch.Tensor, count: int | None) -> torch.Tensor:
    """Latents `(N, d)` with the features in which a source and its target differ most as the target has them."""
    if count is None:
        return transferred(sae, source, target)
    with torch.no_grad():
        most = (sae.encode(target) - sae.encode(source)).abs().topk(count).indices
    rows = zip(source, target, most.tolist(), strict=True)
    return torch.stack([transferred(sae, s, t, features) for s, t, features in rows])


def paths(
    pipe: Any, sae: SparseAutoencoder, latents: torch.Tensor, pairs: Sequence[tuple[int, int]], looker: Looker | None
) -> dict[str, Any]:
    """How far paths between images lie apart, in pixels of [0, 1]; and what of source and target is seen on the way."""
    ends = torch.tensor(pairs)
    source, target = latents[ends[:, 0]], latents[ends[:, 1]]
    images = decoded(pipe, source), decoded(pipe, target)
    away = (images[0] - images[1]).abs().mean()
    told: dict[str, Any] = {"pairs": len(pairs), "source to target": float(away), "interpolation": {}, "carried": {}}
    ways = {
        "code": lambda a: interpolated(sae, source, target, a),
        "code, residual kept": lambda a: transferred(sae, source, target, share=a),
        "plain latents": lambda a: torch.lerp(source, target, a),
    }
    plain = {a: decoded(pipe, ways["plain latents"](a)) for a in (0.0, 0.5, 1.0)}
    for name, way in ways.items():
        here = {a: decoded(pipe, way(a)) for a in plain}
        told["interpolation"][name] = {
            f"from plain latents at {a:g}": round(float((here[a] - plain[a]).abs().mean()), 4) for a in plain
        }
    for count in CARRIED:
        edited = decoded(pipe, carried(sae, source, target, count))
        one: dict[str, Any] = {"from target": round(float((edited - images[1]).abs().mean()), 4)}
        if looker is not None:
            seen = looker.seen(edited)
            for which, i in (("source", 0), ("target", 1)):
                wanted = {f: looker.labels[f][ends[:, i]] for f in JUDGED}
                one[which] = {f: round(float((seen[f] == wanted[f]).double().mean()), 3) for f in JUDGED}
        told["carried"]["all" if count is None else str(count)] = one
    return told


def measure_edits(
    pipe: Any, saes: Mapping[str, SparseAutoencoder], latents: torch.Tensor, pixels: torch.Tensor,
    looker: Looker | None, out: Path,
) -> dict[str, Any]:  # fmt: skip
    """All figures of edits of the latents held out `(N, d)`, whose images are `pixels` in [-1, 1], and the picture."""
    again = decoded(pipe, latents)
    told: dict[str, Any] = {"vae": {"mse of [-1, 1]": float((2 * again - 1 - pixels).square().mean())}}
    some = latents[:IMAGES]
    if looker is not None:
        told["vae"] |= {"judge": looker.accuracy(again), "judge, images themselves": looker.accuracy(pixels / 2 + 0.5)}
        torch.manual_seed(5)
        drawn = Directions.of(torch.nn.functional.normalize(torch.randn(TOP, latents.shape[1]), dim=-1))
        pipe.load_sae(drawn, Site("latent"), adapter_name="random")
        found = effects(pipe, looker, range(TOP), "random", some)
        told["random"] = named_share(found) | {"features": found}
    pairs = pairs_of(looker, PAIRS, len(latents))
    for name, sae in saes.items():
        top = most_active(sae.statistics, TOP)
        told[name] = {
            "top": top,
            "opposite": undone(pipe, sae, name, some),
            "paths": paths(pipe, sae, latents, pairs, looker),
        }
        if looker is not None:
            found = effects(pipe, looker, top, name, some)
            told[name] |= named_share(found) | {"features": found}
    draw(pipe, saes, latents, pixels, pairs, told, out / "vae.png")
    return told


def draw(pipe: Any, saes: Mapping[str, SparseAutoencoder], latents: torch.Tensor, pixels: torch.Tensor,
         pairs: Sequence[tuple[int, int]], told: Mapping[str, Any], file: Path) -> None:  # fmt: skip
    """One picture of everything, with the first SAE."""
    name, sae = next(iter(saes.items()))
    shown = slice(0, 10)
    rows = [
        Row("images held out", list(pixels[shown]), [""] * 10),
        Row("through the VAE", _signed(decoded(pipe, latents[shown])), [""] * 10),
    ]
    features = told[name].get("features", {})
    base = latents[:1]
    half = [(j, _signed(sweep(pipe, j, SWEPT, {"adapter_name": name}, latents=base, output_type="pt")[0]))
            for j in told[name]["top"]]  # fmt: skip
    captions = [f"{s:+g}" if s else "0" for s in SWEPT]
    for (i, left), (j, right) in zip(half[::2], half[1::2], strict=False):
        headline = f"latent {i} ({told_of(features.get(i))})   |   latent {j} ({told_of(features.get(j))})"
        rows.append(Row(headline, [*left, *right], captions * 2))
    opposite = told[name]["opposite"][:2]
    if opposite:
        rows.append(_opposite_row(pipe, name, base, opposite))
    source, target = (latents[[i]] for i in pairs[0])
    paths_drawn = {
        "interpolation in SAE space": [interpolated(sae, source, target, a) for a in ALPHAS],
        "interpolation of plain latents": [torch.lerp(source, target, a) for a in ALPHAS],
    }
    for headline, path in paths_drawn.items():
        rows.append(Row(headline, _signed(decoded(pipe, torch.cat(path))), [f"{a:g}" for a in ALPHAS]))
    for i, j in pairs[1:3]:
        path = torch.cat([latents[[i]], *(carried(sae, latents[[i]], latents[[j]], n) for n in CARRIED), latents[[j]]])
        words = ["source", *("all" if n is None else f"the first {n}" for n in CARRIED), "target"]
        rows.append(Row("source towards target, by the features that differ most", _signed(decoded(pipe, path)), words))
    draw_grid(rows, "A VAE's latents through an SAE with tied weights", file)
    Image.open(file).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)


def _opposite_row(pipe: Any, name: str, base: torch.Tensor, pairs: Sequence[Mapping[str, Any]]) -> Row:
    images, captions = [], []
    for pair in pairs:
        first, second = pair["first"], pair["second"]
        images += _signed(decoded(pipe, base))
        captions.append(f"cosine {pair['cosine']:.2f}")
        for features in ({first: 10.0}, {second: 10.0}, {first: 10.0, second: 10.0}):
            with pipe.steering(features, adapter_name=name):
                images += _signed(decoded(pipe, base))
            captions.append(" and ".join(f"+10 of {j}" for j in features))
    return Row("pairs that undo each other", images, captions)


def _signed(images: Any) -> list[torch.Tensor]:
    """Images in [0, 1], as images in [-1, 1]."""
    return [2 * image.cpu() - 1 for image in images]
