"""What steering costs: `python benchmarks/steering_overhead.py`. Writes `benchmarks/results/steering_overhead.json`.

(a) our hook against the one that dense systems use (encode all, decode all, put the error back), side by side;
(b) a denoiser of the size of Stable Diffusion 1.5's, steered and bare;
(c) the same on a GPU, where there is one, eager and compiled;
(d) what is read and held to steer ten features of a 163,840-latent SAE that lies on disk;
(e) kernels and waits of the host that a steered step adds to a bare one, counted, and the same of another checkout of
    the package if `--before` names one; processor time of the host, at a pipeline so small that it is all there is.

Sides take turns and medians are compared, since these machines are noisy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from arguments import parse
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from steering_kernels import kernels, pipeline, steerable

from diffusers_sae import TopKSAE
from diffusers_sae.context import Context
from diffusers_sae.edits import make_edit
from diffusers_sae.prepared import prepare
from diffusers_sae.sites import Place, Site
from diffusers_sae.training.precision import DTYPES, resolve_precision

WIDTH, ROWS, K = 1280, 512, 32
LATENTS = (20_480, 163_840)
SITE = "unet.up_blocks.1.attentions.1"
SMOKE_UNET = {"block_out_channels": (32, 32, 64, 64), "norm_num_groups": 8}


def interleaved(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each side over rounds in which all of them run."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


@torch.no_grad()
def dense_hook(sae: TopKSAE, x: torch.Tensor, features: torch.Tensor, strength: float, mode: str) -> torch.Tensor:
    """What SAeuron and sdxl-unbox do at every call: a dense code, a dense decoding, and the error put back."""
    code = sae.encode(x)
    lost = x - (code @ sae.W_dec + sae.b_dec)
    if mode == "add":
        code[..., features] += strength
    else:
        code[..., features] *= strength
    return code @ sae.W_dec + sae.b_dec + lost


@torch.no_grad()
def hooks(rounds: int, latents: Sequence[int]) -> list[dict[str, Any]]:
    """(a): one call of the hook on 512 rows of width 1280."""
    from diffusers_sae.hooks import LoadedSAE, ModuleRun  # here, since (e) runs this file with older packages, too

    found = []
    module = torch.nn.Identity()
    for n in latents:
        torch.manual_seed(0)
        sae = TopKSAE(WIDTH, n, K).eval().requires_grad_(False)
        x = torch.randn(2, WIDTH, 16, 16)  # [uncond, cond] of 256 places
        rows = x.flatten(2).transpose(1, 2)
        for mode in ("add", "scale"):
            for m in (1, 10, 100):
                features = torch.randperm(n)[:m]
                context = Context(rows=2, branches=("uncond", "cond"))
                loaded = LoadedSAE("bench", sae, Site(SITE), Place("unet", module, module))
                edit = make_edit(dict.fromkeys(features.tolist(), 2.0), sae, mode=mode, branch="both")
                ready = prepare(edit, sae, None, context, None, torch.device("cpu"))
                run = ModuleRun(context)
                run.arrange([loaded.in_run(context, [ready], [])], [])
                times = interleaved(
                    {
                        "ours": partial(run.after, module, x),
                        "dense": partial(dense_hook, sae, rows, features, 2.0, mode),
                    },
                    rounds if n < 100_000 else max(2, rounds // 4),
                )
                found.append(
                    {
                        "latents": n,
                        "mode": mode,
                        "features": m,
                        **times,
                        "dense_over_ours": times["dense"] / times["ours"],
                    }
                )
                print(json.dumps(found[-1]))
    return found


def sd15_size(dtype: torch.dtype, device: str, smoke: bool = False) -> Any:
    """A pipeline with a U-Net of the size of Stable Diffusion 1.5's and random weights; nothing else is needed."""
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, **(SMOKE_UNET if smoke else {}))
    unet = unet.to(dtype).eval().requires_grad_(False)
    return steerable(unet)


