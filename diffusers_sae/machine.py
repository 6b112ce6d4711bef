"""What the machine is good at, and how its memory is kept."""

from __future__ import annotations

import ctypes
import platform
import time
from functools import lru_cache

import torch

LARGEST_KEPT = 2**28
"""Bytes."""


@lru_cache
def half_precision_is_faster(device: str) -> bool:
    """Whether a product of bfloat16 matrices takes less than half as long as one of float32; measured once."""
    if device != "cpu":
        return True

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(512, 512, dtype=dtype)
        a @ a
        start = time.perf_counter()
        a @ a
        return time.perf_counter() - start

    return 2 * seconds(torch.bfloat16) < seconds(torch.float32)


@lru_cache
def keep_freed_memory() -> None:
    """Tell glibc not to give large blocks back to the system: touching them anew each step costs about 10 %.

    It holds for the whole process, whose memory then stays at its peak. Blocks above `LARGEST_KEPT` go back all the
    same, since the holes that they leave are soon too small for the next, and a wide SAE would take a third more.
    """
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_threshold, LARGEST_KEPT)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
