"""Masks: where in an image an edit acts, and how strongly there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from .errors import InputError
from .unit_range import as_unit_range, is_grey, with_alpha

WHAT = "The mask"
SHAPES = "it must be (H, W), (images, H, W), (H, W, 1) or (images, 1, H, W)"


def as_mask(mask: Any) -> torch.Tensor:
    """`(1 or images, 1, H, W)` in [0, 1], on the CPU, from what `steer(mask=...)` was given.

    Args:
        mask: a PIL image, whose brightness counts, 0 at transparent places; an array, a tensor or nested lists,
            `(H, W)`, `(images, H, W)`, `(H, W, 1)` or `(images, 1, H, W)`; or a list of any of those, each with
            the same height and width. `as_unit_range` says what its numbers mean; uint8 and uint16 that hold
            nothing but 0 and 1 mean just that.

    Raises:
        InputError: another shape or type, or values outside of the range.
    """
    if _is_list_of_masks(mask):
        masks = [as_mask(each) for each in mask]
        sizes = {tuple(each.shape[-2:]) for each in masks}
        if len(sizes) > 1:
            raise InputError(f"The masks have {len(sizes)} different sizes; pass all of one size.")
        return torch.cat(masks)
    values = as_unit_range(_brightness(mask) if isinstance(mask, Image.Image) else mask, WHAT, zeros_and_ones=True)
    shape = tuple(values.shape)
    channels_last = len(shape) == 3 and shape[-1] == 1 and shape[-2] > 1  # no image is so narrow
    if channels_last:
        values = values[None, :, :, 0]
    elif len(shape) == 4 and shape[1] == 1:
        values = values[:, 0]
    if values.ndim not in (2, 3) or 0 in shape:
        raise InputError(f"{WHAT} has shape {shape}; {SHAPES}.")
    return values.reshape(-1, 1, *values.shape[-2:]).cpu()


def _is_list_of_masks(mask: Any) -> bool:
    """Whether it is a list of images, arrays or tensors with rows, and not itself the rows of one."""
    if not isinstance(mask, (list, tuple)) or not mask:
        return False
    return any(isinstance(each, Image.Image) or getattr(each, "ndim", 0) > 1 for each in mask)


def _brightness(image: Image.Image) -> np.ndarray:
    """`(H, W)`: how bright a PIL image is over black, so that transparent places are 0."""
    if is_grey(image):
        return np.array(image)
    over_black = Image.alpha_composite(Image.new("RGBA", image.size, "black"), with_alpha(image))
    return np.array(over_black.convert("L"))
