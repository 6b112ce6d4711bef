"""Masks of every kind, shape and range."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_sae import InputError
from diffusers_sae.masks import as_mask

HALF = np.arange(8) < 4  # (8,)
LEFT = np.tile(HALF, (6, 1))  # (6, 8)
PALETTE = Image.fromarray(LEFT.astype(np.uint8), "P")
PALETTE.putpalette([0, 0, 0, 255, 255, 255])
CUT_OUT = Image.new("RGBA", (8, 6), (255, 255, 255, 0))  # white everywhere, and transparent at the right
CUT_OUT.paste((255, 255, 255, 255), (0, 0, 4, 6))
SHADE = Image.new("LA", (8, 6), (255, 0))
SHADE.paste((255, 255), (0, 0, 4, 6))
PICTURE = Image.fromarray(np.uint8(255 * LEFT))
KEYED = PICTURE.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)

LEFTS = {
    "bool": LEFT,
    "torch bool": torch.tensor(LEFT),
    "nested lists": LEFT.tolist(),
    "uint8 of 0 and 1": LEFT.astype(np.uint8),
    "uint8 of 0 and 255": 255 * LEFT.astype(np.uint8),
    "torch uint8 of 0 and 1": torch.tensor(LEFT).byte(),
    "torch uint8 of 0 and 255": 255 * torch.tensor(LEFT).byte(),
    "uint16 of 0 and 1": LEFT.astype(np.uint16),
    "uint16 of 0 and 65535": 65535 * LEFT.astype(np.uint16),
    "torch uint16": torch.from_numpy(65535 * LEFT.astype(np.uint16)),
    "int64": LEFT.astype(np.int64),
    "float16": LEFT.astype(np.float16),
    "float64": LEFT.astype(np.float64),
    "mirrored twice": np.ascontiguousarray(LEFT[:, ::-1])[:, ::-1],
    "(images, H, W)": LEFT[None],
    "(H, W, 1)": LEFT[..., None],
    "(images, 1, H, W)": torch.tensor(LEFT)[None, None],
    "mode 1": Image.fromarray(LEFT),
    "mode L": PICTURE,
    "mode L of 0 and 1": Image.fromarray(LEFT.astype(np.uint8)),
    "mode RGB": PICTURE.convert("RGB"),
    "mode RGB of 0 and 1": Image.fromarray(LEFT.astype(np.uint8)).convert("RGB"),
    "mode RGBA, opaque": PICTURE.convert("RGBA"),
    "mode RGBA, white where it is opaque": CUT_OUT,
    "mode RGBa": CUT_OUT.convert("RGBa"),
    "mode LA": SHADE,
    "mode P": PALETTE,
    "mode P of colours": KEYED,
    "mode I;16": Image.fromarray(65535 * LEFT.astype(np.uint16)),
    "mode I": Image.fromarray(LEFT.astype(np.int32)),
    "mode F": Image.fromarray(LEFT.astype(np.float32)),
    "mode CMYK": PICTURE.convert("RGB").convert("CMYK"),
    "a list of one image": [PICTURE],
}


@pytest.mark.parametrize("kind", LEFTS)
def test_a_half_of_every_kind(kind):
    mask = as_mask(LEFTS[kind])
    assert mask.dtype == torch.float32
    assert torch.equal(mask, torch.tensor(LEFT).float()[None, None])


@pytest.mark.parametrize(
    ("mask", "value"),
    [
        (np.full((2, 2), 51, np.uint8), 0.2),
        (np.full((2, 2), 13107, np.uint16), 0.2),
        (Image.new("L", (2, 2), 51), 0.2),
        (Image.new("RGB", (2, 2), (51, 51, 51)), 0.2),
        (Image.new("RGBA", (2, 2), (255, 255, 255, 51)), 0.2),
        (Image.new("LA", (2, 2), (255, 51)), 0.2),
        (Image.new("F", (2, 2), 0.2), 0.2),
        (Image.fromarray(np.full((2, 2), 13107, np.uint16)), 0.2),
        (Image.new("RGB", (2, 2), "red"), 76 / 255),  # ITU-R 601-2, 0.299, in whole numbers
    ],
)
def test_greys_of_every_kind(mask, value):
    torch.testing.assert_close(as_mask(mask), torch.full((1, 1, 2, 2), value), rtol=0, atol=1e-6)


def test_each_mask_of_a_list_has_its_own_range():
    masks = [LEFT, 255 * LEFT.astype(np.uint8), torch.tensor(LEFT).float(), PICTURE, CUT_OUT, LEFT[None]]
    assert torch.equal(as_mask(masks), torch.tensor(LEFT).float().expand(6, 1, 6, 8))
    assert torch.equal(as_mask(np.stack([LEFT, ~LEFT])), torch.tensor(np.stack([LEFT, ~LEFT])).float()[:, None])


def test_one_number_for_each_image():
    """Which is no column of channels."""
    assert torch.equal(as_mask(np.array([0.0, 0.5, 1.0])[:, None, None]).flatten(), torch.tensor([0.0, 0.5, 1.0]))


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (np.ones(4), "The mask has shape (4,); it must be (H, W)"),
        (np.ones((0, 4)), "The mask has shape (0, 4)"),
        (np.ones((2, 3, 4, 4)), "The mask has shape (2, 3, 4, 4)"),
        (np.ones((1, 1, 0, 4)), "The mask has shape (1, 1, 0, 4)"),
        (np.array(1.0), "The mask has shape ()"),
        ([], "The mask has shape (0,)"),
        ([PICTURE, Image.new("L", (4, 4))], "The masks have 2 different sizes"),
        ([PICTURE, "left"], "The mask of type str holds no numbers"),
        (np.full((2, 2), 2), "numbers of type int64 other than 0 and 1"),
        (Image.new("I", (2, 2), 300), "numbers of type int32 other than 0 and 1"),
        (Image.new("F", (2, 2), 300.0), "values outside 0 to 1"),
        ("left", "The mask of type str holds no numbers"),
    ],
)
def test_what_is_no_mask_is_refused(mask, sentence):
    with pytest.raises(InputError) as error:
        as_mask(mask)
    text = str(error.value)
    assert sentence in text and text.endswith(".") and "\n" not in text
