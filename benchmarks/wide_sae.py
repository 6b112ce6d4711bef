"""What the widest SAEs cost: `python benchmarks/wide_sae.py`. Writes `benchmarks/results/wide_sae.json`.

(a) peak memory of whole processes that train an SAE of 163,840 latents for rows of width 1280 (a few steps, AuxK among
them; checkpoint; save; load), go on from its checkpoint, and steer a Kandinsky 2.2 pipeline with random weights and
image embeddings of that width by it; (b) FVU and dead latents of smaller SAEs after equal steps of each optimizer, at
several rates, on known features and on activations of the embedded model.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from arguments import parse
from safetensors.torch import load_file, save_file
from steering_overhead import machine
from tqdm import tqdm

from diffusers_sae import SAESteeringPipeline, TopKSAE, load_sae
from diffusers_sae.adapters.image_embeds import transferred, turned
from diffusers_sae.capture import ActivationStore, StoreConfig, store_activations
from diffusers_sae.demo.shipped import CALL, SITES, load_pipeline
from diffusers_sae.demo.world import sample_captions
from diffusers_sae.evaluation.known_features import KnownFeatures
from diffusers_sae.training import SAETrainer, TrainingConfig
from diffusers_sae.training.checkpoints import read_checkpoint, write_checkpoint

SMOKE = "--smoke" in sys.argv  # the children are given it, too
WIDTH, LATENTS, K, ROWS = (64, 1024, 8, 256) if SMOKE else (1280, 163_840, 32, 2048)
FEATURES, TURNED = (256, 30) if SMOKE else (16_384, 300)
RATES = (1e-3, 4e-3) if SMOKE else (1e-3, 2e-3, 4e-3, 8e-3, 16e-3)
SMALL = {"latents": 2048, "k": 16, "rows": 1024, "steps": 2 if SMOKE else 400}
IMAGES, STEPS = (24, 2) if SMOKE else (96, CALL["num_inference_steps"])


def peak() -> float:
    """The most memory that this process ever held, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def settings(optimizer: str) -> TrainingConfig:
    return TrainingConfig(1000, ROWS, dead_after=2 * ROWS, optimizer=optimizer)  # so soon that AuxK takes part


def wide() -> TopKSAE:
    torch.manual_seed(0)
    return TopKSAE(WIDTH, LATENTS, K, provenance={"site": {"path": "image_embeds"}}).train()


def train(folder: Path, optimizer: str) -> dict[str, Any]:
    """Steps on all rows, a checkpoint, the trained SAE saved and loaded."""
    batches = load_file(folder / "rows.safetensors")["rows"].split(ROWS)
    peaks = {"imports and rows": peak()}
    trainer = SAETrainer(wide(), settings(optimizer), batches[0])
    peaks["parameters"] = peak()
    seconds, figures = [], []
    for rows in batches:
        start = time.process_time()
        figures.append(trainer.step(rows))
        seconds.append(time.process_time() - start)
        peaks["step without AuxK" if figures[-1]["aux"] == 0 else "step with AuxK"] = peak()
    write_checkpoint(folder / "checkpoint.pt", trainer.state_dict())
    peaks["checkpoint"] = peak()
    sae = trainer.finish()
    sae.save_pretrained(folder / "sae")
    peaks["saved"] = peak()
    directions = sae.W_dec[:8].clone()
    del trainer, sae
    loaded = load_sae(folder / "sae")
    loaded.fetch()
    assert torch.equal(loaded.W_dec[:8], directions)
    peaks["loaded"] = peak()
    return {
        "optimizer": optimizer,
        "steps": figures,
        "processor_seconds_of_steps": seconds,
        "peak_gib_so_far": peaks,
        "peak_gib": peak(),
    }


def resume(folder: Path, optimizer: str) -> dict[str, Any]:
    """One more step from the checkpoint."""
    trainer = SAETrainer(wide(), settings(optimizer), None)
    state = read_checkpoint(folder / "checkpoint.pt")
    assert state is not None
    trainer.load_state_dict(state)
    del state
    figures = trainer.step(load_file(folder / "rows.safetensors")["rows"][:ROWS])
    return {"step": trainer.step_count, **figures, "peak_gib": peak()}


