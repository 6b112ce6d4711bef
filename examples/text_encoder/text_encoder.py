"""An SAE of a text encoder's tokens: features named by words, steering towards them, removal. See README.md here.

python examples/text_encoder/text_encoder.py
python examples/text_encoder/text_encoder.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --clip openai/clip-vit-large-patch14 --captions captions.txt --prompts prompts.txt
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from diffusers_sae import InputError, SAESteeringPipeline, Site, TopKSAE
from diffusers_sae.capture.text import TokenActivations, read_prompts, tokenizer_of
from diffusers_sae.demo.measure_removal import REMOVAL, cells_of, draw_cells, edits_away, outcomes, sightings
from diffusers_sae.demo.pictures import Row, draw_grid
from diffusers_sae.demo.shipped import CALL, MODELS, SITES, load_detectors, load_judge, load_scores, look
from diffusers_sae.demo.world import BACKGROUNDS, CONCEPTS, STYLES, THINGS, grid, sample_captions
from diffusers_sae.evaluation.paired import paired_t_test
from diffusers_sae.evaluation.reconstruction import ReconstructionMeter
from diffusers_sae.evaluation.rows import Rows
from diffusers_sae.evaluation.shares import Share
from diffusers_sae.evaluation.text_similarity import TextSimilarity
from diffusers_sae.evaluation.unlearning import UnlearningAccuracy, unlearning_accuracy
from diffusers_sae.features.words import (
    WordFeature,
    best_for_words,
    latents_of,
    name_features,
    parts_of_speech,
    word_table,
)
from diffusers_sae.saes import StatisticsAccumulator
from diffusers_sae.training import TrainingConfig
from diffusers_sae.training.from_rows import train_on_rows

SEED = 70_000_000
TARGETS = ("panda", "rocket", "hamburger", "cook", "umbrella", "cat")
STYLE_WORDS = {word for style in STYLES for word in style.split()}

Pairs = list[tuple[str, str]]
"""Prompts, each with the attribute that its image is to get."""

SMOKE = argparse.Namespace(pairs=4, steps=60, cells=2)


def penultimate_layer(pipe: Any) -> str:
    """The text encoder's last layer but one, as in the paper."""
    lists = [n for n, m in pipe.text_encoder.named_modules() if isinstance(m, torch.nn.ModuleList)]
    return f"text_encoder.{lists[0]}.{len(pipe.text_encoder.get_submodule(lists[0])) - 2}"


def lines_of(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line.strip()]


