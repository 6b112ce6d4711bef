"""An SAE of StyleGAN2's w: trained on sampled w's, its features ranked, injected and drawn. See README.md here.

python examples/stylegan/stylegan.py --weights ffhq.pkl --out stylegan-out
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from diffusers_sae import LatentStatistics, SAESteeringPipeline, TopKSAE
from diffusers_sae.adapters.stylegan2 import StyleGAN2Generator
from diffusers_sae.adapters.stylegan2_pipeline import StyleGAN2Pipeline
from diffusers_sae.adapters.stylegan2_training import SITE, measured_on_w, sampled_w, train_on_w
from diffusers_sae.adapters.stylegan_convert import read_generator
from diffusers_sae.demo.pictures import Row, draw_grid
from diffusers_sae.features.ranking import most_active, opposite_pairs
from diffusers_sae.features.sweeps import one_after_another, sweep, sweep_two
from diffusers_sae.training import TrainingConfig

INJECTED = (-0.5, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
STEPS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
SEEDS = tuple(range(7))

SMOKE = argparse.Namespace(steps=4)


def pipeline_of(weights: str | None) -> StyleGAN2Pipeline:
    """The pipeline of an NVlabs `.pkl`, a folder or a hub name; without one, a small generator of random weights."""
    if weights is None:
        print("No --weights: this generator has random weights, so that its images show textures and mean nothing.")
        return StyleGAN2Pipeline(random_generator())
    if weights.endswith(".pkl"):
        return StyleGAN2Pipeline(read_generator(weights))
    return StyleGAN2Pipeline.from_pretrained(weights)


def random_generator() -> StyleGAN2Generator:
    """An untrained generator of 64 x 64 images, with the mean of its w's, which training would have kept."""
    torch.manual_seed(0)
    generator = StyleGAN2Generator(
        z_dim=64, w_dim=64, img_resolution=64, num_layers=4, channel_base=2048, channel_max=64
    ).eval()
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if name.endswith("torgb.weight"):
                parameter.mul_(0.3)  # five resolutions add up to one image, which is to stay within [-1, 1]
    generator.mapping.w_avg.copy_(next(sampled_w(generator, 8192)).mean(0))
    return generator


