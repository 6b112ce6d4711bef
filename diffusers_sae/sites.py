"""Sites: which tensor of a pipeline, how it becomes rows `(B, P, d)`, and how rows become it again."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from .errors import InputError

KINDS = ("output", "input", "update")


@dataclass(frozen=True)
class Site:
    """A named tensor of a pipeline.

    Args:
        path: pipe-relative, such as `unet.up_blocks.1.attentions.1`.
        kind: `output`, `input`, or `update` (output minus input).
        stream: `image` or `text`, where a block returns both.
        layout: `positions`: each spatial place or token is a row.
    """

    path: str
    kind: str = "output"
    stream: str = "image"
    layout: str = "positions"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kind", self.kind, KINDS),
            ("stream", self.stream, ("image",)),
            ("layout", self.layout, tuple(LAYOUTS)),
        ):
            if value not in known:
                raise InputError(f"{value!r} is not a {name} of site; choose one of {', '.join(known)}.")

    @classmethod
    def of(cls, site: Site | str | dict[str, str]) -> Site:
        """A `Site` from itself, a path, or the dict that an SAE's config holds."""
        if isinstance(site, Site):
            return site
        return cls(site) if isinstance(site, str) else cls(**site)

    def at(self, path: str) -> Site:
        return replace(self, path=path)

    def __str__(self) -> str:
        extra = [v for v, default in ((self.kind, "output"), (self.layout, "positions")) if v != default]
        return self.path + (f" ({', '.join(extra)})" if extra else "")


class Layout(NamedTuple):
    """A pair of functions: tensor -> rows `(B, P, d)`, and (rows, the tensor they came from) -> tensor."""

    to_rows: Callable[[torch.Tensor], torch.Tensor]
    from_rows: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _positions_to_rows(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(2).transpose(1, 2) if x.ndim == 4 else x  # (B, H*W, C) or (B, N, C)


def _positions_from_rows(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return rows.transpose(1, 2).reshape(like.shape) if like.ndim == 4 else rows


LAYOUTS = {"positions": Layout(_positions_to_rows, _positions_from_rows)}


def grid_of(x: torch.Tensor, image_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a site's grid: a map's `(B, C, H, W)` own, or for tokens `(B, N, C)` the image's ratio."""
    if x.ndim == 4:
        return x.shape[2], x.shape[3]
    tokens, (height, width) = x.shape[1], image_size
    h = round((tokens * height / width) ** 0.5)
    if h == 0 or tokens % h or abs(tokens // h * height - h * width) > max(height, width):
        raise InputError(f"A site of {tokens} tokens has no {height}:{width} grid that a mask could cover; use a map.")
    return h, tokens // h


def tensor_of(output: Any) -> torch.Tensor:
    """The image stream's tensor in what a U-Net block returns: a tensor, a tuple that starts with it, or an output."""
    if isinstance(output, torch.Tensor):
        return output
    return output[0]


def with_tensor(output: Any, tensor: torch.Tensor) -> Any:
    """`output` with the image stream's tensor replaced; what was passed in is not changed."""
    if isinstance(output, torch.Tensor):
        return tensor
    if isinstance(output, tuple):
        return (tensor, *output[1:])
    return type(output)(**{key: tensor if i == 0 else value for i, (key, value) in enumerate(output.items())})


def input_of(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states that a block was called with."""
    return args[0] if args else kwargs["hidden_states"]


def resolve(pipe: Any, site: Site) -> nn.Module:
    """The module at `site.path`; raises `InputError` with the nearest real names if there is none."""
    component, _, rest = site.path.partition(".")
    root = pipe.components.get(component) if hasattr(pipe, "components") else None
    if not isinstance(root, nn.Module):
        names = [n for n, c in pipe.components.items() if isinstance(c, nn.Module)]
        raise InputError(
            f"{site.path!r} is not a site of {type(pipe).__name__}; a path starts with {' or '.join(names)}."
        )
    if component != "unet" or not rest:
        raise InputError(
            f"{site.path!r} cannot be steered: sites are blocks of a U-Net; choose one, such as 'unet.mid_block'."
        )
    modules = dict(root.named_modules())
    if rest not in modules:
        near = difflib.get_close_matches(rest, modules, n=3, cutoff=0.0)
        raise InputError(
            f"{site.path!r} does not exist in {type(root).__name__}; the nearest are "
            f"{', '.join(f'{component}.{n}' for n in near)}."
        )
    return modules[rest]


def width_of(module: nn.Module) -> int | None:
    """Channels of a block's output where the block tells them, else `None`."""
    for block in (module, *(getattr(module, "resnets", None) or [])[-1:]):
        for name in ("out_channels", "dim", "out_dim"):
            width = getattr(block, name, None)
            if isinstance(width, int):
                return width
    return None
