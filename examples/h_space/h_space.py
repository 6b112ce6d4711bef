"""SAEs of h-space, the U-Net's bottleneck at t = 0.7 T: reconstruction against PCA, probes, edits at one timestep.

After Ijishakin et al. (2024), on the embedded demo model or any Stable Diffusion: `python examples/h_space/h_space.py`
or `... --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts prompts.txt`. See README.md here.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from edits import measure_edits
from safetensors.torch import load_file, save_file

from diffusers_sae import ChannelAwareSAE, SAESteeringPipeline, Site, TopKSAE, load_sae
from diffusers_sae.demo.shipped import MODELS
from diffusers_sae.demo.world import FACTORS, Scene, sample_scene
from diffusers_sae.saes import SparseAutoencoder
from diffusers_sae.sites import LAYOUTS
from diffusers_sae.training import SAETrainer, TrainingConfig

PATH, AT, STEPS, SEED = "unet.mid_block", 0.7, 10, 31_000


@dataclass
class Kind:
    """An SAE that is tried: its layout, how it is made from the shape `(C, H, W)` of h, images a step, and steps."""

    layout: str
    make: Callable[[Sequence[int], int], SparseAutoencoder]
    images: int
    steps: int
    sparsity: float = 0.0


def _channel_aware(shape: Sequence[int], images: int) -> SparseAutoencoder:
    return ChannelAwareSAE(shape[1] * shape[2], 512, shape[0], images=images)


KINDS = {
    "channel-aware": Kind("channels", _channel_aware, 16, 600, 0.1),
    "TopK, channels": Kind("channels", lambda s, _: TopKSAE(s[1] * s[2], 512, 8), 16, 400),
    "TopK, positions": Kind("positions", lambda s, _: TopKSAE(s[0], 1024, 32), 64, 400),
    "TopK, vector": Kind("vector", lambda s, _: TopKSAE(s[0] * s[1] * s[2], 1024, 48), 256, 200),
}


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


def train(name: str, seen: torch.Tensor, base_model: str) -> SparseAutoencoder:
    """An SAE of one kind, trained on h `(N, C, H, W)`."""
    kind = KINDS[name]
    torch.manual_seed(0)
    sae = kind.make(seen.shape[1:], len(seen))
    site = Site(PATH, layout=kind.layout).as_dict()
    sae.register_to_config(provenance={"site": site, "base_model": base_model, "steps": STEPS, "guidance": 1.0})
    rows = LAYOUTS[kind.layout].to_rows(seen)  # (N, P, d)
    size = kind.images * rows.shape[1]
    config = TrainingConfig(kind.steps, size, lr=4e-3, sparsity=kind.sparsity, dead_after=60 * size)
    trainer = SAETrainer(sae.train(), config, rows.flatten(0, 1)[: 2**14])
    generator = torch.Generator().manual_seed(0)
    for _ in range(kind.steps):
        chosen = torch.randperm(len(rows), generator=generator)[: kind.images]
        if isinstance(sae, ChannelAwareSAE):
            with sae.of_images(chosen):
                trainer.step(rows[chosen].flatten(0, 1))
        else:
            trainer.step(rows[chosen].flatten(0, 1))
    return trainer.finish()


def figures_of(h: torch.Tensor, h_hat: torch.Tensor, mean: torch.Tensor) -> dict[str, float]:
    """EV around the mean map `(C, H, W)` of the training data, and mean cosine of whole maps `(N, C, H, W)`."""
    return {
        "ev": 1 - float((h - h_hat).square().sum() / (h - mean).square().sum()),
        "cosine": float(torch.cosine_similarity(h.flatten(1), h_hat.flatten(1)).mean()),
        "mse": float((h - h_hat).square().mean()),
        "mae": float((h - h_hat).abs().mean()),
    }


def pca(rows: torch.Tensor, held: torch.Tensor, rank: int) -> torch.Tensor:
    """Rows `(M, d)` held out, projected on the first principal components of rows `(N, d)`."""
    mean = rows.mean(0)
    components = torch.linalg.svd(rows - mean, full_matrices=False).Vh[:rank]
    return mean + (held - mean) @ components.T @ components


@torch.no_grad()
def reconstruction(sae: SparseAutoencoder, name: str, seen: torch.Tensor, held: torch.Tensor) -> dict[str, Any]:
    """Figures on h held out, with PCA of as many numbers a row, rounded up, beside them."""
    to_rows, from_rows = LAYOUTS[KINDS[name].layout]
    rows, mean = to_rows(held), seen.mean(0)
    z = sae.encode(rows)
    active = float((z != 0).sum()) / z[..., 0].numel()
    projected = pca(to_rows(seen).flatten(0, 1)[: 2**17], rows.flatten(0, 1), -int(-active // 1)).view_as(rows)
    torch.manual_seed(1)
    drawn = KINDS[name].make(seen.shape[1:], len(seen))  # random weights, unit directions
    return {
        **figures_of(held, from_rows(sae.decode(z), held), mean),
        "zeros": float((z == 0).double().mean()),
        "active_a_row": active,
        "active_an_image": active * rows.shape[1],
        "parameters": sum(p.numel() for p in sae.parameters()),
        "pca_same_rows": {"rank": -int(-active // 1), **figures_of(held, from_rows(projected, held), mean)},
        "random": figures_of(held, from_rows(drawn(rows), held), mean),
    }


def probe(codes: torch.Tensor, held: torch.Tensor, scenes: Sequence[Scene], entries: int = 512) -> dict[str, float]:
    """Accuracy on images held out of ridge classifiers of every factor from the most active entries of `codes (N, m)`.

    `scenes` are those of the images of both sets, one after the other; where a factor is absent, the image is left out.
    """
    top = codes.mean(0).abs().topk(min(entries, codes.shape[1])).indices
    x, mean, scale = codes[:, top], codes[:, top].mean(0), codes[:, top].std(0) + 1e-6
    both = torch.cat([(x - mean) / scale, (held[:, top] - mean) / scale]).double()
    accuracy = {}
    for factor, values in FACTORS.items():
        labels = torch.tensor([scene.labels()[factor] for scene in scenes])
        train, test = labels >= 0, labels >= 0
        train[len(x) :], test[: len(x)] = False, False
        targets = torch.nn.functional.one_hot(labels[train], len(values)).double()
        a, centre = both[train], targets.mean(0)
        weights = torch.linalg.solve(a.T @ a + 300 * torch.eye(a.shape[1]), a.T @ (targets - centre))
        accuracy[factor] = float(((both[test] @ weights + centre).argmax(1) == labels[test]).double().mean())
    return accuracy


@torch.no_grad()
def probes(
    saes: dict[str, SparseAutoencoder], seen: torch.Tensor, held: torch.Tensor, scenes: Sequence[Scene]
) -> dict[str, dict[str, float]]:
    found = {}
    for name, sae in saes.items():
        to_rows = LAYOUTS[KINDS[name].layout].to_rows
        found[name] = probe(sae.encode(to_rows(seen)).flatten(1), sae.encode(to_rows(held)).flatten(1), scenes)
    components = torch.linalg.svd(seen.flatten(1) - seen.flatten(1).mean(0), full_matrices=False).Vh[:512].T
    found["PCA of the map"] = probe_all(seen.flatten(1) @ components, held.flatten(1) @ components, scenes)
    return found


def probe_all(codes: torch.Tensor, held: torch.Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    return probe(codes, held, scenes, codes.shape[1])


def kept(file: Path, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The tensor in a file, made and written unless it is there, so that a stopped run goes on where it was."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"h": make()}, file)
    return load_file(file)["h"]


def prompts_of(args: argparse.Namespace) -> tuple[list[str], list[Scene]]:
    """Prompts for the training images and those held out; for the demo model also what they show."""
    if args.prompts is not None:
        lines = args.prompts.read_text().split("\n")
        return [lines[i % len(lines)] for i in range(args.images + args.held_out)], []
    rng = random.Random(SEED)
    scenes = [sample_scene(rng) for _ in range(args.images + args.held_out)]
    return [scene.caption(rng.randrange(3)) for scene in scenes], scenes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODELS / "emoji-sd"), help="folder or hub name")
    parser.add_argument("--prompts", type=Path, help="one prompt a line; by default scenes of the demo world")
    parser.add_argument("--images", type=int, default=704)
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--k", type=int, default=2, help="latents each channel keeps at least (channel-aware)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("h-space-out"))
    args = parser.parse_args()
    start = time.perf_counter()
    dtype = torch.float32 if args.device == "cpu" else torch.float16
    pipe = SAESteeringPipeline.from_pretrained(args.model, dtype=dtype).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    prompts, scenes = prompts_of(args)
    h = kept(args.out / "h.safetensors", lambda: captured(pipe, prompts, args.batch))
    if len(h) != len(prompts):
        parser.error(f"{args.out} holds h of {len(h)} images, not {len(prompts)}; choose another --out.")
    seen, held = h[: args.images], h[args.images :]
    seconds = {"capture": time.perf_counter() - start}
    print(f"h-space of {len(h)} images: {tuple(h.shape[1:])}, {seconds['capture']:.0f} s", flush=True)
    figures: dict[str, Any] = {
        "model": Path(args.model).name, "shape": list(h.shape[1:]), "images": len(seen), "held_out": len(held),
        "torch": torch.__version__, "threads": torch.get_num_threads(), "k": args.k, "seconds": seconds, "kinds": {},
    }  # fmt: skip
    saes = {}
    for name in KINDS:
        began = time.perf_counter()
        folder = args.out / name.replace(", ", "-")
        saes[name] = load_sae(folder) if (folder / "config.json").exists() else train(name, seen, args.model)
        if isinstance(saes[name], ChannelAwareSAE):
            saes[name].thresholded_(args.k)
        seconds[name] = time.perf_counter() - began
        figures["kinds"][name] = found = reconstruction(saes[name], name, seen, held)
        print(
            f"{name:16} EV {found['ev']:.3f} cosine {found['cosine']:.3f} zeros {found['zeros']:.1%}, active a row "
            f"{found['active_a_row']:.1f}, an image {found['active_an_image']:.0f}; "
            f"PCA EV {found['pca_same_rows']['ev']:.3f}, random {found['random']['ev']:.3g}",
            flush=True,
        )
        saes[name].save_pretrained(folder)
    mean = seen.mean(0)
    figures["pca_of_the_map"] = {
        str(rank): figures_of(held, pca(seen.flatten(1), held.flatten(1), rank).view_as(held), mean)
        for rank in (16, 48, 128, 512, 768)
        if rank < len(seen)
    }
    if scenes:
        figures["probes"] = probes(saes, seen, held, scenes)
    began = time.perf_counter()
    figures["edits"] = measure_edits(pipe, saes, seen, scenes[: args.images], prompts[args.images :], args.out)
    seconds["edits"] = time.perf_counter() - began
    seconds["whole"] = time.perf_counter() - start
    (args.out / "h_space.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({key: figures[key] for key in ("pca_of_the_map", "probes", "edits", "seconds") if key in figures}))


if __name__ == "__main__":
    main()
