"""SAEs of h-space, the U-Net's bottleneck at t = 0.7 T: reconstruction, probes, edits and undoing them, interpolation.

After Ijishakin et al. (2024), on the embedded demo model or any Stable Diffusion: `python examples/h_space/h_space.py`
or `... --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts prompts.txt`. See README.md here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from baselines import PCA, beta_vaes, pca_by_rank, reconstruction
from consistency import measure_consistency
from data import data_of
from edits import measure_edits
from interpolation import measure_interpolation
from kinds import KINDS, code_of, train
from probes import ENTRIES, measure_probes

from diffusers_sae import ChannelAwareSAE, SAESteeringPipeline, load_sae
from diffusers_sae.demo.shipped import MODELS
from diffusers_sae.saes import SparseAutoencoder

PARTS = ("reconstruction", "probes", "edits", "consistency", "interpolation")

SMOKE = argparse.Namespace(images=200, noises=1, held_out=16, trips=2, few=True)


def trained(name: str, seen: torch.Tensor, args: argparse.Namespace) -> SparseAutoencoder:
    """An SAE of one kind, from the folder of an earlier run if it is there."""
    folder = args.out / name.replace(", ", "-")
    sae = load_sae(folder) if (folder / "config.json").exists() else train(name, seen, args.model, args.few)
    if isinstance(sae, ChannelAwareSAE):
        sae.thresholded_(args.k)
    sae.save_pretrained(folder)
    return sae


def codes_of(
    saes: dict[str, SparseAutoencoder], of_maps: PCA, seen: torch.Tensor, held: torch.Tensor
) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    """What is probed, each for the training images and those held out; of 16 positions 512 entries would say little."""
    yield "raw h", (seen.flatten(1), held.flatten(1))
    yield f"PCA, {ENTRIES}", (of_maps.code(seen.flatten(1), ENTRIES), of_maps.code(held.flatten(1), ENTRIES))
    for name, sae in saes.items():
        if KINDS[name].layout != "positions":
            yield name, (code_of(sae, name, seen), code_of(sae, name, held))


@contextmanager
def timed(seconds: dict[str, Any], name: str) -> Iterator[None]:
    """Note how long something takes: on the clock, and of processor time."""
    began, began_processor = time.perf_counter(), time.process_time()
    yield
    passed, worked = time.perf_counter() - began, time.process_time() - began_processor
    seconds[name] = {"clock": round(passed, 1), "processor": round(worked, 1)}
    print(f"-- {name}: {passed:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODELS / "emoji-sd"), help="folder or hub name")
    parser.add_argument("--prompts", type=Path, help="one prompt a line; by default scenes of the demo world")
    parser.add_argument("--world", type=Path, default=Path("outputs/emoji_world"), help="folder of sprites.npz")
    parser.add_argument("--images", type=int, default=1472, help="to train on; with --prompts, fewer will do")
    parser.add_argument("--noises", type=int, default=3, help="that each render gets")
    parser.add_argument("--held-out", type=int, default=320)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--k", type=int, default=2, help="latents each channel keeps at least (channel-aware)")
    parser.add_argument("--trips", type=int, default=2, help="images that are edited and have their edits undone")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured; by default all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("h-space-out"))
    parser.set_defaults(few=False)
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, only to see that it runs")
    args = parser.parse_args(namespace=SMOKE if "--smoke" in sys.argv[1:] else None)
    dtype = torch.float32 if args.device == "cpu" else torch.float16
    pipe = SAESteeringPipeline.from_pretrained(args.model, dtype=dtype).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    args.out.mkdir(parents=True, exist_ok=True)
    report = args.out / "h_space.json"
    figures: dict[str, Any] = json.loads(report.read_text()) if report.exists() else {}
    seconds = figures.setdefault("seconds", {}).setdefault(f"{' '.join(args.parts)}, {args.trips} trips", {})
    with timed(seconds, "all"):
        measure(pipe, figures, seconds, args)
    report.write_text(json.dumps(figures, indent=1) + "\n")
    print(seconds)


def measure(pipe: Any, figures: dict[str, Any], seconds: dict[str, Any], args: argparse.Namespace) -> None:
    """Put the figures of all parts that are asked for into `figures`."""
    with timed(seconds, "capture"):
        data = data_of(pipe, args)
    seen, held, scenes = data.seen, data.held, data.scenes
    new, of_seen, of_new = data.prompts[data.images :], scenes[: data.images], scenes[data.images :]
    figures |= {
        "model": Path(args.model).name, "shape": list(held.shape[1:]), "images": data.images, "h": len(seen),
        "held_out": len(held), "torch": torch.__version__, "threads": torch.get_num_threads(), "k": args.k,
    }  # fmt: skip
    saes = {}
    for name in KINDS:
        with timed(seconds, name):
            saes[name] = trained(name, seen, args)
    pipe.load_sae(saes["TopK, vector"], adapter_name="vector")
    pipe.load_sae(saes["channel-aware"], adapter_name="aware")
    of_maps = PCA(seen.flatten(1))
    if "reconstruction" in args.parts:
        with timed(seconds, "reconstruction"):
            figures["pca_of_the_map"] = pca_by_rank(seen, held, of_maps)
            figures["kinds"] = {name: reconstruction(saes[name], name, seen, held, of_maps) for name in KINDS}
            figures["beta_vaes"] = beta_vaes(seen, held, args.few)
        for name, one in (figures["kinds"] | figures["beta_vaes"]).items():
            print(f"{name:16} EV {one['ev']:.3f} cosine {one['cosine']:.3f}", flush=True)
    if "probes" in args.parts and scenes:
        with timed(seconds, "probes"), torch.no_grad():
            figures["probes"] = measure_probes(codes_of(saes, of_maps, seen, held), scenes)
    if "edits" in args.parts:
        with timed(seconds, "edits"):
            figures["edits"] = measure_edits(pipe, saes, data.once, of_seen, new, args.out, args.few)
    if "consistency" in args.parts and scenes:
        with timed(seconds, "consistency"):
            figures["consistency"] = measure_consistency(
                pipe, saes, data.once, of_seen, of_new[: args.trips], new[: args.trips], args.out
            )
    if "interpolation" in args.parts:
        with timed(seconds, "interpolation"):
            figures["interpolation"] = measure_interpolation(pipe, saes["TopK, vector"], new, args.out, bool(scenes))


if __name__ == "__main__":
    main()
