"""A device without hardware that counts what an accelerator would do: kernels launched, and waits of the host for it.

Tensors on it are CPU tensors in a wrapper that says it is on `DEVICE`, so that code takes the paths that it takes on an
accelerator, and results are those of the CPU. `counted()` yields the counts of a `with` block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend()
DEVICE = torch.device("privateuseone", 0)

aten = torch.ops.aten
FREE = {
    aten.detach, aten.lift_fresh, aten._unsafe_view, aten._reshape_alias, aten.empty, aten.empty_like,
    aten.empty_strided, aten.new_empty, aten.new_empty_strided, torch.ops.prim.device, aten.is_same_size,
}  # fmt: skip
"""Operations, besides views, that launch nothing."""
WAITS = {aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim}
"""Operations whose result, or its shape, the host has to read."""


@dataclass
class Counts:
    """Of operations on the device: launches by name; and waits, copies between host and device among them."""

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        self.launches.clear()
        self.waits.clear()

    def see(self, operation: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        """Count one operation, if it concerns the device."""
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        there = {isinstance(x, OnDevice) for x in (*given, *made) if isinstance(x, OnDevice) or x.ndim}
        packet = operation.overloadpacket
        if True not in there or operation.is_view or packet in FREE:
            return
        name = str(packet).removeprefix("aten.")
        copies = packet in (aten._to_copy, aten.copy_)
        if copies and len({isinstance(x, OnDevice) for x in (*given, *made)}) == 2:
            self.waits["from host" if isinstance((made or given)[0], OnDevice) else "to host"] += 1
        elif packet in WAITS or (packet is aten.index and any(x.dtype == torch.bool for x in given[1:])):
            self.waits[name] += 1
        else:
            self.launches[name] += 1


class OnDevice(torch.Tensor):
    """A tensor that is said to be on `DEVICE`."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnDevice:
        wrapped = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=DEVICE,
        )  # fmt: skip
        wrapped.inner = inner
        return wrapped

    def __repr__(self) -> str:
        return f"OnDevice({self.inner})"

    def tolist(self) -> Any:
        """PyTorch refuses it for subclasses."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return _run(operation, args, kwargs or {})


def _run(operation: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the tensors inside; the result is on the device if its arguments are, or say so."""
    on_device = any(isinstance(x, OnDevice) for x in tree_leaves((args, kwargs)))
    inner_args, inner_kwargs = tree_map_only(OnDevice, lambda x: x.inner, (args, kwargs))
    if inner_kwargs.get("device") is not None:
        on_device = torch.device(inner_kwargs["device"]).type == DEVICE.type
        inner_kwargs["device"] = torch.device("cpu")
    if operation.overloadpacket in (aten.copy_, aten._to_copy) and "device" not in inner_kwargs:
        on_device = isinstance(args[0], OnDevice)
    out = operation(*inner_args, **inner_kwargs)
    if on_device:
        out = tree_map_only(torch.Tensor, OnDevice, out)
    return return_and_correct_aliasing(operation, args, kwargs, out)


class _Counting(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        out = _run(operation, args, kwargs or {})
        self.counts.see(operation, args, kwargs or {}, out)
        return out


@contextmanager
def counted() -> Iterator[Counts]:
    """What the device does within it. Tensors reach the device only here."""
    counts = Counts()
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device=...) passes through the mode
    try:
        with _Counting(counts):
            yield counts
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
