"""dictionary_learning: its classes by the names of their tensors, and TopK and BatchTopK by `dict_class` alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...saes import SparseAutoencoder
from ..weights import Weights, build, without_shift
from .base import TRANSFORMER_LENS, Format

LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
GATED = ("decoder_bias", "encoder.weight", "r_mag", "gate_bias", "mag_bias", "decoder.weight")


def _class(weights: Weights) -> str | None:
    """The class that the tensors show, or the config tells."""
    trainer = weights.config.get("trainer")
    told = trainer.get("dict_class") if isinstance(trainer, Mapping) else None
    told = told or weights.config.get("dict_class")
    if weights.only(*LINEAR, "bias"):
        return told
    if weights.only(*LINEAR, "decoder.bias"):
        return "AutoEncoderNew"
    if weights.only(*GATED):
        return "GatedAutoEncoder"
    if weights.only(*TRANSFORMER_LENS, "threshold", "k", "group_sizes"):
        return "MatryoshkaBatchTopKSAE"
    if weights.only(*TRANSFORMER_LENS, "threshold") and not {"d_sae", "_class_name", "schema"} & set(weights.config):
        turned = weights.tensors["W_enc"].shape[-1:] == weights.tensors["b_enc"].shape
        return told or ("JumpReluAutoEncoder" if turned else None)
    if weights.only(*LINEAR, "b_dec", "k", "threshold") or weights.only(*LINEAR, "b_dec", "k"):
        return told or "AutoEncoderTopK or BatchTopKSAE"
    return None


def _read(weights: Weights) -> SparseAutoencoder:
    name = _class(weights)
    readers = {
        "AutoEncoder": _relu,
        "AutoEncoderNew": _relu,
        "GatedAutoEncoder": _gated,
        "JumpReluAutoEncoder": _jump_relu,
        "MatryoshkaBatchTopKSAE": _matryoshka,
        "AutoEncoderTopK": _topk,
        "BatchTopKSAE": _batch_topk,
    }
    if name in readers:
        return readers[name](weights)
    raise weights.refuse(
        f"does not tell its class; pass config={{'dict_class': ...}}, one of {', '.join(readers)}"
        if name is None or " or " in name
        else f"is a {name}, which is not known; known are {', '.join(readers)}"
    )


def _relu(weights: Weights) -> SparseAutoencoder:
    """`AutoEncoder` gets unit directions there, the norms go into its encoder; `AutoEncoderNew` subtracts nothing."""
    new = weights.has("decoder.bias")
    found = weights.parts(*LINEAR, "decoder.bias" if new else "bias", turned="W_dec")
    if new:
        found["b_enc"] = without_shift(found["W_enc"], found["b_enc"], found["b_dec"])
        return build("ReLUSAE", {}, found, weights.origin)
    norms = found["W_dec"].norm(dim=-1)
    if norms.is_meta or not torch.allclose(norms, torch.ones_like(norms)):
        found |= {
            "W_dec": found["W_dec"] / norms[:, None],
            "W_enc": found["W_enc"] * norms[:, None],
            "b_enc": found["b_enc"] * norms,
        }
    return build("ReLUSAE", {}, found, weights.origin)


def _gated(weights: Weights) -> SparseAutoencoder:
    found = weights.parts("encoder.weight", "gate_bias", "decoder.weight", "decoder_bias", turned="W_dec")
    n = len(found["b_enc"])
    found |= {"r_mag": weights.vector("r_mag", n), "b_mag": weights.vector("mag_bias", n)}
    return build("GatedSAE", {}, found, weights.origin)


def _jump_relu(weights: Weights) -> SparseAutoencoder:
    """`b_dec` is not subtracted, unless the config says so; a ReLU stands behind the threshold."""
    found = weights.parts(*TRANSFORMER_LENS, turned="W_enc")
    if not weights.config.get("apply_b_dec_to_input"):
        found["b_enc"] = without_shift(found["W_enc"], found["b_enc"], found["b_dec"])
    found["threshold"] = weights.vector("threshold", len(found["b_enc"])).clamp(min=0)
    return build("JumpReLUSAE", {}, found, weights.origin)


def _topk(weights: Weights) -> SparseAutoencoder:
    found = weights.parts(*LINEAR, "b_dec", turned="W_dec")
    return build("TopKSAE", {"k": _k(weights)}, found, weights.origin)


def _batch_topk(weights: Weights) -> SparseAutoencoder:
    found = weights.parts(*LINEAR, "b_dec", turned="W_dec")
    return build("BatchTopKSAE", {"k": _k(weights)}, found | _threshold(weights), weights.origin)


def _matryoshka(weights: Weights) -> SparseAutoencoder:
    sizes = weights.tensors["group_sizes"]
    prefixes = None if sizes.is_meta else sizes.cumsum(0).tolist()
    found = weights.parts(*TRANSFORMER_LENS, turned="W_enc") | _threshold(weights)
    return build("MatryoshkaSAE", {"k": _k(weights), "prefixes": prefixes}, found, weights.origin)


def _threshold(weights: Weights) -> dict[str, torch.Tensor]:
    value = float(weights.config.get("threshold", weights.scalar("threshold")))
    if value < 0:
        raise weights.refuse(
            f"has the threshold {value:g}, which says that it was never set; pass config={{'threshold': ...}}"
        )
    return {"threshold": weights.tensors["threshold"].new_full((), value)}


def _k(weights: Weights) -> int:
    return max(1, int(weights.scalar("k")))


FORMAT = Format(
    "dictionary_learning",
    "dictionary_learning",
    "ReLU, gated, JumpReLU (`b_dec` not subtracted), per-row TopK, BatchTopK and Matryoshka by their threshold",
    lambda weights: _class(weights) is not None,
    _read,
)
