"""Rows a second of TopK training, ours beside the peers': `.venv-peers/bin/python benchmarks/training_speed.py`.

`make extras` makes the environment. Writes this processor's `benchmarks/results/training_speed_*.json`: medians
of single steps that take turns, the floor (the encoder's product alone), the peak memory of each side in a process of
its own, the FVU on rows held out after equal rows, at each side's best rate, and in how many fewer rows and how much
less time ours reaches the best of the peers' FVUs; that on rows with known features, and with `--store` on stored
activations of a pipeline. `training_stages.py` adds where the time of our step goes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from arguments import parse
from hardware import hardware, results_file
from peers import SIDES, Task
from tqdm import tqdm

from diffusers_sae.capture import ActivationStore
from diffusers_sae.evaluation.known_features import KnownFeatures
from diffusers_sae.training.memory import keep_freed_memory
from diffusers_sae.training.precision import DTYPES, resolve_precision

TASK = Task(d=1280, n_latents=20_480, k=32, rows=2048, steps=14)
QUALITY = Task(d=256, n_latents=2048, k=16, rows=1024, steps=600)
SMOKE, SMOKE_QUALITY = Task(64, 512, 8, rows=256, steps=14), Task(16, 64, 4, rows=256, steps=24)
RATES = {"diffusers_sae": (0.3, 1.0, 3.0)}
PEERS_RATES = (1.0, 3.0, 10.0, 30.0, 100.0)
"""Multiples of each side's own rate; the best should be neither the first nor the last."""
SHORTER = (16, 12, 10, 8, 7, 6, 5, 4, 3.5, 3, 2.5, 2.25, 2, 1.5, 1)


def data(task: Task) -> KnownFeatures:
    """Rows with about as many features as there are latents and active ones as there are of those."""
    return KnownFeatures(task.d, task.n_latents // 2, active=task.k * 3 // 4, noise=0.02)


def floor(task: Task) -> Callable[[], Any]:
    """The encoder's product alone, in the precision that `"auto"` means here."""
    dtype = DTYPES[resolve_precision()]
    x, weight = torch.randn(task.rows, task.d, dtype=dtype), torch.randn(task.n_latents, task.d, dtype=dtype)
    out = torch.empty(task.rows, task.n_latents, dtype=dtype)
    return lambda: torch.mm(x, weight.T, out=out)


def speed(task: Task, rounds: int, names: list[str]) -> dict[str, Any]:
    """Median seconds of a step of each side, which take turns."""
    made = data(task)
    sample = made.rows(4096)
    sides = {}
    for name in names:
        torch.manual_seed(0)
        sides[name] = SIDES[name](task, sample)
    times: dict[str, list[float]] = {name: [] for name in (*sides, "floor")}
    product = floor(task)
    for i in tqdm(range(rounds + 2), desc="rounds"):
        rows = made.rows(task.rows)
        for name in times:
            start = time.perf_counter()
            sides[name].step(rows) if name in sides else product()
            if i > 1:
                times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(each) for name, each in times.items()}
    fastest = min((name for name in names if name != "diffusers_sae"), key=lambda name: seconds[name], default=None)
    against = {
        "fastest_peer": fastest,
        "ours_over_fastest_peer": seconds[fastest] / seconds["diffusers_sae"],
    } if fastest else {}  # fmt: skip
    return {
        "seconds_a_step": seconds,
        "rows_a_second": {name: task.rows / each for name, each in seconds.items()},
        **against,
        "share_of_the_floor": seconds["floor"] / seconds["diffusers_sae"],
    }


def memory(task: Task, names: list[str]) -> dict[str, float]:
    """Peak resident bytes of each side over three steps, less what the process held before it was made."""
    found = {}
    for name in names:
        command = [sys.executable, __file__, "--child", name, "--task", json.dumps(asdict(task))]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found[name] = float(told.splitlines()[-1])
    return found


def child(name: str, task: Task) -> None:
    made = data(task)
    sample, batches = made.rows(4096), [made.rows(task.rows) for _ in range(3)]
    SIDES[name](replace(task, d=8, n_latents=64, k=4), sample[:, :8]).step(batches[0][:, :8])  # imports and threads
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    side = SIDES[name](task, sample)
    for rows in batches:
        side.step(rows)
    print(_resident("VmHWM") - before)


def _resident(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(kind + ":")))


