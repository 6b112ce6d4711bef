"""sdxl-unbox (Surkov et al., 2410.22366) and those who took its class: its FLUX branch, ItD, Concept Steerers.

`z = ReLU(TopK(W_enc (x - p) + b))`, `x̂ = W_dec z + p`. ReLU after TopK or before gives the same code.
"""

from __future__ import annotations

import torch

from ...saes import LatentStatistics, SparseAutoencoder
from ..reading import read_file
from ..weights import Weights, build, without_shift
from .base import Format, Signature

NAMES = ("encoder.weight", "latent_bias", "decoder.weight", "pre_bias")
SILENT = "stats_last_nonzero"
"""A buffer: the steps since a latent fired."""


def _convert(weights: Weights) -> SparseAutoencoder:
    tensors = weights.parts(*NAMES, turned="W_dec")
    n, d = tensors["W_enc"].shape
    weights.check_told(n_dirs_local=n, d_model=d)
    if "auxk_coef" in weights.config:
        tensors |= _of_concept_steerers(tensors)
    sae = build("TopKSAE", {"k": weights.whole("k")}, tensors, weights.origin)
    sae.statistics = _statistics(weights, n)
    return sae


def _of_concept_steerers(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Concept Steerers trained what `W_dec z + p` gives against `x - p`, so that the bias of x itself is `2 p`.

    The codes stay as they are: `W_enc (x - p) + b = W_enc (x - 2 p) + (b + W_enc p)`.
    """
    return {"b_enc": without_shift(parts["W_enc"], parts["b_enc"], parts["b_dec"]), "b_dec": 2 * parts["b_dec"]}


def _statistics(weights: Weights, n: int) -> LatentStatistics | None:
    """`mean.pt` is the mean of each latent while it fires, at one step; latents that were dead have a rate of 0."""
    file = None if weights.folder is None else weights.folder / "mean.pt"
    if file is None or not file.is_file():
        return None
    mean = Weights(read_file(file)[0], {}, str(file)).vector("", n)
    rate = torch.ones(n)
    silent, bound = weights.tensors.get(SILENT), weights.config.get("dead_steps_threshold")
    if silent is not None and silent.shape == (n,) and isinstance(bound, (int, float)):
        rate[silent > bound] = 0.0
    unknown = torch.full((1, n), torch.nan)
    return LatentStatistics(torch.tensor([999.0]), (mean * rate)[None], unknown, rate[None])


FORMAT = Format(
    "sdxl_unbox",
    "sdxl-unbox and its FLUX branch, Interpret-then-Deactivate, Concept Steerers (whose reconstructions are shifted by "
    "the bias, which is put right)",
    "k largest of `W_enc (x - pre_bias) + latent_bias`, ReLU",
    (Signature(NAMES, buffers=(SILENT,)),),
    _convert,
    bars=("activation", "activation_state_dict"),
)
