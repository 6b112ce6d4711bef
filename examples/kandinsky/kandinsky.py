"""An SAE of the image embeddings between Kandinsky's prior and decoder: features moved from picture to picture, banned,
stacked. See README.md here.

python examples/kandinsky/kandinsky.py
python examples/kandinsky/kandinsky.py --model kandinsky-community/kandinsky-2-2-decoder --sae gytdau/clip-sae-128 \
    --prompts prompts.txt --size 512
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoPipelineForText2Image, KandinskyV22Pipeline, KandinskyV22PriorPipeline

from diffusers_sae import Rule, SAESteeringPipeline, load_sae
from diffusers_sae.adapters.image_embeds import transferred, turned
from diffusers_sae.demo.judge import Judge
from diffusers_sae.demo.kandinsky import KANDINSKY_CALL, load_kandinsky
from diffusers_sae.demo.pictures import Row, draw_grid
from diffusers_sae.demo.shipped import MODELS, load_judge
from diffusers_sae.demo.world import BACKGROUNDS, STYLES, THINGS, Scene
from diffusers_sae.evaluation.probes import ridge_weights
from diffusers_sae.evaluation.reconstruction import ReconstructionMeter
from diffusers_sae.evaluation.rows import Rows
from diffusers_sae.evaluation.shares import Share
from diffusers_sae.saes import SparseAutoencoder

SEED = 91_000
JUDGED = ("object", "style", "background")
BATCH = 32

SMOKE = argparse.Namespace(captions=256, pairs=4, banned=4)


class Kandinsky:
    """A prior and a decoder, and how images `(N, 3, H, W)` in [0, 1] are made and embedded with them."""

    def __init__(self, pipe: Any, size: int, call: Mapping[str, Any]) -> None:
        self.pipe, self.size, self.call = pipe, size, dict(call)
        prior = {name.removeprefix("prior_"): x for name, x in pipe.components.items() if name.startswith("prior_")}
        self.prior = KandinskyV22PriorPipeline(**prior)
        decoder = KandinskyV22Pipeline(**{name: pipe.components[name] for name in ("unet", "scheduler", "movq")})
        self.decoder = SAESteeringPipeline.from_pipe(decoder)
        for one in (self.prior, self.decoder):
            one.set_progress_bar_config(disable=True)
        self.nothing = self.prior.get_zero_embed()

    def embeds_of(self, prompts: Sequence[str]) -> torch.Tensor:
        """What the prior makes of prompts, `(N, d)`."""
        found = []
        for start in range(0, len(prompts), 256):
            generator = torch.Generator().manual_seed(SEED + start)
            part, steps = list(prompts[start : start + 256]), self.call["prior_num_inference_steps"]
            scale = self.call["prior_guidance_scale"]
            made = self.prior(part, num_inference_steps=steps, guidance_scale=scale, generator=generator)
            found.append(made.image_embeds)
        return torch.cat(found)

    @torch.no_grad()
    def seen_in(self, images: torch.Tensor) -> torch.Tensor:
        """The embeddings `(N, d)` of images."""
        found = []
        for part in images.split(BATCH):
            pictures = [x.permute(1, 2, 0).mul(255).round().byte().numpy() for x in part]
            pixels = self.prior.image_processor(pictures, return_tensors="pt").pixel_values
            found.append(self.prior.image_encoder(pixels.to(self.prior.image_encoder.dtype)).image_embeds)
        return torch.cat(found)

    def images_of(self, embeds: torch.Tensor, first: int = 0) -> torch.Tensor:
        """An image of each embedding, from noise of its own."""
        return torch.cat(list(self._images_of(embeds, first)))

    def _images_of(self, embeds: torch.Tensor, first: int) -> Iterator[torch.Tensor]:
        steps, scale = self.call["num_inference_steps"], self.call["guidance_scale"]
        for start in range(0, len(embeds), BATCH):
            part = embeds[start : start + BATCH]
            generators = [torch.Generator().manual_seed(SEED + first + start + i) for i in range(len(part))]
            made = self.decoder(
                part, self.nothing.expand_as(part), height=self.size, width=self.size, num_inference_steps=steps,
                guidance_scale=scale, generator=generators, output_type="pt",
            ).images  # fmt: skip
            yield (made.float() / 2 + 0.5).clamp(0, 1)


def explained(codes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`(n,)`: the share of each latent's variance over `codes (N, n)` that labels `(N,)` explain (eta squared)."""
    shows = torch.nn.functional.one_hot(labels).to(codes)  # (N, classes)
    means = shows.T @ codes / shows.sum(0)[:, None].clamp(min=1)
    between = (shows.sum(0)[:, None] * (means - codes.mean(0)).square()).sum(0)
    return between / (codes - codes.mean(0)).square().sum(0).clamp(min=1e-12)