class Stored:
    """Rows of a store, in place of `KnownFeatures`."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        store = ActivationStore(folder)
        self._held_out = store.part(start=-2)
        self._batches = store.part(stop=-2).batches(256, seed=seed, epochs=1000)

    def rows(self, n: int) -> torch.Tensor:
        return torch.cat([next(self._batches) for _ in range(n // 256)])

    def held_out(self, n: int) -> torch.Tensor:
        return next(self._held_out.batches(n))


def fvu_after(name: str, task: Task, store: Path | None) -> dict[str, float]:
    """FVU on rows held out after the task's steps."""
    made = Stored(store) if store else data(task)
    sample = made.rows(4096)
    held_out = made.held_out(8192) if isinstance(made, Stored) else made.rows(8192)
    torch.manual_seed(0)
    side = SIDES[name](task, sample)
    for _ in tqdm(range(task.steps), desc=f"{name} {task.rate} {task.steps}", mininterval=5):
        side.step(made.rows(task.rows))
    with torch.no_grad():
        error = (side.reconstruct(held_out) - held_out).square().sum()
    found = {"fvu": float(error / (held_out - held_out.mean(0)).square().sum())}
    if isinstance(made, KnownFeatures):
        found["recovered"] = made.recovered(side.directions())
    print(name, task.rate, task.steps, found, flush=True)
    return found


def quality(task: Task, store: Path | None, names: list[str]) -> dict[str, Any]:
    """Every side's best FVU after equal rows, and the shortest run of ours that is as good as the best peer's."""
    sides: dict[str, Any] = {}
    for name in names:
        rates = RATES.get(name, PEERS_RATES)
        sides[name] = {str(rate): fvu_after(name, replace(task, rate=rate), store) for rate in rates}
        rate = min(sides[name], key=lambda rate: sides[name][rate]["fvu"])
        sides[name]["best"] = {"rate": float(rate), **sides[name][rate]}
    rivals = [name for name in sides if name != "diffusers_sae"]
    if not rivals:
        return {"task": asdict(task), "sides": sides}
    rival = min(rivals, key=lambda name: sides[name]["best"]["fvu"])
    best, fewer, shorter = sides[rival]["best"]["fvu"], None, {}
    for share in SHORTER:
        ours = replace(task, rate=sides["diffusers_sae"]["best"]["rate"], steps=int(task.steps / share))
        shorter[share] = fvu_after("diffusers_sae", ours, store)["fvu"]
        if shorter[share] <= best:
            fewer = share
            break
    return {
        "task": asdict(task),
        "sides": sides,
        "best_peer": rival,
        "ours_after_a_share_of_the_rows": shorter,
        "times_fewer_rows_to_the_best_peers_fvu": fewer,
    }


def time_to_equal_fvu(figures: dict[str, Any], rounds: int) -> dict[str, Any]:
    """How much sooner ours reaches the best FVU of any peer at its best rate, by the steps in `quality`'s figures and
    step times measured in turns, on the same task."""
    task, rival = Task(**figures["task"]), figures["best_peer"]
    fewer = figures["times_fewer_rows_to_the_best_peers_fvu"]
    if fewer is None:
        raise SystemExit(f"Ours does not reach the FVU of {rival} in {task.steps} steps.")
    seconds = speed(task, rounds, ["diffusers_sae", rival])["seconds_a_step"]
    ours, peers = int(task.steps / fewer) * seconds["diffusers_sae"], task.steps * seconds[rival]
    return {
        "fvu": figures["sides"][rival]["best"]["fvu"],
        "peer": rival,
        "peer_seconds": peers,
        "our_seconds": ours,
        "times_shorter": peers / ours,
        "seconds_a_step": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=["speed", "memory", "quality", "time"])
    parser.add_argument(
        "--sides", type=lambda text: text.split(","), default=list(SIDES), help="ours is diffusers_sae; default: all"
    )
    parser.add_argument("--store", type=Path, help="folder of one site that `diffusers-sae capture` made")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    args = parse(
        parser, results_file("training_speed"), rounds=1, sides=["diffusers_sae"]
    )  # peers need their environment
    if args.child:
        child(args.child, Task(**args.task))
        return
    figures = json.loads(args.out.read_text()) if args.out.exists() else {}
    task = replace(SMOKE if args.smoke else TASK, steps=args.rounds + 2)
    keep_freed_memory()  # for every side
    figures["hardware"] = hardware()
    figures["task"] = asdict(task)
    if "speed" in args.parts:
        figures["speed"] = speed(task, args.rounds, args.sides)
        print(json.dumps(figures["speed"], indent=1))
    if "memory" in args.parts:
        figures["peak_bytes"] = memory(task, args.sides)
        print(json.dumps(figures["peak_bytes"]))
    args.out.write_text(json.dumps(figures, indent=1) + "\n")
    if "quality" in args.parts:
        figures["quality"] = quality(SMOKE_QUALITY if args.smoke else QUALITY, None, args.sides)
        args.out.write_text(json.dumps(figures, indent=1) + "\n")
    if "time" in args.parts and "best_peer" in figures.get("quality", {}):
        figures["time_to_equal_fvu"] = time_to_equal_fvu(figures["quality"], 5 * args.rounds)
        print(json.dumps(figures["time_to_equal_fvu"]))
    if args.store:
        width = ActivationStore(args.store).width
        figures["quality_on_activations"] = quality(
            Task(width, 8 * width, 32, rows=1024, steps=600), args.store, args.sides
        )
    args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
