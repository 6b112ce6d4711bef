"""What capturing costs: `python benchmarks/capture.py`. Writes `benchmarks/results/capture.json`.

(a) generation with four sites captured at every step against bare generation, on the embedded model and on a U-Net of
the size of Stable Diffusion 1.5's; (b) streaming training of four SAEs in one pass against one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from arguments import parse
from steering_overhead import interleaved, machine, sd15_call, sd15_size

from diffusers_sae import TopKSAE
from diffusers_sae.demo.shipped import CALL, SITES, load_pipeline
from diffusers_sae.demo.world import sample_captions
from diffusers_sae.training import StreamedSAE, StreamingConfig, train_on_stream
from diffusers_sae.training.precision import DTYPES, resolve_precision

FOUR = ("unet.down_blocks.1.attentions.0", "unet.mid_block", "unet.up_blocks.1.attentions.0", SITES[0])
SD15_FOUR = (
    "unet.down_blocks.2.attentions.1", "unet.mid_block.attentions.0", "unet.up_blocks.1.attentions.0",
    "unet.up_blocks.1.attentions.1",
)  # fmt: skip


def captured(pipe: Any, sites: tuple[str, ...], rounds: int, call: dict[str, Any]) -> dict[str, Any]:
    """(a): one run of the pipeline, bare and with the sites captured."""

    def bare() -> None:
        pipe(**call, generator=torch.Generator().manual_seed(0), output_type="latent")

    def capturing() -> None:
        with pipe.capture(sites):
            bare()

    times = interleaved({"bare": bare, "captured": capturing}, rounds)
    return {"sites": sites, **times, "captured_over_bare": times["captured"] / times["bare"]}


def streamed(images: int, rounds: int, call: dict[str, Any]) -> dict[str, Any]:
    """(b): whole runs of streaming training on the embedded model, with one SAE and with four of other k."""
    pipe = load_pipeline()

    def run(ks: tuple[int, ...]) -> None:
        makers: dict[str, Callable[[int], TopKSAE]] = {str(k): partial(TopKSAE, n_latents=2560, k=k) for k in ks}
        saes = {name: StreamedSAE(SITES[0], make) for name, make in makers.items()}
        with tempfile.TemporaryDirectory() as folder:
            train_on_stream(
                pipe,
                saes,
                sample_captions(images, seed=0),
                StreamingConfig(images, batch_size=16),
                Path(folder),
                **call,
            )

    times = interleaved({"one": lambda: run((32,)), "four": lambda: run((8, 16, 32, 64))}, rounds)
    return {"images": images, **times, "four_over_one": times["four"] / times["one"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=["demo", "sd15", "streamed"])
    parser.set_defaults(images=48, steps=CALL["num_inference_steps"], side=512)
    args = parse(parser, "capture.json", rounds=1, images=16, steps=2, side=64)
    figures = json.loads(args.out.read_text()) if args.out.exists() else {}
    figures["machine"] = machine()
    call = {**CALL, "num_inference_steps": args.steps}
    if "demo" in args.parts:
        prompts = list(sample_captions(8, seed=0))
        figures["emoji-sd"] = captured(load_pipeline(), FOUR, args.rounds, {"prompt": prompts, **call})
    if "streamed" in args.parts:
        figures["streamed"] = streamed(args.images, max(3, args.rounds // 3), call)
    if "sd15" in args.parts:
        dtype = DTYPES[resolve_precision()]
        pipe, rounds = sd15_size(dtype, "cpu", args.smoke), max(3, args.rounds // 2)
        figures["sd15_size"] = {
            "dtype": str(dtype),
            **captured(pipe, SD15_FOUR, rounds, sd15_call(dtype, "cpu", 1, args.side)),
        }
    args.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