def captions_of(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Captions to train on, and others that are not among them."""
    if args.captions:
        lines = list(dict.fromkeys(lines_of(args.captions)))
        return lines[: len(lines) * 3 // 4], lines[len(lines) * 3 // 4 :]
    seen = list(sample_captions(3000, seed=0))
    return seen, [c for c in sample_captions(2000, seed=10_000_000) if c not in set(seen)]


def trained(seen: TokenActivations, args: argparse.Namespace) -> TopKSAE:
    torch.manual_seed(0)
    width = seen.tensor.shape[-1]
    provenance = {"site": seen.site.as_dict(), "base_model": args.model or "emoji-sd"}
    config = TrainingConfig(args.steps, 1024, lr=4e-3, decay=0.8, dead_after=25_000)
    return train_on_rows(seen.rows, TopKSAE(width, 4 * width, k=8, provenance=provenance), config)


def images_of(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], call: Mapping[str, Any]) -> list[Image]:
    """One image a prompt, each from the noise of its own seed."""
    found: list[Image] = []
    for start in range(0, len(prompts), 25):
        part = slice(start, start + 25)
        generators = [torch.Generator().manual_seed(SEED + seed) for seed in seeds[part]]
        found += pipe(list(prompts[part]), generator=generators, output_type="pil", **call).images
    return found


def steered_images(pipe: Any, pairs: Pairs, named: Mapping[str, WordFeature], how: dict, call: dict) -> list[Image]:
    """Every prompt's image with the feature of its attribute added; the seed is the pair's number."""
    found: dict[int, Image] = {}
    for word in dict.fromkeys(word for _, word in pairs):
        mine = [i for i, pair in enumerate(pairs) if pair[1] == word]
        strength = how["strength"]
        options = {k: v for k, v in how.items() if k != "strength"}
        with pipe.steering({named[word].feature: strength}, adapter_name="text", unit="max", **options):
            found |= zip(mine, images_of(pipe, [pairs[i][0] for i in mine], mine, call), strict=True)
    return [found[i] for i in range(len(pairs))]


def validation(clip: TextSimilarity, pairs: Pairs, bare: list[Image], steered: list[Image]) -> dict[str, Any]:
    """Table 3 of the paper, and the same for images that were not steered."""
    plain, attributed = [p for p, _ in pairs], [f"{p}, {word}" for p, word in pairs]
    similar = {
        "bare, prompt": clip(bare, plain),
        "bare, prompt + attribute": clip(bare, attributed),
        "steered, prompt": clip(steered, plain),
        "steered, prompt + attribute": clip(steered, attributed),
    }
    test = paired_t_test(similar["steered, prompt"].tolist(), similar["steered, prompt + attribute"].tolist())
    gain = paired_t_test(similar["bare, prompt + attribute"].tolist(), similar["steered, prompt + attribute"].tolist())
    means = {name: round(float(each.mean()), 4) for name, each in similar.items()}
    return {
        "similarity": means,
        "prompt against prompt + attribute": test.as_dict(),
        "bare against steered": gain.as_dict(),
    }


def seen_attributes(judge: Any, pairs: Pairs, images: list[Image]) -> dict[str, Any]:
    """Share of images in which the judge sees the attribute as background or as part of the style."""
    seen = look(judge, [as_tensor(image) for image in images])
    hits = [word in (s["background"][0], *s["style"][0].split()) for (_, word), s in zip(pairs, seen, strict=True)]
    return Rows(range(len(hits)), {"seen": hits}).figures()


def as_tensor(image: Image) -> torch.Tensor:
    """`(3, H, W)` in [-1, 1]."""
    pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).float() / 127.5 - 1


def removal(
    pipe: Any, judge: Any, features: list[WordFeature], strength: float, targets: Sequence[str], most: int
) -> dict[str, Any]:
    """Removing objects at the text site and at the U-Net's sites with the shipped SAEs, over the same images."""
    scores, detectors = load_scores(), load_detectors()
    for site in SITES:
        pipe.load_sae(MODELS / "saes" / site, adapter_name=site)
    totals: dict[str, UnlearningAccuracy] = {}
    seconds: dict[str, list[float]] = {"bare": [], "text": [], "U-Net": []}
    for target in targets:
        cells = cells_of(target, most)
        edits = {
            "bare": [],
            "text": [{
                "features": dict.fromkeys(latents_of(features, target.split()), strength),
                "adapter_name": "text", "mode": "ablate",
            }],
            "U-Net": edits_away(scores, detectors, target, REMOVAL["object"]),
        }  # fmt: skip
        images: dict[str, list[torch.Tensor]] = {}
        for name, plan in edits.items():
            pipe.reset_steering()
            for edit in plan:
                pipe.steer(**edit)
            start = time.perf_counter()
            images[name] = draw_cells(pipe, cells)
            seconds[name].append((time.perf_counter() - start) / len(cells))
        bare = {sight.cell: sight for sight in sightings(judge, cells, images["bare"])}
        for name, drawn in images.items():
            pairs = zip(cells, drawn, images["bare"], strict=True)
            edited = {i for (i, _), now, before in pairs if not torch.equal(now, before)}
            seen = outcomes(sightings(judge, cells, drawn), bare, grid(), CONCEPTS[target], edited)
            each = unlearning_accuracy(seen, CONCEPTS[target], target)
            totals[name] = totals.get(name, UnlearningAccuracy()) + each
        print(target, {n: [t.share(s).value for s in ("ua", "ira", "cra")] for n, t in totals.items()}, flush=True)
    pipe.reset_steering()
    return {
        name: {
            **total.as_dict(),
            "rows": total.rows_as_dict(),
            "seconds_an_image": round(sorted(seconds[name])[len(targets) // 2], 3),
        }
        for name, total in totals.items()
    }


def selective(pipe: Any, features: list[WordFeature], strength: float, call: dict) -> dict[str, Any]:
    """Share of images that change, bit for bit, where the prompt names the object and where it does not."""
    changed = {"named": Share(), "not named": Share()}
    for target in TARGETS:
        others = [t for t in THINGS if t != target][: 2 * len(TARGETS) : 3]
        prompts = [f"a {target}", *(f"a {other} on a red background" for other in others)]
        before = images_of(pipe, prompts, range(len(prompts)), {**call, "num_inference_steps": 2})
        edit = dict.fromkeys(latents_of(features, target.split()), strength)
        with pipe.steering(edit, adapter_name="text", mode="ablate"):
            after = images_of(pipe, prompts, range(len(prompts)), {**call, "num_inference_steps": 2})
        moved = [a.tobytes() != b.tobytes() for a, b in zip(before, after, strict=True)]
        for place, (prompt, hit) in enumerate(zip(prompts, moved, strict=True)):
            changed["not named" if place else "named"].count(hit, (prompt, place))
    return {name: {"changed": share.hits, **share.as_dict()} for name, share in changed.items()}


def draw(pipe: Any, named: Mapping[str, WordFeature], words: Sequence[str], how: dict, call: dict, out: Path) -> None:
    """Some prompts, bare and steered towards some attributes."""
    prompts = [f"a {thing}" for thing in ("cat", "rocket", "owl", "mushroom")]
    columns = [images_of(pipe, prompts, range(4), call)]
    for word in words:
        with pipe.steering(
            {named[word].feature: how["strength"]}, adapter_name="text", unit="max", branch=how["branch"]
        ):
            columns.append(images_of(pipe, prompts, range(4), call))
    captions = ["not steered", *(f"{word} (feature {named[word].feature})" for word in words)]
    rows = [
        Row(f"“{prompt}”", [as_tensor(column[i]) for column in columns], captions if i == 0 else [""] * len(captions))
        for i, prompt in enumerate(prompts)
    ]
    draw_grid(rows, "One feature of the text encoder's SAE added to all tokens", out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name of a pipeline; by default the emoji-sd that ships")
    parser.add_argument("--site", help="layer of a text encoder; by default the last but one")
    parser.add_argument("--clip", default=str(MODELS / "emoji-clip"), help="CLIP that measures similarity")
    parser.add_argument("--captions", type=Path, help="a caption a line, to train on")
    parser.add_argument("--prompts", type=Path, help="a prompt a line, to steer")
    parser.add_argument("--attributes", nargs="*", help="words to steer towards; by default all features' words")
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--steps", type=int, default=700, help="training steps of 1024 tokens")
    parser.add_argument("--strength", type=float, default=0.5, help="of steering, in largest activations")
    parser.add_argument("--away", type=float, default=2.0, help="of removal: z - away z")
    parser.add_argument("--targets", type=int, default=1, help="objects that are removed, at most 6, 50 seconds each")
    parser.add_argument("--spacy", help="spaCy model; only nouns, adjectives and adverbs then name features")
    parser.add_argument("--out", type=Path, default=Path("text-encoder-out"))
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.set_defaults(cells=16)
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, only to see that it runs")
    args = parser.parse_args(namespace=SMOKE if "--smoke" in sys.argv[1:] else None)
    if args.smoke:
        CALL["num_inference_steps"] = 4  # of everything that generates
    begin = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    pipe = SAESteeringPipeline.from_pretrained(args.model or MODELS / "emoji-sd", dtype=torch.float32).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    call = {} if args.model else CALL
    site = Site.of(args.site or penultimate_layer(pipe))

    start = time.perf_counter()
    captions, others = captions_of(args)
    seen, held_out = (read_prompts(pipe, site, each, keep="padded") for each in (captions, others))
    reading = time.perf_counter() - start
    start = time.perf_counter()
    sae = trained(seen, args)
    training = time.perf_counter() - start
    statistics, meter = StatisticsAccumulator(sae.n_latents), ReconstructionMeter(sae)
    statistics.add(0.0, sae.encode_sparse(seen.rows))
    meter.add(0.0, held_out.rows)
    sae.save_pretrained(args.out / "sae")
    statistics.finish().save(args.out / "sae")
    pipe.load_sae(args.out / "sae", adapter_name="text")

    tokenizer = tokenizer_of(pipe, site)
    parts = parts_of_speech(captions, args.spacy) if args.spacy else None
    features = name_features(sae, seen, held_out, tokenizer, parts=parts)
    named = best_for_words(features)
    (args.out / "words.md").write_text(word_table(named.values()) + "\n")
    told: dict[str, Any] = {
        "model": args.model or "emoji-sd", "site": str(site),
        "sae": {"latents": sae.n_latents, "k": 8, "steps": args.steps,
                **{n: meter.figures()[n] for n in ("fvu", "dead")}},
        "captions": {"seen": len(captions), "held_out, unseen": len(others), "tokens": len(seen.rows)},
        "seconds": {"reading": round(reading, 1), "training": round(training, 1)},
        "words": {
            "latents that fire": len(features),
            "words with precision and recall >= 0.8": len(named),
            "latents with both >= 0.8": sum(min(f.precision, f.recall) >= 0.8 for f in features),
            "descriptive only": args.spacy or "not asked for",
            "table": {w: [f.feature, round(f.precision, 3), round(f.recall, 3)] for w, f in named.items()},
        },
    }  # fmt: skip
    print(json.dumps(told["words"]), flush=True)

    attributes = args.attributes or [w for w in named if args.model or w in STYLE_WORDS or w in BACKGROUNDS]
    unknown = [word for word in attributes if word not in named]
    if unknown or not attributes:
        raise InputError(f"No feature is named {', '.join(unknown) or 'by any word'}; see {args.out / 'words.md'}.")
    rng = random.Random(SEED)
    prompts = lines_of(args.prompts) if args.prompts else [f"a {thing}" for thing in THINGS]
    pairs = [(rng.choice(prompts), attributes[i % len(attributes)]) for i in range(args.pairs)]
    how = {"strength": args.strength, "branch": "contrast"}
    clip = TextSimilarity(args.clip)
    bare = images_of(pipe, [prompt for prompt, _ in pairs], range(len(pairs)), call)
    steered = steered_images(pipe, pairs, named, how, call)
    told["steering"] = {
        "how": how,
        "attributes": attributes,
        "pairs": len(pairs),
        **validation(clip, pairs, bare, steered),
    }
    if not args.model:
        judge = load_judge()
        few = pairs[:25]
        told["steering"]["judge sees the attribute"] = {
            "bare": seen_attributes(judge, pairs, bare),
            "steered": seen_attributes(judge, pairs, steered),
            "steered, first 25": seen_attributes(judge, few, steered[:25]),
            "tokens=[2], the object's, first 25": seen_attributes(
                judge, few, steered_images(pipe, few, named, {**how, "tokens": [2]}, call)
            ),
        }
    print(json.dumps(told["steering"]), flush=True)
    favourites = [w for w in ("red", "blue", "pencil", "cartoon", "black", "pink") if w in attributes]
    draw(pipe, named, favourites or attributes[:6], how, call, args.out / "steered.png")
    if not args.model:
        told["selective"] = {"how": f"ablate, {args.away:g}", **selective(pipe, features, args.away, call)}
        targets = TARGETS[: args.targets]
        found = removal(pipe, judge, features, args.away, targets, args.cells)
        told["removal"] = {"targets": targets, "images": 24 * len(targets), **found}
    told["seconds"]["all"] = round(time.perf_counter() - begin, 1)
    told["hardware"] = f"{os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"
    text = json.dumps(told, indent=1)
    for file in (args.out / "figures.json", *([args.json] if args.json else [])):
        file.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
