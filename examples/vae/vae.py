"""SAEs of a VAE's latents: trained in two stages, features ranked, swept, paired, and carried from image to image.

After Zhang and Prasanna (2025): `python examples/vae/vae.py`, or `... --images FOLDER` for images of your own. See
README.md here.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from vae_edits import Looker, measure_edits

from diffusers_sae import ReLUSAE, SAESteeringPipeline, TopKSAE, load_sae
from diffusers_sae.adapters.vector_vae import VectorVAE
from diffusers_sae.adapters.vector_vae_pipeline import VectorVAEPipeline
from diffusers_sae.adapters.vector_vae_training import (
    SITE,
    analysed,
    negative_elbo,
    start_at_principal_components,
)
from diffusers_sae.demo.shipped import load_judge
from diffusers_sae.demo.world import Scene, sample_scene
from diffusers_sae.evaluation.reconstruction import ReconstructionMeter, baselines
from diffusers_sae.saes import SparseAutoencoder, StatisticsAccumulator
from diffusers_sae.training import TrainingConfig
from diffusers_sae.training.from_rows import train_on_rows

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji_world"))
SIZE, SEED, LATENTS = 64, 41_000, 512
PENALTY = 0.5
"""The paper's λ in ‖x - x̂‖² + λ‖z‖₁."""
FOR_COMPONENTS = 6144
"""Images that the principal components are taken of."""

SMOKE = argparse.Namespace(count=192, held_out=32, steps=4, sae_steps=32)


class Data(NamedTuple):
    """Images `(N, 3, 64, 64)` in uint8, the last ones held out, and what each shows, where that is known."""

    images: torch.Tensor
    held_out: int
    scenes: Sequence[Scene] = ()

    def pixels(self, part: slice) -> torch.Tensor:
        """Some of them in [-1, 1]."""
        return self.images[part].float() / 127.5 - 1


def canvas_images(world: Path, count: int, held_out: int) -> Data:
    """Scenes of EmojiCanvas; its drawings are fetched from the npm registry unless they are there."""
    from canvas import Canvas

    canvas, rng = Canvas.fetched(world), random.Random(SEED)
    scenes = [sample_scene(rng) for _ in range(count + held_out)]
    return Data(_stacked([canvas.render(scene, rng) for scene in scenes]), held_out, scenes)


