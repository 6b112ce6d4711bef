"""What makes an SAE the one it is: everything that shapes its codes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .base import SparseAutoencoder

HALVES = (torch.float16, torch.bfloat16)
"""Types that SAEs are rounded to, to take half the memory."""
NOT_OF_CODES = ("d_in", "n_latents", "provenance")
"""Arguments that every SAE has: the shapes of the weights tell the first two, and nothing depends on the third."""
PORTION = 2**22
"""Numbers that are hashed together."""


def settings_of(sae: SparseAutoencoder) -> dict[str, Any]:
    """The arguments that shape codes beside the weights, as they are now (`sae.k = 1` counts), as plain values."""
    names = sae.code_settings
    if names is None:
        names = tuple(name for name in sae.config if name[:1] != "_" and name not in NOT_OF_CODES)
    return {name: _plain(_setting(sae, name)) for name in sorted(names)}


def fingerprint(sae: SparseAutoencoder, dtype: torch.dtype = torch.float32) -> str:
    """SHA-256 of an SAE's weights as fp32, whatever type they are kept in; or of what rounding to `dtype` leaves."""
    return fingerprints(sae, [dtype])[name_of(dtype)]


def fingerprints(sae: SparseAutoencoder, dtypes: Sequence[torch.dtype]) -> dict[str, str]:
    """The fingerprint for each of some types, by its name, with the weights read once."""
    sae.fetch()
    digests = {dtype: hashlib.sha256() for dtype in dtypes}
    for name, tensor in sorted(sae.state_dict().items()):
        for dtype, digest in digests.items():
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            for numbers in tensor.detach().flatten().split(PORTION):
                digest.update(numbers.cpu().to(dtype).float().numpy().tobytes())
    return {name_of(dtype): digest.hexdigest() for dtype, digest in digests.items()}


def name_of(dtype: torch.dtype) -> str:
    """`float16` of `torch.float16`."""
    return str(dtype).removeprefix("torch.")


def _setting(sae: SparseAutoencoder, name: str) -> Any:
    """An argument as the SAE has it now; `getattr` alone would have diffusers warn of arguments it did not keep."""
    has_it = name in vars(sae) or hasattr(type(sae), name)
    return getattr(sae, name) if has_it else sae.config.get(name)


def _plain(value: Any) -> Any:
    """A value as JSON has it, so that it equals itself read back."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, Sequence):
        return [_plain(each) for each in value]
    return str(value)