def kandinsky() -> Any:
    """A Kandinsky 2.2 pipeline with random weights, small but for the width of its image embeddings."""
    from diffusers import DDIMScheduler, KandinskyV22Pipeline, UNet2DConditionModel, VQModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(32, 64),
        layers_per_block=1,
        encoder_hid_dim=WIDTH,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=32,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
    )
    movq = VQModel(
        block_out_channels=[32, 64],
        down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    pipe = KandinskyV22Pipeline(unet=unet.eval(), scheduler=DDIMScheduler(clip_sample=False), movq=movq.eval())
    pipe.set_progress_bar_config(disable=True)
    return SAESteeringPipeline.from_pipe(pipe)


def steer(folder: Path, _: str) -> dict[str, Any]:
    """Hundreds of features added and set in the pipeline, and on embeddings in hand."""
    rows = load_file(folder / "rows.safetensors")["rows"][:64]
    pipe = kandinsky()
    features = {int(j): 0.5 for j in torch.randperm(LATENTS, generator=torch.Generator().manual_seed(0))[:TURNED]}
    peaks, seconds, moved = {"imports, rows and pipeline": peak()}, {}, {}

    def embedded() -> tuple[torch.Tensor, torch.Tensor]:
        with pipe.capture(["image_embeds"]) as activations:
            images = pipe(
                image_embeds=rows[:1], negative_image_embeds=torch.zeros_like(rows[:1]), num_inference_steps=2,
                height=64, width=64, generator=torch.Generator().manual_seed(0), output_type="pt",
            ).images  # fmt: skip
        return activations["image_embeds"].rows("cond")[0, 0], images

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found = work()
        seconds[name], peaks[name] = time.perf_counter() - start, peak()
        return found

    _, bare = embedded()
    timed("load_sae", lambda: pipe.load_sae(folder / "sae"))
    for mode in ("add", "set"):
        pipe.reset_steering()
        if mode == "set":  # others than those that are 0 as it is
            active = load_sae(folder / "sae")
            active.fetch()
            features |= dict.fromkeys(active.encode_sparse(rows[0]).indices.tolist(), 0.5)
            del active
        pipe.steer(features, mode=mode)
        found, images = timed(f"steer, {mode}", embedded)
        moved[mode] = float((images - bare).abs().mean())
        sae = load_sae(folder / "sae")
        torch.testing.assert_close(timed(f"turned, {mode}", partial(turned, sae, rows[0], features, mode)), found)
        timed(f"turned 64 rows, {mode}", partial(turned, sae, rows, features, mode))
    timed("transferred 64 rows, all features", partial(transferred, sae, rows, rows.flip(0)))
    timed("transferred 64 rows, some features", partial(transferred, sae, rows, rows.flip(0), list(features)))
    assert min(moved.values()) > 0
    return {
        "features": len(features),
        "seconds": seconds,
        "mean_change_of_the_image": moved,
        "peak_gib_so_far": peaks,
        "peak_gib": peak(),
    }


CHILDREN = {"train": train, "resume": resume, "steer": steer}


def in_process(name: str, folder: Path, optimizer: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", name, "--folder", str(folder), "--optimizer", optimizer]
    command += ["--smoke"] if SMOKE else []
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(name, optimizer, told.splitlines()[-1], flush=True)
    return json.loads(told.splitlines()[-1])


def memory(steps: int, optimizers: list[str]) -> Iterator[dict[str, Any]]:
    """(a), as far as it is known, after every optimizer."""
    task = {"width": WIDTH, "latents": LATENTS, "k": K, "rows_a_step": ROWS, "steps": steps}
    found: dict[str, Any] = {"task": task, "parameters_gib": 2 * 4 * WIDTH * LATENTS / 2**30}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = KnownFeatures(WIDTH, FEATURES, active=K * 3 // 4)
        save_file({"rows": made.rows(steps * ROWS)}, folder / "rows.safetensors")
        for optimizer in optimizers:
            found[optimizer] = {part: in_process(part, folder, optimizer) for part in ("train", "resume")}
            if "steer" not in found:
                found["steer"] = in_process("steer", folder, optimizer)
            yield found


def stored(folder: Path) -> ActivationStore:
    """Activations of the embedded model."""
    prompts, call = list(sample_captions(IMAGES, seed=0)), {**CALL, "num_inference_steps": STEPS}
    config = StoreConfig(IMAGES, 8, places=64)
    return store_activations(load_pipeline(), [SITES[1]], prompts, folder, config, **call)[SITES[1]]


def after_training(
    optimizer: str, lr: float, batches: Iterator[torch.Tensor], held_out: torch.Tensor
) -> dict[str, float]:
    """FVU on rows held out `(N, d)`, and the share of latents that fire on none of them."""
    sample = torch.cat([next(batches) for _ in range(4)])
    torch.manual_seed(0)
    sae = TopKSAE(sample.shape[1], SMALL["latents"], SMALL["k"]).train()
    config = TrainingConfig(SMALL["steps"], SMALL["rows"], lr=lr, optimizer=optimizer, dead_after=100_000)
    trainer = SAETrainer(sae, config, sample)
    for _ in tqdm(range(SMALL["steps"]), desc=f"{optimizer} {lr}", mininterval=5):
        trainer.step(next(batches))
    with torch.no_grad():
        code = trainer.finish().encode_sparse(held_out)
        error = (sae.decode_sparse(code) - held_out).square().sum()
    fired = code.indices[code.values > 0].unique()
    return {
        "fvu": float(error / (held_out - held_out.mean(0)).square().sum()),
        "dead": 1 - len(fired) / SMALL["latents"],
    }


def known_features() -> tuple[Iterator[torch.Tensor], torch.Tensor]:
    made = KnownFeatures(128, SMALL["latents"] // 2, active=SMALL["k"] * 3 // 4)
    held_out = made.rows(20_000)
    return iter(lambda: made.rows(SMALL["rows"]), None), held_out


def activations(store: ActivationStore) -> tuple[Iterator[torch.Tensor], torch.Tensor]:
    held_out = store.part(start=-2)
    return store.part(stop=-2).batches(SMALL["rows"], epochs=1000), next(held_out.batches(len(held_out)))


def quality(optimizers: list[str]) -> Iterator[dict[str, Any]]:
    """(b), as far as it is known, after every optimizer on every kind of rows."""
    found: dict[str, Any] = {"task": SMALL}
    with tempfile.TemporaryDirectory() as folder:
        store = stored(Path(folder))
        sources = {"known features": known_features, SITES[1]: lambda: activations(store)}
        for name, source in sources.items():
            found[name] = {}
            for optimizer in optimizers:
                by_rate = {str(lr): after_training(optimizer, lr, *source()) for lr in RATES}
                best = min(by_rate, key=lambda lr, by_rate=by_rate: by_rate[lr]["fvu"])
                found[name][optimizer] = {**by_rate, "best": {"lr": float(best), **by_rate[best]}}
                print(name, optimizer, json.dumps(found[name][optimizer]), flush=True)
                yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=["memory", "quality"])
    parser.add_argument("--optimizers", type=lambda text: text.split(","), default=["adafactor", "adam"])
    parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--optimizer", help=argparse.SUPPRESS)
    args = parse(parser, "wide_sae.json")
    if args.child:
        print(json.dumps(CHILDREN[args.child](args.folder, args.optimizer)))
        return
    figures = json.loads(args.out.read_text()) if args.out.exists() else {}
    figures["machine"] = machine()
    for part in args.parts:
        for found in memory(args.steps, args.optimizers) if part == "memory" else quality(args.optimizers):
            figures[part] = found
            args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