def sd15_call(dtype: torch.dtype, device: str, steps: int, side: int = 512) -> dict[str, Any]:
    """Arguments of one run of `sd15_size`: images of `side` x `side` pixels, guidance on."""
    return {
        "prompt_embeds": torch.randn(1, 77, 768, dtype=dtype, device=device),
        "negative_prompt_embeds": torch.randn(1, 77, 768, dtype=dtype, device=device),
        "num_inference_steps": steps,
        "guidance_scale": 7.5,
        "height": side,
        "width": side,
    }


def machine() -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu": platform.machine(),
        "precision": resolve_precision(),
    }


@torch.no_grad()
def denoiser(
    dtype: torch.dtype, device: str, steps: int, rounds: int, smoke: bool, compiled: bool = False
) -> dict[str, Any]:
    """(b), (c): whole runs of the pipeline, guidance on, ten features steered in every mode of cost."""
    pipe = sd15_size(dtype, device, smoke)
    width = pipe.unet.get_submodule(SITE.removeprefix("unet.")).out_channels
    call = sd15_call(dtype, device, steps, 64 if smoke else 512)
    pipe.load_sae(TopKSAE(width, 20_480, K), site=SITE)
    if compiled:
        backend = "inductor" if device == "cuda" else "eager"  # the latter: smoke runs only trace
        pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend=backend)

    def run(mode: str | None) -> None:
        pipe.reset_steering()
        if mode:
            pipe.steer(dict.fromkeys(range(10), 1.5), mode=mode)
        pipe(generator=torch.Generator(device).manual_seed(0), output_type="latent", **call)

    times = interleaved({"bare": lambda: run(None), "add": lambda: run("add"), "scale": lambda: run("scale")}, rounds)
    return {
        "dtype": str(dtype),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "compiled": compiled,
        "steps": steps,
        "rounds": rounds,
        **times,
        **{f"{mode}_over_bare": times[mode] / times["bare"] for mode in ("add", "scale")},
    }


def launches(smoke: bool, before: Path | None, rounds: int) -> dict[str, Any]:
    """(e): of this package and of another checkout, in processes of their own."""
    sides = {"after": Path(__file__).parents[1], **({} if before is None else {"before": before})}
    found: dict[str, Any] = {}
    for name, folder in sides.items():
        command = [sys.executable, __file__, "--kernels", *(["--smoke"] if smoke else [])]
        told = subprocess.run(command, check=True, capture_output=True, text=True, env=_with_package(folder)).stdout
        found[name] = json.loads(told.splitlines()[-1])
    found["host"] = _host_time(sides, rounds)
    return found


def _with_package(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(folder)}


def _host_time(sides: dict[str, Path], rounds: int) -> dict[str, Any]:
    """Median processor milliseconds that a step of each plan adds to one of the bare pipeline; sides take turns."""
    told: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
    for _ in range(rounds):
        for name, folder in sides.items():
            command = [sys.executable, __file__, "--host"]
            out = subprocess.run(command, check=True, capture_output=True, text=True, env=_with_package(folder)).stdout
            for plan, milliseconds in json.loads(out.splitlines()[-1]).items():
                told[name].setdefault(plan, []).append(milliseconds)
    return {name: {plan: statistics.median(each) for plan, each in plans.items()} for name, plans in told.items()}


@torch.no_grad()
def host_time(steps: int = 20, rounds: int = 9) -> dict[str, float]:
    """Processor milliseconds a step, bare and what two plans add; runs take turns, and medians are compared."""
    embeds, latents = torch.randn(1, 7, 16), torch.randn(1, 4, 8, 8)
    call = {"prompt_embeds": embeds, "negative_prompt_embeds": embeds, "latents": latents, "height": 64, "width": 64}
    pipes = {name: pipeline(False) for name in ("bare", "add", "set")}
    for name, pipe in pipes.items():
        pipe.unet.float()
        if name != "bare":
            pipe.load_sae(TopKSAE(8, 64, 4), site="unet.up_blocks.1.attentions.0")
            pipe.steer(dict.fromkeys(range(10), 1.5), mode=name)
    times: dict[str, list[float]] = {name: [] for name in pipes}
    for i in range(rounds + 1):
        for name, pipe in pipes.items():
            start = time.process_time()
            pipe(num_inference_steps=steps, output_type="latent", **call)
            if i:
                times[name].append(1000 * (time.process_time() - start) / steps)
    return {
        "bare": statistics.median(times["bare"]),
        **{
            name: statistics.median(a - b for a, b in zip(times[name], times["bare"], strict=True))
            for name in ("add", "set")
        },
    }


