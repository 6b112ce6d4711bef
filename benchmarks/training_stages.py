"""Where the time of a TopK training step goes, beside what memory bandwidth and peak products allow.

`python benchmarks/training_stages.py` writes a section `stages_float32` or `stages_bfloat16` of this processor's
`training_speed` results: for each stage the median milliseconds, the least bytes that it must move and products that it
must make, and the milliseconds that these would take at the bandwidth and at the rate measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from arguments import parse
from hardware import hardware, results_file
from peers import Task

from diffusers_sae import TopKSAE
from diffusers_sae.saes import ops
from diffusers_sae.training import SAETrainer, TrainingConfig, objectives
from diffusers_sae.training.memory import keep_freed_memory
from diffusers_sae.training.precision import DTYPES, resolve_precision

TASK, SMOKE = Task(1280, 20_480, 32, rows=2048, steps=20), Task(64, 1024, 8, rows=256, steps=4)


class Stages:
    """Seconds that each stage of a step takes, without what further stages inside it take."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._open: list[tuple[str, float]] = []
        self._restore: list[Callable[[], None]] = []

    def wrap(self, owner: Any, name: str, stage: str, inside: str | None = None, elsewhere: str | None = None) -> None:
        """Count a function's time as that of `stage`; if `inside` is given, only while that stage is open, and
        otherwise as that of the stage `elsewhere`, or of none."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            here = stage if inside is None or any(name == inside for name, _ in self._open) else elsewhere
            with self.stage(here) if here else nullcontext():
                return function(*args, **kwargs)

        setattr(owner, name, timed)
        self._restore.append(lambda: setattr(owner, name, function))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        now = time.perf_counter()
        if self._open:
            outer, since = self._open[-1]
            self.steps[-1][outer] += now - since
        self._open.append((name, now))
        yield
        now, (_, since) = time.perf_counter(), self._open.pop()
        self.steps[-1][name] += now - since
        if self._open:
            self._open[-1] = (self._open[-1][0], now)

    def step(self, run: Callable[[], Any]) -> None:
        """Time a step, whose stages are those wrapped and the `rest`."""
        self.steps.append(defaultdict(float))
        with self.stage("rest"):
            run()

    def close(self) -> None:
        for restore in reversed(self._restore):
            restore()

    def medians(self) -> dict[str, float]:
        """Median milliseconds of each stage."""
        names = {name for step in self.steps for name in step}
        return {name: 1000 * statistics.median(step[name] for step in self.steps) for name in names}


def measured_stages(task: Task, steps: int) -> dict[str, float]:
    """Median milliseconds of each stage of a step."""
    torch.manual_seed(0)
    rows = torch.randn(task.rows, task.d)
    config = TrainingConfig(steps=steps + 3, batch_size=task.rows)
    trainer = SAETrainer(TopKSAE(task.d, task.n_latents, task.k), config, rows)
    for _ in range(3):
        trainer.step(rows)
    stages = Stages()
    stages.wrap(torch.Tensor, "backward", "backward: rest")
    stages.wrap(ops, "_largest_products", "search: product")
    stages.wrap(ops, "largest", "search: k largest", inside="search: product")
    backward = "backward: rest"
    stages.wrap(ops, "gathered", "backward: weights' gradients", inside=backward, elsewhere="decode")
    stages.wrap(ops, "_sampled", "backward: codes' gradients", inside=backward, elsewhere="values of the chosen codes")
    stages.wrap(objectives, "fvu_of", "losses")
    stages.wrap(trainer, "_update", "update")
    try:
        for _ in range(steps):
            stages.step(lambda: trainer.step(rows))
    finally:
        stages.close()
    return stages.medians()


def least_work(task: Task) -> dict[str, tuple[float, float]]:
    """The bytes that a stage must read and write and the products and sums that it must make, with fp32 weights,
    gradients and moments. What fits into a cache is read and written once."""
    n, d, rows, k = task.n_latents, task.d, task.rows, task.k
    searched = 2 if resolve_precision() == "bfloat16" else 4
    weights, batch, pre = 4 * n * d, 4 * rows * d, searched * rows * n
    cast = weights + searched * n * d if searched == 2 else 0
    return {
        "search: product": (cast + searched * n * d + batch + pre, 2 * rows * n * d),
        "search: k largest": (pre, 0),
        "values of the chosen codes": (weights + batch, 2 * rows * k * d) if searched == 2 else (0, 0),
        "decode": (weights + batch, 2 * rows * k * d),
        "losses": (4 * batch, 0),
        "backward: codes' gradients": (weights + batch, 2 * rows * k * d),
        "backward: weights' gradients": (2 * (weights + batch), 4 * rows * k * d),
        "backward: rest": (weights + 2 * batch, 0),
        # norms of both gradients, dot products of the decoder's with its rows, and Adam: weight and moments read and
        # written, gradient read, of two matrices
        "update": (2 * weights + 2 * weights + 14 * weights, 0),
    }


def peaks(task: Task, rounds: int) -> dict[str, float]:
    """Bytes a second of a copy of a matrix and operations a second of the encoder's product."""
    source, target = torch.ones(2, task.n_latents, task.d)
    dtype = DTYPES[resolve_precision()]
    x, weight = torch.randn(task.rows, task.d, dtype=dtype), torch.randn(task.n_latents, task.d, dtype=dtype)
    out = torch.empty(task.rows, task.n_latents, dtype=dtype)
    copy = _median_seconds(lambda: target.copy_(source), rounds)
    product = _median_seconds(lambda: torch.mm(x, weight.T, out=out), rounds)
    return {
        "bytes_per_second": 2 * source.nbytes / copy,
        "operations_per_second": 2 * task.rows * task.d * task.n_latents / product,
        "product_ms": 1000 * product,
    }


def _median_seconds(run: Callable[[], Any], rounds: int) -> float:
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def stage_table(task: Task, steps: int) -> dict[str, Any]:
    """What a step's stages take and would take at the peaks."""
    peak, work, seconds = peaks(task, steps), least_work(task), measured_stages(task, steps)
    table = {}
    for name, took in sorted(seconds.items(), key=lambda item: -item[1]):
        moved, operations = work.get(name, (0, 0))
        table[name] = {
            "ms": round(took, 2),
            "least_mb": round(moved / 1e6, 1),
            "ms_at_bandwidth": round(1000 * moved / peak["bytes_per_second"], 2),
            "ms_at_peak_product": round(1000 * operations / peak["operations_per_second"], 2),
        }
    total = sum(seconds.values())
    return {"peaks": peak, "step_ms": total, "share_of_the_product": peak["product_ms"] / total, "table": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    args = parse(parser, results_file("training_speed"))
    keep_freed_memory()
    task = SMOKE if args.smoke else TASK
    figures = json.loads(args.out.read_text()) if args.out.exists() else {}
    figures[f"stages_{resolve_precision()}"] = stages = {"hardware": hardware(), **stage_table(task, task.steps)}
    for name, row in stages["table"].items():
        print(f"{name:30} {row['ms']:8.2f} ms {row['ms_at_bandwidth']:8.2f} {row['ms_at_peak_product']:8.2f}")
    print(json.dumps({name: value for name, value in stages.items() if name != "table"}))
    args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
