"""Every kind of SAE whose rows are apart, with random weights."""

import torch
from tiny import SITE

from diffusers_sae.saes import ARCHITECTURES

ARGUMENTS = {"TopKSAE": {"k": 4}, "BatchTopKSAE": {"k": 4}, "MatryoshkaSAE": {"k": 4}}
ROWWISE = [name for name, cls in ARCHITECTURES.items() if cls.rows_apart and name != "Directions"]
KINDS = [(name, ARGUMENTS.get(name, {})) for name in ROWWISE]
KINDS.append(("ReLUSAE", {"tied": True}))
READ_ONLY = [
    ("TopKSAE", {"k": 24, "relu": False}),
    ("TopKSAE", {"k": 4, "input_norm": "layer_norm"}),
    *((name, {**ARGUMENTS.get(name, {}), "input_norm": "constant_norm"}) for name in ROWWISE),
]
"""Kinds that others train and we read."""


def of_kind(name, arguments, d_in=8, n_latents=32):
    """An SAE whose parameters and buffers are all random."""
    sae = ARCHITECTURES[name](d_in, n_latents, **arguments, provenance={"site": {"path": SITE}})
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in sae.state_dict().values():
            tensor += 0.3 * torch.randn(tensor.shape, generator=generator)
        if "threshold" in sae.state_dict():
            sae.threshold.fill_(0.6)
    return sae.eval()