def from_disk(latents: int) -> dict[str, Any]:
    """(d): a child process opens a large SAE that no cache holds, steers ten features, counts what it read and held."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_dictionary(latents, file)
        save_dictionary(64, file.with_name("small.safetensors"))
        with file.open("rb") as written:
            os.fsync(written.fileno())
            os.posix_fadvise(written.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        told = subprocess.run(
            [sys.executable, __file__, "--child", str(file)], check=True, capture_output=True, text=True
        ).stdout
        found = json.loads(told.splitlines()[-1])
        size = file.stat().st_size
    return {
        **found,
        "file_bytes": size,
        "read_share": found["read_bytes"] / size,
        "peak_share": found["peak_bytes"] / size,
    }


def save_dictionary(n: int, file: Path) -> None:
    rows, width = torch.randn(n, WIDTH), torch.zeros(WIDTH)
    save_file({"W_enc": rows, "b_enc": torch.zeros(n), "W_dec": rows.clone(), "b_dec": width}, file)


def child(file: Path) -> None:
    """Prints what opening the file and preparing an `add` of ten features read from the disk and held at most.

    A small dictionary goes first, so that what every first use loads (modules, threads) is not counted.
    """
    from diffusers_sae.loaders import load_sae

    def told(name: str) -> dict[str, str]:
        return dict(line.split(":", 1) for line in Path("/proc/self", name).read_text().splitlines())

    def memory(kind: str) -> int:
        return 1024 * int(told("status")[kind].split()[0])

    def steer(file: Path) -> None:
        sae = load_sae(file, config={"k": K})
        edit = make_edit(dict.fromkeys(range(0, sae.n_latents, sae.n_latents // 10), 2.0), sae)
        prepare(edit, sae, None, Context(), None, torch.device("cpu"))

    steer(file.with_name("small.safetensors"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    read, held = int(told("io")["read_bytes"]), memory("VmRSS")
    steer(file)
    print(json.dumps({"read_bytes": int(told("io")["read_bytes"]) - read, "peak_bytes": memory("VmHWM") - held}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1, help="denoising steps of a run of (b)")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list("abcde"))
    parser.add_argument("--before", type=Path, help="another checkout, whose package (e) counts too")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kernels", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--host", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(latents=LATENTS, gpu_steps=20)
    args = parse(parser, "steering_overhead.json", rounds=1, latents=(512, 1024), gpu_steps=2)
    if args.child:
        child(args.child)
        return
    if args.kernels or args.host:
        print(json.dumps(kernels(2, args.smoke) if args.kernels else host_time()))
        return
    figures = json.loads(args.out.read_text()) if args.out.exists() else {}
    figures["machine"] = machine()
    if "a" in args.parts:
        figures["hook"] = hooks(args.rounds, args.latents)
    if "d" in args.parts:
        figures["from_disk"] = from_disk(args.latents[-1])
        print(json.dumps(figures["from_disk"]))
    if "b" in args.parts:
        dtype, rounds = DTYPES[resolve_precision()], max(3, args.rounds // 4)
        figures["denoiser"] = denoiser(dtype, "cpu", args.steps, rounds, args.smoke)
        print(json.dumps(figures["denoiser"]))
    if "c" in args.parts and (torch.cuda.is_available() or args.smoke):
        where = (torch.float16, "cuda") if torch.cuda.is_available() else (torch.float32, "cpu")
        figures["denoiser_gpu"] = [
            denoiser(*where, args.gpu_steps, args.rounds, args.smoke, compiled) for compiled in (False, True)
        ]
        print(json.dumps(figures["denoiser_gpu"]))
    if "e" in args.parts:
        figures["kernels"] = launches(args.smoke, args.before, 1 if args.smoke else 3)
        print(json.dumps(figures["kernels"]))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