def sets_of_features(codes: torch.Tensor, scenes: Sequence[Scene], least: float) -> dict[str, list[int]]:
    """For each factor, the latents whose variance it explains best of all factors, if it explains `least` or more."""
    shares = {f: explained(codes, torch.tensor([s.labels()[f] for s in scenes])) for f in JUDGED}
    best = torch.stack(list(shares.values())).argmax(0)
    alive = codes.count_nonzero(0) > 0
    return {f: ((best == i) & (shares[f] >= least) & alive).nonzero().flatten().tolist() for i, f in enumerate(JUDGED)}


def plain_scenes(count: int, seed: int) -> list[Scene]:
    """Scenes of things (people have factors of their own) in which every factor is told."""
    rng = random.Random(seed)
    return [Scene(rng.choice(THINGS), rng.choice(STYLES), rng.choice(BACKGROUNDS)) for _ in range(count)]


def seen(judge: Judge, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Classes `(N,)` of every factor."""
    found = [judge.look(2 * part - 1).classes for part in images.split(64)]
    return {f: torch.cat([one[f] for one in found]) for f in JUDGED}


def figures_of(columns: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Shares of hits `(N,)`, each of the same N pictures, and the hits themselves."""
    return rows_of(columns).figures()


def rows_of(columns: Mapping[str, torch.Tensor]) -> Rows:
    return Rows(range(len(next(iter(columns.values())))), {name: hits.tolist() for name, hits in columns.items()})


def moved_and_kept(
    factor: str,
    now: Mapping[str, torch.Tensor],
    own: Mapping[str, torch.Tensor],
    other: Mapping[str, torch.Tensor],
) -> dict[str, Any]:
    """Whether what is seen `now` has the other's factor, and its own others: two judgements of one picture."""
    others = [f for f in JUDGED if f != factor]
    rows = rows_of({"moved": now[factor] == other[factor], **{f: now[f] == own[f] for f in others}})
    return {
        "moved": rows.share("moved").as_dict(),
        "kept": sum((rows.share(f) for f in others), Share()).as_dict(),
        "each kept": {f: rows.share(f).as_dict() for f in others},
        "rows": rows.as_dict(),
    }


def transfers(
    kandinsky: Kandinsky, sae: SparseAutoencoder, sets: Mapping[str, list[int]], judge: Judge, pairs: int
) -> tuple[dict[str, Any], list[Row]]:
    """One factor's features moved from one picture to another, for every factor, over pairs of pictures: in the
    embeddings that the pictures were drawn from, and in those that the image tower sees in them."""
    scenes = plain_scenes(2 * pairs, SEED + 1)
    made = kandinsky.embeds_of([s.caption() for s in scenes])
    photos = kandinsky.images_of(made)
    shown = seen(judge, photos)
    drawn = figures_of({f: shown[f] == torch.tensor([s.labels()[f] for s in scenes]) for f in JUDGED})
    figures: dict[str, Any] = {"drawn as asked": drawn}
    rows = [
        Row("to", list(2 * photos[:8] - 1), [""] * 8),
        Row("from", list(2 * photos[pairs : pairs + 8] - 1), [""] * 8),
    ]
    for name, embeds in (("of the prior", made), ("seen anew", kandinsky.seen_in(photos))):
        figures[f"embeddings {name}"], moved = _transfers_of(kandinsky, sae, sets, judge, embeds, shown)
        rows += [Row(f"{factor}: features moved, embeddings {name}", images, [""] * 8) for factor, images in moved]
    return figures, rows


def _transfers_of(
    kandinsky: Kandinsky, sae: SparseAutoencoder, sets: Mapping[str, list[int]], judge: Judge,
    embeds: torch.Tensor, shown: Mapping[str, torch.Tensor],
) -> tuple[dict[str, Any], list[tuple[str, list[torch.Tensor]]]]:  # fmt: skip
    """From the second half of `embeds (2 pairs, d)` to the first; `shown` is what the pictures show."""
    target, source = embeds.chunk(2)
    own, other = ({f: labels.chunk(2)[i] for f, labels in shown.items()} for i in (0, 1))
    again = seen(judge, kandinsky.images_of(target, 10_000))
    figures: dict[str, Any] = {
        "seen again when drawn anew": figures_of({f: again[f] == own[f] for f in JUDGED}),
        "already alike": figures_of({f: own[f] == other[f] for f in JUDGED}),
    }
    moved = []
    for factor, features in sets.items():
        images = kandinsky.images_of(transferred(sae, target, source, features), 10_000)
        now = seen(judge, images)
        figures[factor] = {
            "features": len(features),
            "against the pictures": moved_and_kept(factor, now, own, other),
            "against the unedited embedding, decoded": moved_and_kept(factor, now, again, other),
        }
        moved.append((factor, list(2 * images[:8] - 1)))
        print(factor, json.dumps(figures[factor]), flush=True)
    return figures, moved


def latents_of(codes: torch.Tensor, labels: torch.Tensor, value: int, least: float = 0.5) -> list[int]:
    """Latents that are active on average at least `least` as much on rows of one label as on all labels together."""
    shows = torch.nn.functional.one_hot(labels).to(codes)
    means = shows.T @ codes / shows.sum(0)[:, None].clamp(min=1)
    return (means[value] / means.sum(0).clamp(min=1e-12) >= least).nonzero().flatten().tolist()


def rule_for(codes: torch.Tensor, shows: torch.Tensor) -> Rule:
    """A rule that holds for rows `(N, n)` that show something, `shows (N,)`: ridge regression of that on their codes.

    The bound is where as large a share of those rows is missed as of the others is caught.
    """
    x = codes.double().numpy()
    (weights,) = ridge_weights(x - x.mean(0), (shows.double() - shows.double().mean())[:, None].numpy(), [1e-3])
    told = torch.from_numpy(x @ weights[:, 0])
    bounds = told.sort().values
    missed = torch.searchsorted(told[shows].sort().values, bounds) / shows.sum()
    caught = 1 - torch.searchsorted(told[~shows].sort().values, bounds) / (~shows).sum()
    above = float(bounds[(missed - caught).abs().argmin()])
    return Rule({j: float(w) for j, w in enumerate(weights[:, 0]) if w}, above=above)


def bans(
    kandinsky: Kandinsky, sae: SparseAutoencoder, codes: torch.Tensor, scenes: Sequence[Scene], judge: Judge, count: int
) -> tuple[dict[str, Any], Row]:
    """Red backgrounds banned, and banned only where a cat is, on pictures of cats and of other things, all on red."""
    labels = {f: torch.tensor([s.labels()[f] for s in scenes]) for f in JUDGED}
    red = latents_of(codes, labels["background"], BACKGROUNDS.index("red"))
    if not red:
        raise SystemExit("No latent tells red backgrounds; take an SAE with more latents.")
    cats = rule_for(codes, labels["object"] == THINGS.index("cat"))
    asked = [
        replace(s, background="red", object="cat" if i % 2 else s.object)
        for i, s in enumerate(plain_scenes(count, SEED + 2))
    ]
    is_cat = torch.tensor([s.object == "cat" for s in asked])
    embeds = kandinsky.embeds_of([s.caption() for s in asked])
    pipe = kandinsky.decoder
    pipe.load_sae(sae, site="image_embeds", adapter_name="clip")
    ban = dict.fromkeys(red, 1.0)
    plans: dict[str, dict[str, Any] | None] = {
        "no ban": None,
        "ban": {},
        "ban where a cat is": {"when": cats},
    }
    figures: dict[str, Any] = {"latents of red": red, "latents of the rule about cats": len(cats.features)}
    shown: list[torch.Tensor] = []
    for name, options in plans.items():
        pipe.reset_steering()
        if options is not None:
            pipe.steer(ban, mode="ablate", **options)
        images = kandinsky.images_of(embeds, 20_000)
        now = seen(judge, images)
        is_red = now["background"] == BACKGROUNDS.index("red")
        own = {f: torch.tensor([s.labels()[f] for s in asked]) for f in ("object", "style")}
        red_of = {
            kind: [bool(red) if cat == here else None for red, cat in zip(is_red, is_cat, strict=True)]
            for kind, here in (("red, cats", True), ("red, others", False))
        }
        rows = Rows(range(count), {**red_of, **{f: (now[f] == own[f]).tolist() for f in own}})
        figures[name] = {
            **{kind: rows.share(kind).as_dict() for kind in red_of},
            "object and style kept": (rows.share("object") + rows.share("style")).as_dict(),
            "rows": rows.as_dict(),
        }
        shown += list(2 * images[:2] - 1)
        print(name, json.dumps(figures[name]), flush=True)
    pipe.unload_sae()
    captions = [f"{name}: {asked[i].object}" for name in plans for i in range(2)]
    return figures, Row("red backgrounds banned, always and only beside a cat", shown, captions)


def icons(kandinsky: Kandinsky, sae: SparseAutoencoder, codes: torch.Tensor, average: torch.Tensor, count: int) -> Row:
    """The most active latents, each at 7.5 times its largest activation on the average embedding (Daujotas, 2024)."""
    chosen = codes.mean(0).topk(count).indices.tolist()
    edited = torch.cat([turned(sae, average, {j: 7.5 * float(codes[:, j].max())}) for j in chosen])
    images = kandinsky.images_of(edited, 30_000)
    return Row("icons: one latent at 7.5 times its maximum", list(2 * images - 1), [str(j) for j in chosen])


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name of a Kandinsky 2.2 decoder; by default emoji-kandinsky")
    parser.add_argument("--sae", help="folder or hub name of an SAE of its image embeddings")
    parser.add_argument("--prompts", type=Path, help="file of prompts, one a line, for another model")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--captions", type=int, default=1024, help="whose embeddings tell what the latents are about")
    parser.add_argument("--pairs", type=int, default=28, help="of pictures, for the transfers")
    parser.add_argument("--banned", type=int, default=24, help="pictures to ban something in")
    parser.add_argument("--least", type=float, default=0.1, help="variance that a factor must explain of its latents")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("kandinsky-out"))
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, only to see that it runs")
    args = parser.parse_args(namespace=SMOKE if "--smoke" in sys.argv[1:] else None)
    if args.model is not None and (args.prompts is None or args.sae is None):
        parser.error("--model needs --sae and --prompts, of which the pictures are made.")
    return args


