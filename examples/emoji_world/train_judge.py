"""Train the judge on real renders: `python train_judge.py`. Writes `judge` and its accuracy on held-out renders.

Beside plain renders (blurred, noisy, shifted in tone) it sees spoilt ones (blends of two scenes, shuffled patches,
empty canvases), for which it must name no object and no style, so that it is unsure where an image is.
"""

from __future__ import annotations

import json
import random

import torch
import torch.nn.functional as F
from canvas import Canvas
from loop import Losses, arguments, fit, parse, to_tensor

from diffusers_sae.demo.judge import Judge
from diffusers_sae.demo.world import FACTORS, Scene, sample_scene


def labels_of(scenes: list[Scene], device: str) -> dict[str, torch.Tensor]:
    rows = [s.labels() for s in scenes]
    return {f: torch.tensor([r[f] for r in rows], device=device) for f in FACTORS}


def augment(x: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Small changes of tone, sharpness and noise, drawn for each image (N, 3, H, W)."""
    n = len(x)
    gain, shift = 1 + 0.06 * torch.randn(n, 3, 1, 1), 0.05 * torch.randn(n, 3, 1, 1)
    x = x * gain.to(x) + shift.to(x)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    mix = 0.7 * torch.rand(n, 1, 1, 1).to(x) * (torch.rand(n, 1, 1, 1).to(x) < 0.6)
    x = x + mix * (soft - x)
    x = x + 0.06 * torch.rand(n, 1, 1, 1).to(x) * torch.randn(x.shape).to(x)
    return x.clamp(-1, 1)


def spoil(x: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """Images that show no object in no style: blended with a neighbour, in shuffled patches, or blank."""
    n, third = len(x), len(x) // 3
    blended = (x[:third] + x[:third].roll(1, 0)) / 2
    patches = F.unfold(x[third : 2 * third], 16, stride=16)  # (n, 3*16*16, 16)
    shuffled = F.fold(patches[..., torch.randperm(16).to(x.device)], 64, 16, stride=16)
    corner = x[2 * third :, :, :1, :1].expand(n - 2 * third, -1, 64, 64)
    return torch.cat([blended, shuffled, corner])


def main() -> None:
    parser = arguments(__doc__, steps=1500, batch=128, lr=2e-3)
    parser.set_defaults(examined=4096)
    args = parse(parser, batch=16, examined=128)
    canvas = Canvas(args.world / "sprites.npz")
    judge = Judge().to(args.device, memory_format=torch.channels_last)

    def batch(rng: random.Random, n: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        scenes = [sample_scene(rng) for _ in range(n)]
        return to_tensor([canvas.render(s, rng) for s in scenes], args.device), labels_of(scenes, args.device)

    def losses(step: int, rng: random.Random) -> Losses:
        x, labels = batch(rng, args.batch)
        spoilt = args.batch // 8
        x = torch.cat([augment(x, rng), augment(spoil(x[:spoilt], rng), rng)])
        logits = judge(x.contiguous(memory_format=torch.channels_last))
        parts = {f: F.cross_entropy(z[: args.batch], labels[f], ignore_index=-1) for f, z in logits.items()}
        unsure = sum(-logits[f][args.batch :].log_softmax(-1).mean() for f in ("object", "style"))
        with torch.no_grad():
            right = {f"acc_{f}": right_share(logits[f][: args.batch], labels[f]) for f in ("object", "style", "skin")}
        return {"loss": sum(parts.values()) + 0.2 * unsure, **right}

    fit(judge, losses, args, name="judge", every=250, ema_decay=0.998)
    update_norms(judge, lambda r: batch(r, 128)[0])
    report = examine(judge, batch, args.examined)
    judge.register_to_config(thresholds=report["thresholds"])
    judge.save_pretrained(args.world / "judge")
    (args.world / "judge" / "held_out.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


def right_share(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    known = labels >= 0
    return (logits.argmax(-1) == labels)[known].float().mean()


@torch.no_grad()
def update_norms(judge: Judge, images) -> None:
    """Batch-norm statistics of the averaged weights, from fresh renders."""
    norms = [m for m in judge.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    judge.train()
    for i in range(40):
        judge(augment(images(random.Random(-100 - i)), random.Random(i)))
    judge.eval()


def examine(judge: Judge, batch, count: int = 4096) -> dict:
    """Accuracy of every head on renders with seeds of their own, and the confidence that 99 % of them exceed."""
    right: dict[str, list] = {f: [] for f in FACTORS}
    sure: dict[str, list] = {f: [] for f in FACTORS}
    for i in range(count // 128):
        x, labels = batch(random.Random(-10_000 - i), 128)
        verdict = judge.look(x)
        for f in FACTORS:
            known = labels[f] >= 0
            right[f].append((verdict.classes[f] == labels[f])[known].float())
            sure[f].append(verdict.confidence[f][known])
    return {
        "images": count,
        "accuracy": {f: round(torch.cat(r).mean().item(), 5) for f, r in right.items()},
        "thresholds": {f: round(torch.cat(s).quantile(0.01).item(), 4) for f, s in sure.items()},
    }


if __name__ == "__main__":
    main()
