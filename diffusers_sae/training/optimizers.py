"""Optimisers of the trainer by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim.adam import adam

BLOCK = 512
"""Rows that a processor updates at a time: with their gradients and moments, about as many as its cache holds."""

Visit = Callable[[nn.Parameter, slice], None]
"""Function of a parameter and of which of its rows are updated."""


class BlockwiseAdam(torch.optim.Adam):
    """Adam that updates a block of rows at a time, so that `before` and `after` find them in the processor's cache."""

    @staticmethod
    def moments(parameter: nn.Parameter) -> dict[str, torch.Size]:
        """The shapes of what is kept of a parameter, besides the count of its steps."""
        return {"exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}

    @torch.no_grad()
    def update(self, before: Visit, after: Visit) -> None:
        """Make one step. `before` is called on each block ahead of its update, and may change its gradient; `after` is
        called on the block once it is updated."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self._state_of(parameter)
                for rows in _blocks(parameter):
                    before(parameter, rows)
                    self._update_rows(parameter, rows, state, group)
                    after(parameter, rows)
                state["step"] += 1

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state

    def _update_rows(self, parameter: nn.Parameter, rows: slice, state: dict[str, Any], group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        adam(
            [parameter[rows]],
            [parameter.grad[rows]],
            [state["exp_avg"][rows]],
            [state["exp_avg_sq"][rows]],
            [],
            [state["step"].clone()],  # which `adam` counts up for each block
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


class Adafactor(torch.optim.Adafactor):
    """torch's, with the face of `BlockwiseAdam`; its factored moments need whole parameters."""

    @staticmethod
    def moments(parameter: nn.Parameter) -> dict[str, torch.Size]:
        """The shapes of what is kept of a parameter, besides the count of its steps."""
        shape = parameter.shape
        if len(shape) < 2:
            return {"variance": shape}
        return {"row_var": torch.Size((*shape[:-1], 1)), "col_var": torch.Size((*shape[:-2], 1, shape[-1]))}

    @torch.no_grad()
    def update(self, before: Visit, after: Visit) -> None:
        """Make one step, between `before` and `after` on each whole parameter."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter in parameters:
            before(parameter, slice(None))
        self.step()
        for parameter in parameters:
            after(parameter, slice(None))


def _blocks(parameter: nn.Parameter) -> Iterator[slice]:
    """Blocks of rows; of what lies on a GPU, where each would be further launches, all at once."""
    size = BLOCK if parameter.device.type == "cpu" and parameter.ndim > 1 else len(parameter)
    return (slice(start, start + size) for start in range(0, len(parameter), size))


def _adam(parameters: Iterable[nn.Parameter], lr: float) -> BlockwiseAdam:
    return BlockwiseAdam(parameters, lr=lr, betas=(0.9, 0.999), fused=True)


def _adafactor(parameters: Iterable[nn.Parameter], lr: float) -> Adafactor:
    """Shazeer and Stern (2018, 1804.04235), without first moment: a matrix `(n, d)` has n + d numbers of state.

    The second of `eps` makes the rate absolute, as Adam's, where torch makes it relative to the mean square of a
    parameter; the first lies below the square of the gradients of an SAE's many numbers, which torch's own exceeds.
    Each parameter is a group of its own, after which the memory of its update is freed.
    """
    groups = [{"params": [parameter]} for parameter in parameters]
    return Adafactor(groups, lr=lr, eps=(1e-16, 1.0), foreach=False)


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter], float], BlockwiseAdam | Adafactor]] = {
    "adam": _adam,
    "adafactor": _adafactor,
}
