"""SAEs of h-space, the U-Net's bottleneck at t = 0.7 T: reconstruction, probes, edits and undoing them, interpolation.

After Ijishakin et al. (2024), on the embedded demo model or any Stable Diffusion: `python examples/h_space/h_space.py`
or `... --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts prompts.txt`. See README.md here.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from baselines import PCA, beta_vaes, pca_by_rank, reconstruction
from consistency import measure_consistency
from edits import measure_edits
from interpolation import measure_interpolation
from kinds import AT, KINDS, PATH, STEPS, code_of, train
from probes import ENTRIES, measure_probes
from safetensors.torch import load_file, save_file

from diffusers_sae import ChannelAwareSAE, SAESteeringPipeline, load_sae
from diffusers_sae.demo.shipped import MODELS
from diffusers_sae.demo.world import Scene, sample_scene
from diffusers_sae.saes import SparseAutoencoder

SEED = 31_000
PARTS = ("reconstruction", "probes", "edits", "consistency", "interpolation")


@torch.no_grad()
def captured(pipe: Any, prompts: Sequence[str], batch: int) -> torch.Tensor:
    """h `(N, C, H, W)` of the last step at or above 0.7 T of generations without guidance; the rest is left out."""
    total = pipe.scheduler.config.num_train_timesteps
    found = []

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        following = pipe.scheduler.timesteps[min(step + 1, STEPS - 1)]
        pipe._interrupt = bool(following < AT * total - total / STEPS / 2)
        return tensors

    for first in range(0, len(prompts), batch):
        some = list(prompts[first : first + batch])
        generators = [torch.Generator().manual_seed(SEED + first + i) for i in range(len(some))]
        with pipe.capture([PATH]) as activations:
            pipe(
                some, num_inference_steps=STEPS, guidance_scale=1.0, output_type="latent", generator=generators,
                callback_on_step_end=stop,
            )  # fmt: skip
        seen = activations[PATH]
        found.append(seen.select("cond", seen.timestep.min().item()).float().cpu())
    return torch.cat(found)


def prompts_of(args: argparse.Namespace) -> tuple[list[str], list[Scene]]:
    """Prompts for the training images and those held out; for the demo model also what they show."""
    if args.prompts is not None:
        lines = args.prompts.read_text().split("\n")
        return [lines[i % len(lines)] for i in range(args.images + args.held_out)], []
    rng = random.Random(SEED)
    scenes = [sample_scene(rng) for _ in range(args.images + args.held_out)]
    return [scene.caption(rng.randrange(3)) for scene in scenes], scenes


def trained(name: str, seen: torch.Tensor, args: argparse.Namespace) -> SparseAutoencoder:
    """An SAE of one kind, from the folder of an earlier run if it is there."""
    folder = args.out / name.replace(", ", "-")
    sae = load_sae(folder) if (folder / "config.json").exists() else train(name, seen, args.model)
    if isinstance(sae, ChannelAwareSAE):
        sae.thresholded_(args.k)
    sae.save_pretrained(folder)
    return sae


def codes_of(
    saes: dict[str, SparseAutoencoder], of_maps: PCA, seen: torch.Tensor, held: torch.Tensor
) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor]]]:
    """What is probed, each for the training images and those held out."""
    yield "raw h", (seen.flatten(1), held.flatten(1))
    yield f"PCA, {ENTRIES}", (of_maps.code(seen.flatten(1), ENTRIES), of_maps.code(held.flatten(1), ENTRIES))
    for name, sae in saes.items():
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
    parser.add_argument("--images", type=int, default=704)
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--k", type=int, default=2, help="latents each channel keeps at least (channel-aware)")
    parser.add_argument("--trips", type=int, default=8, help="images that are edited and have their edits undone")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured; by default all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("h-space-out"))
    args = parser.parse_args()
    dtype = torch.float32 if args.device == "cpu" else torch.float16
    pipe = SAESteeringPipeline.from_pretrained(args.model, dtype=dtype).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    prompts, scenes = prompts_of(args)
    report = args.out / "h_space.json"
    figures: dict[str, Any] = json.loads(report.read_text()) if report.exists() else {"seconds": {}}
    seconds = figures["seconds"]
    with timed(seconds, "all"):
        measure(pipe, prompts, scenes, figures, args)
    report.write_text(json.dumps(figures, indent=1) + "\n")
    print(seconds)


def measure(
    pipe: Any, prompts: Sequence[str], scenes: Sequence[Scene], figures: dict[str, Any], args: argparse.Namespace
) -> None:
    """Put the figures of all parts that are asked for into `figures`."""
    seconds = figures["seconds"]
    if not (args.out / "h.safetensors").exists():
        with timed(seconds, "capture"):
            args.out.mkdir(parents=True, exist_ok=True)
            save_file({"h": captured(pipe, prompts, args.batch)}, args.out / "h.safetensors")
    h = load_file(args.out / "h.safetensors")["h"]
    if len(h) != len(prompts):
        raise SystemExit(f"{args.out} holds h of {len(h)} images, not {len(prompts)}; choose another --out.")
    seen, held, of_seen = h[: args.images], h[args.images :], scenes[: args.images]
    new, of_new = prompts[args.images :], scenes[args.images :]
    figures |= {
        "model": Path(args.model).name, "shape": list(h.shape[1:]), "images": len(seen), "held_out": len(held),
        "torch": torch.__version__, "threads": torch.get_num_threads(), "k": args.k,
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
            figures["beta_vaes"] = beta_vaes(seen, held)
        for name, one in (figures["kinds"] | figures["beta_vaes"]).items():
            print(f"{name:16} EV {one['ev']:.3f} cosine {one['cosine']:.3f}", flush=True)
    if "probes" in args.parts and scenes:
        with timed(seconds, "probes"), torch.no_grad():
            figures["probes"] = measure_probes(codes_of(saes, of_maps, seen, held), scenes)
    if "edits" in args.parts:
        with timed(seconds, "edits"):
            figures["edits"] = measure_edits(pipe, saes, seen, of_seen, new, args.out)
    if "consistency" in args.parts and scenes:
        with timed(seconds, "consistency"):
            figures["consistency"] = measure_consistency(
                pipe, saes, seen, of_seen, of_new[: args.trips], new[: args.trips], args.out
            )
    if "interpolation" in args.parts:
        with timed(seconds, "interpolation"):
            figures["interpolation"] = measure_interpolation(pipe, saes["TopK, vector"], new, args.out, bool(scenes))


if __name__ == "__main__":
    main()
