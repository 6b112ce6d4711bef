"""sparsify (EleutherAI), and SAeUron and SAEmnesia, which use its layout: per-row TopK of `ReLU(W (x - b_dec) + b)`."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from ...errors import InputError
from ...saes import SparseAutoencoder, TopKSAE
from ..weights import Weights, build
from .base import Format, Signature

NAMES = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")


def _convert(weights: Weights) -> SparseAutoencoder:
    config = weights.config
    if config.get("transcode") or config.get("skip_connection") or weights.has("W_skip"):
        raise weights.refuse(
            "is a transcoder, which gives a module's output from its input and cannot steer one tensor"
        )
    weights.choice("activation", ("topk",), "topk")
    tensors = weights.parts(*NAMES)
    n, d = tensors["W_enc"].shape
    weights.check_told(num_latents=n, d_in=d)
    norm = "layer_norm" if config.get("input_unit_norm") else None
    return build("TopKSAE", {"k": weights.whole("k"), "input_norm": norm}, tensors, weights.origin)


def _write(sae: SparseAutoencoder, folder: Path) -> None:
    if not isinstance(sae, TopKSAE) or not sae.relu or sae.input_norm is not None:
        raise InputError(
            f"sparsify holds TopK SAEs of plain rows, and this is a {type(sae).__name__}; choose sae_lens."
        )
    state = {name: tensor.detach().float().contiguous().cpu() for name, tensor in sae.state_dict().items()}
    names = dict(zip(NAMES, ("W_enc", "b_enc", "W_dec", "b_dec"), strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    save_file({theirs: state[ours] for theirs, ours in names.items()}, folder / "sae.safetensors")
    config = {
        "activation": "topk",
        "expansion_factor": max(1, sae.n_latents // sae.d_in),
        "normalize_decoder": False,  # at reading it means nothing, but SAELens takes it for "b_dec is not subtracted"
        "num_latents": sae.n_latents,
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_in,
    }
    (folder / "cfg.json").write_text(json.dumps(config, indent=1) + "\n")


FORMAT = Format(
    "sparsify",
    "sparsify, SAeUron, SAEmnesia",
    "k largest of `ReLU(W_enc (x - b_dec) + b_enc)` of each row, also where BatchTopK was trained",
    (Signature(NAMES, optional=("W_skip",)),),
    _convert,
    rows="W_dec",
    write=_write,
)
