"""Widths of sites where they are known before a run, and updates that cannot be, as their block changes the size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .errors import InputError
from .handover import Handover
from .sites import Place, Site

OUTPUT_WIDTHS = ("out_channels", "out_features", "dim", "out_dim", "embed_dim")
"""Attributes of modules that tell the width of what they return."""
INPUT_WIDTHS = ("in_channels", "in_features", "query_dim", "channels")
"""Attributes of modules that tell the width of the hidden states that they are given."""
KEEPERS = ("Block", "Layer", "Attention")
"""Ends of the names of classes whose `dim` or `embed_dim` is the width of what they are given as well."""


def row_width_of(place: Place, site: Site) -> int | None:
    """Width of a site's rows where it is known before a run; that of rows that are maps depends on the image's size.

    Raises:
        InputError: the site is an update that there cannot be.
    """
    check_update(place, site)
    if site.layout != "positions":
        return None
    return input_width_of(place, site.stream) if site.kind == "input" else width_of(place, site.stream)


def check_update(place: Place, site: Site) -> None:
    """Raise `InputError` if the site is the update of a block that is known to change the size of its input."""
    if site.kind == "update" and changes_size(place):
        raise InputError(
            f"{site} does not exist: {type(place.module).__name__} returns another size than it is given, so that "
            "output minus input has no meaning; choose the kind output or input."
        )


def changes_size(place: Place) -> bool:
    """Whether a block is known to return another width, or maps of another size, than it is given."""
    module, given, returned = place.module, input_width_of(place), width_of(place)
    if given is not None and returned is not None and given != returned:
        return True
    if any(getattr(module, name, None) for name in ("downsamplers", "upsamplers")):
        return True
    if type(module).__name__.startswith(("Downsample", "Upsample")):
        return True
    if any(_doubles(getattr(module, name, None)) for name in ("up", "down")):
        return True
    stride = getattr(module, "stride", 1)
    return any(type(each) is int and each > 1 for each in (stride if isinstance(stride, tuple) else (stride,)))


def _doubles(factor: Any) -> bool:
    """Whether a block's `up` or `down`, which is a truth value or a factor, changes the size of its maps."""
    return factor is True or (type(factor) is int and factor > 1)


def width_of(place: Place, stream: str = "image") -> int | None:
    """Channels of a block's output where the block, or the model for all of its blocks, tells them, else `None`."""
    module = place.module
    if stream == "text":  # an attention by itself tells it, and may give its streams different widths
        text_width = _told_by((module,), ("out_context_dim",))
        if text_width is not None:
            return text_width
    if isinstance(module, Handover):
        return module.width
    if place.is_argument:
        return getattr(place.root, "config", {}).get("encoder_hid_dim")
    last = list(getattr(module, "resnets", None) or [])[-1:]
    return _told_by((module, *last), OUTPUT_WIDTHS) or _told_by_model(place)


def input_width_of(place: Place, stream: str = "image") -> int | None:
    """Channels of the hidden states that a block is given, where they are known, else `None`."""
    module = place.module
    if isinstance(module, Handover) or place.is_argument:
        return width_of(place)
    if stream == "text":
        return _told_by((module,), ("added_kv_proj_dim",)) or _told_by_model(place)
    before = _before_up_block(place)
    if before is not None:  # its first resnet takes a skip connection, too
        return width_of(place._replace(module=before))
    first = list(getattr(module, "resnets", None) or [])[:1]
    width = _told_by((module, *first), INPUT_WIDTHS)
    if width is None and type(module).__name__.endswith(KEEPERS):
        width = _told_by((module,), ("dim", "embed_dim")) or _told_by_model(place)
    return width


def _before_up_block(place: Place) -> nn.Module | None:
    """What a U-Net's up block is given the output of, beside skip connections; `None` for other modules."""
    ups = list(getattr(place.root, "up_blocks", None) or [])
    index = next((i for i, block in enumerate(ups) if block is place.module), None)
    if index is None:
        return None
    downs = list(getattr(place.root, "down_blocks", None) or [])
    return ups[index - 1] if index else getattr(place.root, "mid_block", None) or next(iter(downs[::-1]), None)


def _told_by(modules: Iterable[nn.Module], names: tuple[str, ...]) -> int | None:
    """The first whole number that one of the modules has under one of the names."""
    values = (getattr(module, name, None) for module in modules for name in names)
    return next((value for value in values if type(value) is int), None)


def _told_by_model(place: Place) -> int | None:
    """The width of all of a transformer's blocks, if the module is one of them."""
    width = getattr(place.root, "inner_dim", None)
    return width if type(width) is int and type(place.module).__name__.endswith("Block") else None