def trained(pipe: StyleGAN2Pipeline, steps: int) -> tuple[TopKSAE, LatentStatistics, dict]:
    """A TopK SAE with twice as many latents as w is wide, as in Zhang and Prasanna (2025), and how well it does."""
    width = pipe.generator.config.w_dim
    torch.manual_seed(0)
    sae = TopKSAE(width, 2 * width, k=max(4, width // 16), provenance={"site": SITE}).to(pipe.device)
    start = time.perf_counter()
    done = train_on_w(pipe.generator, sae, TrainingConfig(steps=steps, batch_size=2048, dead_after=100_000))
    seconds = time.perf_counter() - start
    statistics, figures = measured_on_w(pipe.generator, done)
    told = {name: figures[name] for name in ("fvu", "l0", "dead", "rows")}
    return done, statistics, {"latents": 2 * width, "k": done.config.k, "steps": steps, "seconds": seconds, **told}


def rows_of(images: Sequence[Sequence[torch.Tensor]], headlines: Sequence[str], captions: Sequence[str]) -> list[Row]:
    """Rows for `draw_grid` of images in [0, 1]."""
    return [
        Row(headline, [2 * image.cpu() - 1 for image in row], captions)
        for headline, row in zip(headlines, images, strict=True)
    ]


def draw(pipe, sae: TopKSAE, statistics: LatentStatistics, out: Path) -> dict:
    """All figures; strengths are multiples of a latent's largest activation."""
    average = {"w": pipe.generator.w_avg, "output_type": "pt"}
    steer = {"unit": "max"}
    top = most_active(statistics, 7)
    injected = [sweep(pipe, j, INJECTED, steer, **average)[0] for j in top]
    captions = [f"{s:g} x max" for s in INJECTED]
    names = [f"feature {j}, mean activation {statistics.mean[0, j]:.3g}" for j in top]
    draw_grid(rows_of(injected, names, captions), "One feature at a time on the average image", out / "injected.png")

    random = {"seeds": list(SEEDS), "truncation_psi": 0.7, "output_type": "pt"}
    swept = sweep(pipe, top[0], STEPS, steer, **random)
    captions = [f"{s:g} x max" for s in STEPS]
    draw_grid(
        rows_of(swept, [f"seed {s}" for s in SEEDS], captions),
        f"Feature {top[0]} on seven random images (psi 0.7)", out / "images_7x7.png",
    )  # fmt: skip

    two = sweep_two(pipe, (top[0], top[1]), STEPS, steer, **average)
    draw_grid(
        rows_of(two, [f"feature {top[0]}: {s:g} x max" for s in STEPS], [f"{top[1]}: {s:g} x max" for s in STEPS]),
        f"Features {top[0]} and {top[1]} on the average image", out / "two_features_7x7.png",
    )  # fmt: skip

    several = one_after_another(pipe, dict.fromkeys(top[:5], 1.0), steer, **average)
    layers = layer_by_layer(pipe, top[0])
    decoded = pipe(w=sae.decode(statistics.mean[0]).to(pipe.device), output_type="pt").images[0]
    pairs = opposite_pairs(sae, most_active(statistics, sae.n_latents), below=0.0, count=5)
    first, second, cosine = pairs[0]
    amount = float(statistics.max[0, first])
    undone = one_after_another(pipe, {first: amount, second: amount}, **average)
    undone.insert(2, sweep(pipe, second, [amount], **average)[0][0])
    rows = [
        *rows_of([several], ["five features on one image, max each"], ["average", *(f"+ {j}" for j in top[:5])]),
        *rows_of([layers[1]], [f"feature {top[0]} at its max in some layers of W+"], layers[0]),
        *rows_of(
            [undone], [f"the most opposite pair, cosine {cosine:.2f}, strength {amount:.2g}"],
            ["average", f"+ {first}", f"+ {second}", "+ both"],
        ),
        *rows_of([[several[0], decoded]], ["average images"], ["of w_avg", "of the mean code, decoded"]),
    ]  # fmt: skip
    draw_grid(rows, "Several features, layers of W+, opposite features, averages", out / "several.png")
    return {"top": top, "opposite": [pair._asdict() for pair in pairs]}


def layer_by_layer(pipe, feature: int) -> tuple[list[str], list[torch.Tensor]]:
    """The average image with a feature added in the coarse, middle or fine third of W+, and in all of it."""
    n = pipe.generator.num_ws
    thirds = [range(i * n // 3, (i + 1) * n // 3) for i in range(3)]
    images = []
    for tokens in [*map(list, thirds), None]:
        with pipe.steering({feature: 1.0}, unit="max", tokens=tokens):
            images.append(pipe(w=pipe.generator.w_avg, output_type="pt").images[0])
    return [*(f"layers {t[0]} to {t[-1]}" for t in thirds), "all layers"], images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="NVlabs' .pkl, a folder that `convert` wrote, or a hub name")
    parser.add_argument("--out", type=Path, default=Path("stylegan-out"), help="folder of what is written")
    parser.add_argument("--steps", type=int, default=400, help="training steps of 2048 fresh w's each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, only to see that it runs")
    arguments = parser.parse_args(namespace=SMOKE if "--smoke" in sys.argv[1:] else None)
    pipe = SAESteeringPipeline.from_pipe(pipeline_of(arguments.weights).to(arguments.device))
    sae, statistics, told = trained(pipe, arguments.steps)
    sae.save_pretrained(arguments.out / "sae")
    statistics.save(arguments.out / "sae")
    pipe.load_sae(arguments.out / "sae")
    told |= draw(pipe, sae, statistics, arguments.out)
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