def of_another_model(args: argparse.Namespace) -> None:
    """What can be done without labels and a judge: icons, and whole pictures moved towards each other."""
    pipe = AutoPipelineForText2Image.from_pretrained(args.model).to(args.device)
    kandinsky = Kandinsky(pipe, args.size, {**KANDINSKY_CALL, "num_inference_steps": 50, "guidance_scale": 4.0})
    prompts = [line for line in args.prompts.read_text().splitlines() if line.strip()]
    sae, embeds = load_sae(args.sae).to(args.device), kandinsky.embeds_of(prompts)
    codes = sae.encode(embeds)
    shares = [i / 6 for i in range(7)]
    mixed = torch.cat([transferred(sae, embeds[:1], embeds[1:2], share=a) for a in shares])
    row = Row(
        "from the first prompt to the second", list(2 * kandinsky.images_of(mixed) - 1), [f"{a:.2f}" for a in shares]
    )
    draw_grid(
        [row, icons(kandinsky, sae, codes, embeds.mean(0, keepdim=True), 8)], args.model, args.out / "kandinsky.png"
    )


@torch.no_grad()
def main() -> None:
    args = parsed()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.model is not None:
        of_another_model(args)
        return
    if args.smoke:
        KANDINSKY_CALL.update(num_inference_steps=2, prior_num_inference_steps=2)
    begin, busy = time.perf_counter(), time.process_time()
    kandinsky, judge = Kandinsky(load_kandinsky(), args.size, KANDINSKY_CALL), load_judge()
    sae = load_sae(args.sae or MODELS / "emoji-kandinsky" / "sae")
    scenes = plain_scenes(args.captions, SEED)
    embeds = kandinsky.embeds_of([s.caption() for s in scenes])
    codes = sae.encode(embeds)
    sets = sets_of_features(codes, scenes, args.least)
    meter = ReconstructionMeter(sae)
    meter.add(0.0, embeds)
    figures: dict[str, Any] = {"sae": {name: meter.figures()[name] for name in ("fvu", "cosine", "l0")}}
    print(figures, {f: len(j) for f, j in sets.items()}, f"{time.perf_counter() - begin:.0f} s", flush=True)
    figures["transfer"], rows = transfers(kandinsky, sae, sets, judge, args.pairs)
    figures["bans"], row = bans(kandinsky, sae, codes, scenes, judge, args.banned)
    rows += [row, icons(kandinsky, sae, codes, embeds.mean(0, keepdim=True), 8)]
    draw_grid(rows, "Kandinsky: features of image embeddings", args.out / "kandinsky.png")
    figures["seconds"] = {
        "whole": round(time.perf_counter() - begin),
        "of processor": round(time.process_time() - busy),
    }
    figures["threads"] = torch.get_num_threads()
    (args.out / "kandinsky.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
