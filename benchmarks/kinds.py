"""FVU over L0 for every kind of SAE on the embedded model: `python benchmarks/kinds.py`.

Captures activations of both sites once, trains each kind at three degrees of sparsity for equal steps, and measures
on rows held out; dead latents are those that fire on none of all rows. Writes `benchmarks/results/kinds.json` and
`kinds.png`. A stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
from arguments import parse
from matplotlib import pyplot as plt

from diffusers_sae.capture import ActivationStore, StoreConfig, store_activations
from diffusers_sae.demo.shipped import CALL, SITES, load_pipeline
from diffusers_sae.demo.world import sample_captions
from diffusers_sae.evaluation.reconstruction import baselines, measure_on_store
from diffusers_sae.saes import BatchTopKSAE, GatedSAE, JumpReLUSAE, MatryoshkaSAE, ReLUSAE, TopKSAE
from diffusers_sae.training import TrainingConfig, train_on_store

IMAGES, HELD_OUT, LATENTS, STEPS, ROWS = 288, 2, 1024, 1500, 1024
KS = (12, 24, 48)
KINDS: dict[str, tuple[Any, dict[str, tuple[Any, ...]]]] = {
    "TopK": (TopKSAE, {"k": KS}),
    "BatchTopK": (BatchTopKSAE, {"k": KS}),
    "Matryoshka": (MatryoshkaSAE, {"k": KS}),
    "JumpReLU": (JumpReLUSAE, {"sparsity": (0.2, 0.5, 1.0)}),
    "gated": (GatedSAE, {"sparsity": (1.3, 2.5, 3.5)}),
    "ReLU": (ReLUSAE, {"sparsity": (1.0, 1.7, 2.5)}),
}


def trained(
    store: ActivationStore, kind: str, knob: str, value: Any, folder: Path, steps: int, n: int
) -> dict[str, Any]:
    cls = KINDS[kind][0]
    sparsity = value if knob == "sparsity" else 1.0
    config = TrainingConfig(steps, ROWS, lr=4e-3, sparsity=sparsity, decay=0.8, dead_after=25_000)
    sae = train_on_store(
        store.part(stop=-HELD_OUT),
        lambda width: cls(width, n) if knob == "sparsity" else cls(width, n, **{knob: value}),
        folder,
        config,
    )
    figures = measure_on_store(sae, store.part(start=-HELD_OUT))[0]
    dead = measure_on_store(sae, store)[0]["dead"]
    return {knob: value, "fvu": figures["fvu"], "l0": figures["l0"], "dead": dead, "silent_held_out": figures["dead"]}


def draw(figures: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(2, len(SITES), figsize=(13, 7), layout="constrained", height_ratios=(3, 1), sharex=True)
    for (above, below), site in zip(axes.T, SITES, strict=True):
        for kind, points in figures["sites"][site]["kinds"].items():
            points = sorted(points, key=lambda p: p["l0"])
            above.plot([p["l0"] for p in points], [p["fvu"] for p in points], marker="o", label=kind)
            below.plot([p["l0"] for p in points], [100 * p["dead"] for p in points], marker="o")
        others = figures["sites"][site]["baselines"]
        for name, label in (("pca", "PCA of that rank"), ("random", "random directions, TopK")):
            values = [others[str(k)][name] for k in KS]
            above.plot(KS, values, ls="--" if name == "pca" else ":", color="grey", label=label)
        above.set(title=site, ylabel="FVU, rows held out", xscale="log", yscale="log")
        below.set(xlabel="L0", ylabel="never fire, %")
        below.axhline(1, ls=":", color="grey")
        below.set_ylim(bottom=0)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(f"{figures['latents']:,} latents, {figures['steps']} steps of {ROWS:,} rows")
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("outputs/kinds"))
    parser.set_defaults(images=IMAGES, steps=STEPS, latents=LATENTS, places=64, batch=16, call=CALL)
    args = parse(
        parser,
        "kinds.json",
        images=24,
        steps=2,
        latents=64,
        places=64,
        batch=4,
        call={**CALL, "num_inference_steps": 2},
    )
    config = StoreConfig(args.images, args.batch, places=args.places)
    prompts = list(sample_captions(args.images, seed=40_000_000))
    stores = store_activations(load_pipeline(), SITES, prompts, args.work / "store", config, **args.call)
    figures: dict[str, Any] = {"latents": args.latents, "steps": args.steps, "rows": ROWS, "sites": {}}
    for site in SITES:
        store = stores[site]
        parts = {name: store.part(*part) for name, part in (("seen", (None, -HELD_OUT)), ("held", (-HELD_OUT, None)))}
        seen, held = (
            torch.cat([part.shard(i)["rows"].float() for i in range(len(part.shard_rows))]) for part in parts.values()
        )
        found = figures["sites"][site] = {
            "rows": len(seen),
            "baselines": {str(k): baselines(seen, held, k, args.latents) for k in KS},
            "kinds": {},
        }
        for kind, (_, knobs) in KINDS.items():
            ((knob, values),) = knobs.items()
            found["kinds"][kind] = []
            for value in values:
                one = trained(store, kind, knob, value, args.work / f"{site} {kind} {value}", args.steps, args.latents)
                found["kinds"][kind].append(one)
                print(site, kind, one, flush=True)
    args.out.write_text(json.dumps(figures, indent=1) + "\n")
    draw(figures, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
