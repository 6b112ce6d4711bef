"""Do SAEs find the features that made the data? `.venv-peers/bin/python benchmarks/ground_truth.py`.

Every kind of ours, and the peers' of the same kinds at their best of three rates, on the same rows: 512 known features
in 128 dimensions. `make extras` makes the environment. Writes `benchmarks/results/ground_truth.json`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import torch
from arguments import parse
from peers import SIDES, DictionaryLearning, Task
from tqdm import tqdm

from diffusers_sae.evaluation.known_features import KnownFeatures

ACTIVE = 8
TASK = Task(d=128, n_latents=512, k=ACTIVE, rows=1024, steps=2000)
SMOKE = Task(d=24, n_latents=64, k=ACTIVE, rows=256, steps=40)
OURS: dict[str, dict[str, float]] = {
    "topk": {},
    "batchtopk": {"rate": 0.5},
    "matryoshka": {"rate": 0.5},
    "jumprelu": {"rate": 0.5},
    "gated": {"rate": 0.5},
    "relu": {"rate": 0.5},
}
"""Kinds, and what differs from the standard settings."""
RATES = (1.0, 3.0, 10.0)


def trained(name: str, task: Task) -> dict[str, float]:
    made = KnownFeatures(task.d, task.n_latents, active=ACTIVE)
    sample, held_out = made.rows(4096), made.rows(20_000)
    torch.manual_seed(0)
    side = SIDES[name](task, sample)
    for _ in tqdm(range(task.steps), desc=f"{name} {task.kind} {task.rate}", mininterval=5):
        side.step(made.rows(task.rows))
    with torch.no_grad():
        fired = side.fired(held_out)
        error = (side.reconstruct(held_out) - held_out).square().sum()
    return {
        "rate": task.rate,
        "recovered": made.recovered(side.directions()),
        "dead": float((~fired.any(0)).float().mean()),
        "fvu": float(error / (held_out - held_out.mean(0)).square().sum()),
        "l0": float(fired.sum(-1).float().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(SIDES))
    args = parse(parser, "ground_truth.json", only=["diffusers_sae"])  # peers need their environment
    task = SMOKE if args.smoke else TASK
    figures: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.only:
        kinds = {"diffusers_sae": list(OURS), "dictionary_learning": list(DictionaryLearning.TRAINERS)}
        figures[name] = {}
        for kind in kinds.get(name, ["topk"]):
            if name == "diffusers_sae":
                found = [trained(name, replace(task, kind=kind, **OURS[kind]))]
            else:
                found = [trained(name, replace(task, kind=kind, rate=rate)) for rate in RATES]
            figures[name][kind] = max(found, key=lambda each: each["recovered"])
            print(name, kind, figures[name][kind], flush=True)
        args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
