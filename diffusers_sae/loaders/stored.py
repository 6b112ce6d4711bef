"""Tensors left in a safetensors file and read by rows; of a mapped file the kernel reads megabytes around each row."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its type, its shape, and the byte at which it begins."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    def rows(self, indices: Sequence[int]) -> torch.Tensor:
        """Some rows of a matrix, `(m, d)`; nothing else is read."""
        size = self.shape[1] * self.dtype.itemsize
        found = bytearray()
        with self.file.open("rb", buffering=0) as file:
            for i in indices:
                file.seek(self.start + i * size)
                found += file.read(size)
        return torch.frombuffer(found, dtype=self.dtype).view(len(indices), self.shape[1])


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, from its header: a length in 8 bytes, then JSON, then the data.

    Raises `ValueError`, `TypeError` or `LookupError` if the file is none or was cut off.
    """
    with file.open("rb", buffering=0) as opened:
        length = int.from_bytes(opened.read(8), "little")
        size = file.stat().st_size
        if 8 + length > size:
            raise ValueError(f"its header should have {length} bytes")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    found, end = {}, 0
    for name, told in header.items():
        start, stop = told["data_offsets"]
        end = max(end, stop)
        if told["dtype"] in DTYPES:
            one = StoredTensor(file, DTYPES[told["dtype"]], tuple(told["shape"]), 8 + length + start)
            if stop - start != math.prod(one.shape) * one.dtype.itemsize:
                raise ValueError(f"{name} of shape {one.shape} has {stop - start} bytes")
            found[name] = one
    if 8 + length + end != size:
        raise ValueError(f"it has {size} bytes and should have {8 + length + end}")
    return found
