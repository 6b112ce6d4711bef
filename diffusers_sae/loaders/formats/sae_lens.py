"""SAELens (6.54): standard, gated, TopK and JumpReLU SAEs; BatchTopK is saved as JumpReLU."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ...errors import InputError
from ...saes import (
    ARCHITECTURES,
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    ReLUSAE,
    SparseAutoencoder,
    TopKSAE,
)  # fmt: skip
from ...sites import Site
from ..weights import Weights, build, without_shift
from .base import TRANSFORMER_LENS, TRANSFORMER_LENS_GATED, Format, Signature

NORMS = {"none": None, "layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}
ARCHITECTURE: dict[type, str] = {ReLUSAE: "standard", TopKSAE: "topk", JumpReLUSAE: "jumprelu", GatedSAE: "gated"}
KINDS = {name: kind.__name__ for kind, name in ARCHITECTURE.items()}
OURS = "diffusers_sae"
"""Under `metadata`: the class and the arguments of an SAE of ours that was written in this layout."""


TRAINING = ("batchtopk", "matryoshka_batchtopk")
TRAINED_THRESHOLD = "topk_threshold"
SCALE = "scaling_factor"
"""What finetuning multiplied the codes by, in old files."""
EXTRA = {"gated": ("r_mag", "b_mag"), "jumprelu": ("threshold",)}


def _convert(weights: Weights) -> SparseAutoencoder:
    architecture = _architecture(weights)
    biased = "b_gate" if architecture == "gated" else "b_enc"
    found = weights.parts("W_enc", biased, "W_dec", "b_dec", turned="W_enc")
    n, d = found["W_dec"].shape
    weights.check_told(d_sae=n, d_in=d)
    found["W_dec"] = found["W_dec"] * _scale(weights, n)
    found |= {name: weights.vector(name, n) for name in EXTRA.get(architecture, ())}
    if architecture in TRAINING:
        return _batch_topk(weights, found)
    _undo_conventions(weights, found, ["b_enc", *(["b_mag"] if "b_mag" in found else [])])
    told = weights.section("metadata").section(OURS).config
    if told.get("_class_name") in ARCHITECTURES:
        return _of_ours(told, found, weights.origin)
    arguments: dict[str, Any] = {"input_norm": _norm(weights)}
    if architecture == "topk":
        arguments["k"] = weights.whole("k") if "k" in weights.config else _legacy_k(weights)
    if architecture == "jumprelu":
        found["threshold"] = found["threshold"].clamp(min=0)  # a ReLU stands before it
    return build(KINDS[architecture], arguments, found, weights.origin)


def _batch_topk(weights: Weights, found: dict[str, torch.Tensor]) -> SparseAutoencoder:
    """What a training saved; `save_inference_model` makes a JumpReLU SAE of it, with this threshold for all latents."""
    _undo_conventions(weights, found, ["b_enc"])
    found["threshold"] = found["b_enc"].new_full((), max(0.0, weights.scalar(TRAINED_THRESHOLD)))
    arguments = {"k": math.ceil(weights.number("k")), "input_norm": _norm(weights)}
    return build("BatchTopKSAE", arguments, found, weights.origin)


def _architecture(weights: Weights) -> str:
    function = weights.config.get("activation_fn_str", weights.config.get("activation_fn"))
    return "topk" if function == "topk" else weights.choice("architecture", (*KINDS, *TRAINING), "standard")


def _scale(weights: Weights, n: int) -> torch.Tensor | float:
    if not weights.has(SCALE):
        return 1.0
    scale = weights.vector(SCALE, n)[:, None]
    if not weights.config.get("finetuning_scaling_factor") and not scale.is_meta and (scale != 1).any():
        raise weights.refuse(f"has a {SCALE} other than 1, and finetuning_scaling_factor does not say that it counts")
    return scale


def _legacy_k(weights: Weights) -> int:
    return weights.section("activation_fn_kwargs").whole("k")


def _norm(weights: Weights) -> str | None:
    told = weights.config.get("normalize_activations", "none")
    if told == "expected_average_only_in":
        return None  # SAELens runs such an SAE on the rows as they are, unless a factor was given
    if not isinstance(told, str) or told not in NORMS:
        raise weights.refuse(
            f"has normalize_activations = {told!r}, for which its files lack what is needed; known are "
            f"{', '.join(NORMS)}"
        )
    return NORMS[told]


def _undo_conventions(weights: Weights, found: dict[str, torch.Tensor], biases: list[str]) -> None:
    """Write what flags of the config change into the weights."""
    if weights.config.get("apply_b_dec_to_input", True) is False:
        W = found["W_enc"]
        found["b_enc"] = without_shift(W, found["b_enc"], found["b_dec"])
        if "b_mag" in found:
            scaled = W * found["r_mag"].exp()[:, None]
            found["b_mag"] = without_shift(scaled, found["b_mag"], found["b_dec"])
    if weights.config.get("rescale_acts_by_decoder_norm"):
        norms = found["W_dec"].norm(dim=-1)
        found["W_enc"], found["W_dec"] = found["W_enc"] * norms[:, None], found["W_dec"] / norms[:, None]
        for name in biases:
            found[name] = found[name] * norms
    factor = weights.config.get("norm_scaling_factor")
    if weights.config.get("normalize_activations") == "expected_average_only_in" and isinstance(factor, (int, float)):
        found["W_enc"], found["W_dec"] = found["W_enc"] * factor, found["W_dec"] / factor
        found["b_dec"] = found["b_dec"] / factor


def _of_ours(told: Mapping[str, Any], found: dict[str, torch.Tensor], origin: str) -> SparseAutoencoder:
    if issubclass(ARCHITECTURES[told["_class_name"]], BatchTopKSAE):
        found = {**found, "threshold": found["threshold"][0].clone()}
    arguments = {name: value for name, value in told.items() if name[:1] != "_"}
    return build(told["_class_name"], arguments, found, origin)


def _write(sae: SparseAutoencoder, folder: Path) -> None:
    """BatchTopK and Matryoshka SAEs become JumpReLU SAEs with one threshold, as SAELens writes its own."""
    kind: type = JumpReLUSAE if isinstance(sae, BatchTopKSAE) else type(sae)
    if kind not in ARCHITECTURE or (isinstance(sae, TopKSAE) and not sae.relu):
        raise InputError(f"SAELens has nothing that codes as this {type(sae).__name__} does; keep it as it is.")
    state = {name: tensor.detach().float().cpu() for name, tensor in sae.state_dict().items()}
    state["W_enc"] = state.get("W_enc", state["W_dec"]).T
    if isinstance(sae, BatchTopKSAE):
        state["threshold"] = state["threshold"].expand(sae.n_latents)
    if isinstance(sae, GatedSAE):
        state["b_gate"] = state.pop("b_enc")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(_config(sae, ARCHITECTURE[kind]), indent=1) + "\n")


def _config(sae: SparseAutoencoder, architecture: str) -> dict[str, Any]:
    own = {name: value for name, value in sae.config.items() if name[:1] != "_" and name not in ("d_in", "n_latents")}
    norms = {ours: theirs for theirs, ours in NORMS.items()}
    site, base = sae.provenance.get("site"), sae.provenance.get("base_model")
    config = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": norms[sae.input_norm],
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.54.12",
            "model_name": base,
            "hook_name": Site.of(site).path if site else None,
            OURS: {"_class_name": type(sae).__name__, **own},
        },
    }
    if architecture == "topk":
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    return config


FORMAT = Format(
    "sae_lens",
    "SAELens",
    "standard, gated, TopK, JumpReLU (BatchTopK too), as `apply_b_dec_to_input`, `normalize_activations` and "
    "`rescale_acts_by_decoder_norm` say",
    (
        Signature(TRANSFORMER_LENS, optional=(SCALE,)),
        Signature((*TRANSFORMER_LENS, "threshold"), optional=(SCALE,)),
        Signature((*TRANSFORMER_LENS, TRAINED_THRESHOLD)),
        Signature(TRANSFORMER_LENS_GATED, optional=(SCALE,)),
    ),
    _convert,
    marks=("d_sae", "sae_lens_version"),
    bars=("schema",),
    write=_write,
)
