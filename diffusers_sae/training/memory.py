"""How a process that does nothing but train keeps its memory."""

from __future__ import annotations

import ctypes
import platform
from functools import lru_cache

LARGEST_KEPT = 2**28
"""Bytes."""


@lru_cache
def keep_freed_memory() -> None:
    """Tell glibc not to return large blocks to the system: touching them anew in each step costs about 10 %.

    This holds for the whole process, whose memory then stays at its peak, so a command or script calls it, and the
    library never does. Blocks above `LARGEST_KEPT` are returned all the same: the holes that they leave are soon too
    small for the next one, and a wide SAE would take a third more.
    """
    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(m_mmap_threshold, LARGEST_KEPT)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
