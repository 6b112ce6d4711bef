"""Which precision a training run uses: a setting that is resolved from the hardware once and then recorded."""

from __future__ import annotations

import os
import platform

import torch

from ..errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PRECISIONS = ("auto", *DTYPES)
VARIABLE = "DIFFUSERS_SAE_PRECISION"
"""Environment variable that says what "auto" means: float32 or bfloat16."""


def resolve_precision(precision: str = "auto", device: torch.device | str = "cpu") -> str:
    """What `precision` means on `device`: `"float32"` or `"bfloat16"`.

    `"auto"` is `"bfloat16"` where the processor or card has units for it. It depends on the hardware's capabilities
    alone and never on a measurement, so that the same command gives the same bits on the same machine. The environment
    variable `DIFFUSERS_SAE_PRECISION` overrides `"auto"`.

    Raises:
        InputError: if `precision`, or the environment variable, is not a precision.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision={precision!r} is not a precision; choose from {', '.join(PRECISIONS)}.")
    if precision != "auto":
        return precision
    override = os.environ.get(VARIABLE, "auto")
    if override not in PRECISIONS:
        raise InputError(f"{VARIABLE}={override!r} is not a precision; set it to one of {', '.join(PRECISIONS)}.")
    if override != "auto":
        return override
    return "bfloat16" if has_bfloat16_units(device) else "float32"


def has_bfloat16_units(device: torch.device | str) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu" and platform.machine() in ("aarch64", "arm64"):
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if kind == "cpu":  # oneDNN also accepts bfloat16 on AVX-512 processors without units, and is slower there
        return torch.cpu._is_avx512_bf16_supported()
    return kind == "xpu"
