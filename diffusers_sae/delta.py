"""How a change is added to the tensor of a site: in fp32, and so that nothing changes a bit where it is 0."""

from __future__ import annotations

import torch


def moved(x: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """`x + change`, summed in fp32; where nothing changes, `x` bit for bit (adding 0 would turn -0 into +0)."""
    return torch.where(change == 0, x, (x.float() + change).to(x.dtype))


def preserve_norm(x: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """The change after which every row of `x + change` has the norm that it has in `x`; fp32, `(..., d)`.

    Where `change` is 0, so is the result.
    """
    y = x + change
    # 0 / 0 is a row that stays as it is, so that no bound on the norm is needed, which would change tiny rows
    scale = torch.nan_to_num(x.norm(dim=-1, keepdim=True) / y.norm(dim=-1, keepdim=True), nan=1.0)
    return y * scale - x


def write_moved(result: torch.Tensor, x: torch.Tensor, rows: slice, change: torch.Tensor) -> None:
    """Write `moved(x[rows], change)` to `result[rows]`; in three kernels where it can be."""
    if _may_write():
        summed = torch.add(x[rows], change, out=torch.empty_like(x[rows]))
        torch.where(change == 0, x[rows], summed, out=result[rows])
    else:
        result[rows] = moved(x[rows], change)


def neutral(change: torch.Tensor) -> torch.Tensor:
    """A change with every 0 as -0, which added to any number leaves its bits."""
    return torch.where(change == 0, -0.0, change)


def add_shift(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """`moved(x, shift)` for a `neutral` shift that broadcasts to `x`; in one kernel where it can be."""
    return torch.add(x, shift, out=torch.empty_like(x)) if _may_write() else moved(x, shift)


def _may_write() -> bool:
    """Whether operations may write into given tensors: neither gradients nor graphs of `torch.compile` are made."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())
