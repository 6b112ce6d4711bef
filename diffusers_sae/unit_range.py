"""One rule for the range of whatever is a picture or a mask: what its numbers mean between 0 and 1."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from .errors import InputError

GREY_MODES = ("1", "L", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")
"""Modes of PIL images whose pixels are single numbers, and not indices of a palette."""
LARGEST = {torch.uint8: 255, torch.uint16: 65535}
"""Integer types that pictures are stored in, with what white is."""
PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
"""Modes that Pillow converts to no other than these."""


def as_unit_range(values: Any, what: str, *, zeros_and_ones: bool = False) -> torch.Tensor:
    """The numbers of a picture or a mask in [0, 1]: a new fp32 tensor of the same shape, on the same device.

    Booleans are 0 and 1. uint8 and uint16 are divided by their type's maximum. Other integer types have no white of
    their own, so they may hold 0 and 1 only. Floating-point numbers lie in [0, 1] already.

    Args:
        values: a tensor, an array, nested lists, or a PIL image: of a grey one, the shape is (H, W), of a coloured or
            palette one, whose colours are meant, (H, W, 3).
        what: begins the sentence if something is wrong: `"The mask"`.
        zeros_and_ones: whether uint8 and uint16 that hold 0 and 1 only mean just that, as in masks of comparisons.
            Of pictures they are nearly black.

    Raises:
        InputError: values outside of the range or NaN, a type that holds no real numbers, or a PIL image with
            transparent places, which have no colour.
    """
    tensor = _as_tensor(pixels(values, what) if isinstance(values, Image.Image) else values, what)
    if tensor.dtype == torch.bool:
        return tensor.float()
    if tensor.is_floating_point():
        if not ((tensor >= 0) & (tensor <= 1)).all():
            raise InputError(
                f"{what} has values outside 0 to 1 (or NaN); scale it to that range, or pass uint8 from 0 to 255."
            )
        return tensor.to(torch.float32, copy=True)
    whole = tensor.long()  # few operations know the unsigned types
    is_binary = bool(((whole == 0) | (whole == 1)).all())
    largest = LARGEST.get(tensor.dtype)
    if largest is None and not is_binary:
        raise InputError(
            f"{what} has numbers of type {str(tensor.dtype).removeprefix('torch.')} other than 0 and 1, "
            "of which nothing says what white is; "
            "pass uint8 from 0 to 255, uint16 from 0 to 65535, or floating-point numbers from 0 to 1."
        )
    return whole.float() / (1 if largest is None or (is_binary and zeros_and_ones) else largest)


def rgb_image(image: Image.Image, what: str) -> Image.Image:
    """A PIL image of any mode as RGB of 8 bits, by the same rule; raises `InputError`."""
    return Image.fromarray((255 * as_unit_range(image, what)).round().byte().numpy()).convert("RGB")


def pixels(image: Image.Image, what: str) -> np.ndarray:
    """`(H, W)` of a grey PIL image, and `(H, W, 3)`, the colours, of any other; raises `InputError`."""
    if is_grey(image):
        return np.array(image)
    coloured = with_alpha(image)
    if coloured.getextrema()[3][0] < 255:  # type: ignore[index]
        raise InputError(f"{what} has transparent places, which have no colour; paste it on a background first.")
    return np.array(coloured.convert("RGB"))


def is_grey(image: Image.Image) -> bool:
    """Whether a PIL image has one number for each place, and none of them stands for a transparent one."""
    return image.mode in GREY_MODES and "transparency" not in image.info


def with_alpha(image: Image.Image) -> Image.Image:
    """A PIL image as RGBA."""
    image = image.convert(PREMULTIPLIED.get(image.mode, image.mode))
    has_alpha = image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info
    return image.convert("RGBA") if has_alpha else image.convert("RGB").convert("RGBA")


def _as_tensor(values: Any, what: str) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        tensor = values.detach()
    else:
        try:
            array = np.array(values)  # a copy, since torch takes neither negative strides nor read-only memory
            tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise InputError(
                f"{what} of type {type(values).__name__} holds no numbers in rows of one length; "
                "pass a PIL image, an array or a tensor."
            ) from None
    if tensor.is_complex():
        raise InputError(f"{what} has complex numbers; pass real ones.")
    if tensor.is_meta or tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided:
        raise InputError(f"{what} is a tensor that does not hold each of its numbers; pass a dense one.")
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor  # float8 compares to none
