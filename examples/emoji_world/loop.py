"""The training loop that every model of the demo world shares: resumes after a kill, logs, keeps an average of the
weights and draws a sheet of samples now and then. The same script runs on a CPU and on a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import nn
from tqdm import tqdm

from diffusers_sae.training.memory import keep_freed_memory
from diffusers_sae.training.precision import resolve_precision

Losses = dict[str, torch.Tensor]
"""Named scalars; `loss` is the one to minimise."""


def arguments(description: str | None, *, steps: int, batch: int, lr: float) -> argparse.ArgumentParser:
    """The flags that every training script has; see `parse`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--world", type=Path, default=Path("outputs/emoji_world"), help="folder of all the models")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def parse(parser: argparse.ArgumentParser, **smoke: int) -> argparse.Namespace:
    """Parses the command line; with `--smoke`, two steps on four images, and `smoke` for arguments of the script."""
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes, only to see that it runs")
    if "--smoke" not in sys.argv[1:]:
        return parser.parse_args()
    return parser.parse_args(namespace=argparse.Namespace(**{"steps": 2, "batch": 4, **smoke}))


def autocast(device: str) -> torch.autocast:
    """bfloat16 where the processor or card has units for it; `DIFFUSERS_SAE_PRECISION` overrides that."""
    enabled = resolve_precision("auto", device) == "bfloat16"
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled)


def schedule(step: int, steps: int, warmup: int = 200, decay: float = 0.3) -> float:
    """Share of the peak rate: linear warm-up, constant, then a half cosine to 1 % over the last `decay` of the run."""
    start = steps * (1 - decay)
    tail = max(0.0, (step - start) / (steps - start))
    return min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, tail))))


def fit(
    model: nn.Module,
    losses: Callable[[int, random.Random], Losses],
    args: argparse.Namespace,
    *,
    name: str,
    sheet: Callable[[], Image.Image] | None = None,
    every: int = 500,
    weight_decay: float = 0.01,
    ema_decay: float = 0.999,
) -> None:
    """Minimise `losses(step, rng)["loss"]` and leave the averaged weights in `model`.

    Everything random is drawn from generators seeded by the step, so that a resumed run sees the data that an
    uninterrupted one would have seen. A checkpoint is written under a new name and then renamed.
    """
    keep_freed_memory()
    folder = args.world / "training"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = folder / f"{name}.pt", folder / f"{name}.jsonl"
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    ema = EMAModel(params, decay=ema_decay, use_ema_warmup=True, power=0.8)
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=args.device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        first = state["step"]
        print(f"{name}: resumed at step {first}")
    ema.to(args.device)
    smooth: dict[str, float] = {}
    start = time.time()
    bar = tqdm(range(first, args.steps), initial=first, total=args.steps, desc=name, mininterval=5)
    cast = autocast(args.device)
    for step in bar:
        rng = random.Random(step * 7919 + 1)
        torch.manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * schedule(step, args.steps)
        with cast:
            parts = losses(step, rng)
        parts["loss"].backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        ema.step(params)
        for key, value in parts.items():
            number = value.item()
            smooth[key] = 0.98 * smooth.get(key, number) + 0.02 * number
        if (step + 1) % every == 0 or step + 1 == args.steps:
            if not math.isfinite(smooth["loss"]):
                raise FloatingPointError(f"{name}: the loss is not finite at step {step}; the last checkpoint is kept.")
            bar.set_postfix({k: f"{v:.4f}" for k, v in smooth.items()})
            ema.store(params)
            ema.copy_to(params)
            if sheet is not None:
                model.eval()
                sheet().save(folder / f"{name}.png")
                model.train()
            ema.restore(params)
            partial = checkpoint.with_suffix(".part")
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "ema": ema.state_dict(),
                    "step": step + 1,
                },
                partial,
            )
            partial.rename(checkpoint)
            with log.open("a") as file:
                file.write(json.dumps({"step": step + 1, "seconds": round(time.time() - start), **smooth}) + "\n")
    ema.copy_to(params)
    model.eval()


def to_tensor(images: list[Image.Image], device: str) -> torch.Tensor:
    """(N, 3, H, W) in [-1, 1], channels last."""
    import numpy as np

    batch = torch.from_numpy(np.stack([np.asarray(i) for i in images])).to(device)  # (N, H, W, 3)
    return batch.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(batch: torch.Tensor) -> list[Image.Image]:
    """The inverse of `to_tensor`."""
    array = ((batch.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(a) for a in array]


def mosaic(images: list[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    w, h = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (w + gap), rows * (h + gap)), "white")
    for i, image in enumerate(images):
        sheet.paste(image, ((i % columns) * (w + gap), (i // columns) * (h + gap)))
    return sheet