def folder_images(folder: Path, count: int, held_out: int) -> Data:
    """The images in a folder, cut to squares; an eighth of them is held out, at most `held_out`."""
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp", ".bmp"))
    random.Random(SEED).shuffle(files)
    if len(files) < 64:
        raise SystemExit(f"{folder} holds {len(files)} images; pass a folder of 64 or more.")
    files = files[: count + held_out]
    images = [ImageOps.fit(Image.open(file).convert("RGB"), (SIZE, SIZE)) for file in files]
    return Data(_stacked(images), min(held_out, len(images) // 8))


def _stacked(images: Sequence[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


def trained_vae(data: Data, out: Path, steps: int, batch: int, device: str) -> VectorVAE:
    """A VAE of the images that are not held out. Checkpoints lie in `out/training`."""
    from loop import fit

    seen = slice(0, len(data.images) - data.held_out)
    torch.manual_seed(0)
    vae = VectorVAE(sample_size=SIZE, components=min(384, seen.stop // 2))
    start_at_principal_components(vae, data.pixels(slice(0, min(FOR_COMPONENTS, seen.stop))))
    parts = [analysed(vae, data.pixels(slice(i, min(i + 1024, seen.stop)))) for i in range(0, seen.stop, 1024)]
    components = torch.cat([part for part, _ in parts]).to(device)
    outside = sum(amount * len(part) for part, amount in parts) / seen.stop
    vae.to(device)

    def losses(step: int, rng: random.Random) -> dict[str, torch.Tensor]:
        return negative_elbo(vae, components[torch.randint(len(components), (batch,))], outside)

    settings = argparse.Namespace(world=out, steps=steps, lr=1e-3, device=device)
    fit(vae, losses, settings, name="vae", every=100, ema_decay=0.99)
    return vae.eval()


@torch.no_grad()
def latents_of(pipe: VectorVAEPipeline, data: Data) -> torch.Tensor:
    """The means of the posteriors of all images, `(N, d)`, on the CPU."""
    vae = pipe.autoencoder
    found = []
    for i in range(0, len(data.images), 512):
        found.append(vae.encode(data.pixels(slice(i, i + 512)).to(vae.device)).latent_dist.mean.float().cpu())
    return torch.cat(found)


def tied_relu(latents: torch.Tensor, steps: int) -> SparseAutoencoder:
    """The paper's SAE: tied weights, an L1 penalty, unused latents resampled at intervals, batches of 128.

    Ours has biases and directions of length 1. The trainer scales rows by s and divides the loss by s², so that the
    penalty on raw rows is s times smaller than the one that it is told.
    """
    d = latents.shape[1]
    scale = (d / (latents - latents.mean(0)).square().sum(-1).mean()).sqrt()
    config = TrainingConfig(
        steps, 128, lr=1e-3, centre="mean", sparsity=PENALTY * float(scale), aux_weight=0.0,
        resample_every=steps // 16, dead_after=128 * (steps // 16),
    )  # fmt: skip
    torch.manual_seed(0)
    return train_on_rows(
        latents, ReLUSAE(d, LATENTS, tied=True, provenance={"site": SITE}), config, sample=len(latents)
    )


def topk(latents: torch.Tensor, steps: int, k: int) -> SparseAutoencoder:
    torch.manual_seed(0)
    config = TrainingConfig(steps, 128, lr=1e-3, centre="mean", dead_after=12_800)
    return train_on_rows(latents, TopKSAE(latents.shape[1], LATENTS, k, provenance={"site": SITE}), config)


def measured(sae: SparseAutoencoder, seen: torch.Tensor, held: torch.Tensor) -> dict[str, Any]:
    """Figures on latents held out `(M, d)`; those of latents seen `(N, d)` become the SAE's statistics."""
    statistics, meter = StatisticsAccumulator(sae.n_latents), ReconstructionMeter(sae)
    for rows in seen.split(2048):
        with torch.no_grad():
            statistics.add(0.0, sae.encode_sparse(rows))
    sae.statistics = statistics.finish()
    meter.add(0.0, held)
    figures = meter.figures()
    told = {name: figures[name] for name in ("fvu", "cosine", "l0")}
    told["dead"] = float(sae.statistics.dead.float().mean())
    rank = max(1, min(seen.shape[1], round(told["l0"])))
    return {**told, "fvu of PCA with as many numbers": baselines(seen, held, rank, sae.n_latents)["pca"]}


def kept(folder: Path, make: Callable[[], SparseAutoencoder]) -> SparseAutoencoder:
    """The SAE in a folder, or a new one."""
    return load_sae(folder) if (folder / "config.json").exists() else make()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="folder of image files; by default scenes of EmojiCanvas")
    parser.add_argument("--vae", type=Path, help="folder of a VectorVAE, which is then not trained")
    parser.add_argument("--world", type=Path, default=Path("outputs/emoji_world"), help="folder of sprites.npz")
    parser.add_argument("--count", type=int, default=12_288, help="images to train on, at most")
    parser.add_argument("--held-out", type=int, default=256)
    parser.add_argument("--steps", type=int, default=800, help="of the VAE, of 256 images each")
    parser.add_argument("--sae-steps", type=int, default=2500, help="of each SAE, of 128 latents each")
    parser.add_argument("--k", type=int, default=16, help="of the TopK SAE")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("vae-out"))
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, only to see that it runs")
    args = parser.parse_args(namespace=SMOKE if "--smoke" in sys.argv[1:] else None)
    if args.images is not None and not args.images.is_dir():
        parser.error(f"{args.images} is no folder; pass one that holds image files.")
    return args


def main() -> None:
    args = parsed()
    args.out.mkdir(parents=True, exist_ok=True)
    begin, busy = time.perf_counter(), time.process_time()
    seconds: dict[str, float] = {}

    def timed(name: str, since: float) -> None:
        seconds[name] = round(time.perf_counter() - since, 1)
        print(f"{name}: {seconds[name]} s", flush=True)

    start = time.perf_counter()
    if args.images is None:
        data = canvas_images(args.world, args.count, args.held_out)
    else:
        data = folder_images(args.images, args.count, args.held_out)
    timed("images", start)
    start, folder = time.perf_counter(), args.vae or args.out / "pipeline" / "autoencoder"
    if (folder / "config.json").exists() or args.vae:
        vae = VectorVAE.from_pretrained(folder).eval().to(args.device)
    else:
        vae = trained_vae(data, args.out, args.steps, 256, args.device)
    pipe = SAESteeringPipeline.from_pipe(VectorVAEPipeline(vae))
    pipe.save_pretrained(args.out / "pipeline")
    timed("VAE", start)

    start = time.perf_counter()
    file = args.out / "latents.safetensors"
    if not file.exists():
        save_file({"latents": latents_of(pipe, data)}, file)
    latents = load_file(file)["latents"]
    if len(latents) != len(data.images):
        raise SystemExit(
            f"{file} holds latents of {len(latents)} images, not {len(data.images)}; choose another --out."
        )
    seen, held = latents[: -data.held_out], latents[-data.held_out :]
    timed("latents", start)

    start, saes, figures = time.perf_counter(), {}, {}
    makers = {"tied": lambda: tied_relu(seen, args.sae_steps), "topk": lambda: topk(seen, args.sae_steps, args.k)}
    for name, make in makers.items():
        saes[name] = kept(args.out / name, make)
        figures[name] = measured(saes[name], seen, held)
        saes[name].save_pretrained(args.out / name)
        pipe.load_sae(saes[name], adapter_name=name)
        print(name, figures[name], flush=True)
    timed("SAEs", start)

    start = time.perf_counter()
    looker = Looker(load_judge(), data.scenes[-data.held_out :]) if data.scenes else None
    told = measure_edits(pipe, saes, held, data.pixels(slice(-data.held_out, None)), looker, args.out)
    timed("edits", start)
    seconds["whole"] = round(time.perf_counter() - begin, 1)
    seconds["whole, of processor"] = round(time.process_time() - busy, 1)
    figures = {
        "images": {"seen": len(seen), "held_out": len(held)}, "latent_dim": seen.shape[1],
        "vae_steps": args.steps, "sae_steps": args.sae_steps, "latent_deviation": float(seen.std(0).mean()),
        "saes": figures, **told, "seconds": seconds, "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    (args.out / "vae.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
