"""The hardware that figures were measured on."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from diffusers_sae.training.precision import resolve_precision


def hardware() -> dict[str, Any]:
    """Name, cores, instruction set, bfloat16 units, precision and versions, as results files state them."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_units": torch.cpu._is_avx512_bf16_supported(),
        "precision": resolve_precision(),
        "torch": torch.__version__,
    }


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return match.group(1).strip() if match else "unknown"


def results_file(benchmark: str) -> str:
    """Name of a benchmark's results file of this processor, such as `training_speed_amd_epyc_avx512_bf16.json`."""
    units = "_bf16" if torch.cpu._is_avx512_bf16_supported() else ""
    name = f"{benchmark} {processor()} {torch.backends.cpu.get_cpu_capability()}{units}"
    return re.sub(r"[^a-z0-9]+", "_", name.lower()) + ".json"
