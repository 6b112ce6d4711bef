"""What the numbers of pictures and masks mean between 0 and 1, whatever holds them."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_sae import InputError
from diffusers_sae.unit_range import as_unit_range, rgb_image

WHITE_AND_GREY = {
    "bool": (np.array([[False, True]]), [[0.0, 1.0]]),
    "torch float8": (torch.tensor([[0.25, 1.0]]).to(torch.float8_e4m3fn), [[0.25, 1.0]]),
    "torch float8, wide": (torch.tensor([[0.25, 1.0]]).to(torch.float8_e5m2), [[0.25, 1.0]]),
    "torch bool": (torch.tensor([[False, True]]), [[0.0, 1.0]]),
    "a list of bools": ([[False, True]], [[0.0, 1.0]]),
    "uint8": (np.array([[51, 255]], np.uint8), [[0.2, 1.0]]),
    "torch uint8": (torch.tensor([[51, 255]], dtype=torch.uint8), [[0.2, 1.0]]),
    "uint16": (np.array([[13107, 65535]], np.uint16), [[0.2, 1.0]]),
    "torch uint16": (torch.tensor([[13107, 65535]], dtype=torch.uint16), [[0.2, 1.0]]),
    "uint16, the other byte first": (np.array([[13107, 65535]], ">u2"), [[0.2, 1.0]]),
    "int64 of 0 and 1": (np.array([[0, 1]]), [[0.0, 1.0]]),
    "uint32 of 0 and 1": (np.array([[0, 1]], np.uint32), [[0.0, 1.0]]),
    "uint64 of 0 and 1": (np.array([[0, 1]], np.uint64), [[0.0, 1.0]]),
    "int8 of 0 and 1": (torch.tensor([[0, 1]], dtype=torch.int8), [[0.0, 1.0]]),
    "a list of whole numbers": ([[0, 1]], [[0.0, 1.0]]),
    "float16": (np.array([[0.25, 1]], np.float16), [[0.25, 1.0]]),
    "bfloat16": (torch.tensor([[0.25, 1.0]], dtype=torch.bfloat16), [[0.25, 1.0]]),
    "float64": (np.array([[0.25, 1.0]]), [[0.25, 1.0]]),
    "a list of numbers": ([[0, 0.25, 1]], [[0.0, 0.25, 1.0]]),
    "turned round": (np.array([[255, 51]], np.uint8)[:, ::-1], [[0.2, 1.0]]),
    "a tensor that wants gradients": (torch.tensor([[0.25]], requires_grad=True), [[0.25]]),
}


@pytest.mark.parametrize("zeros_and_ones", [False, True])
@pytest.mark.parametrize("kind", WHITE_AND_GREY)
def test_numbers_of_every_type(kind, zeros_and_ones):
    values, expected = WHITE_AND_GREY[kind]
    unit = as_unit_range(values, "The image", zeros_and_ones=zeros_and_ones)
    assert unit.dtype == torch.float32 and not unit.requires_grad
    torch.testing.assert_close(unit, torch.tensor(expected), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("dtype", "largest"), [("uint8", 255), ("uint16", 65535)])
def test_zeros_and_ones_of_the_types_of_pictures(dtype, largest):
    """A comparison cast to uint8 is a mask, and a picture of the same bytes is nearly black."""
    for values in (np.array([[0, 1]], dtype), torch.tensor([[0, 1]], dtype=getattr(torch, dtype))):
        assert as_unit_range(values, "The mask", zeros_and_ones=True).tolist() == [[0, 1]]
        torch.testing.assert_close(as_unit_range(values, "The image"), torch.tensor([[0, 1 / largest]]))
    with_two = np.array([[0, 1, 2]], dtype)
    expected = torch.tensor([[0, 1 / largest, 2 / largest]])
    torch.testing.assert_close(as_unit_range(with_two, "The mask", zeros_and_ones=True), expected)


def of_mode(mode, *pixels):
    image = Image.new(mode, (len(pixels), 1))
    for x, pixel in enumerate(pixels):
        image.putpixel((x, 0), pixel)
    return image


def with_palette():
    image = of_mode("P", 0, 1, 7)
    image.putpalette([255, 255, 255, 51, 0, 0] + [0] * 15 + [0, 0, 255])
    return image


def from_array(array, dtype):
    return Image.fromarray(np.array(array, dtype))


COLOURS = [[[1.0, 1.0, 1.0], [0.2, 0.0, 0.0], [0.0, 0.0, 1.0]]]
PIXELS = (255, 255, 255), (51, 0, 0), (0, 0, 255)
IMAGES = {
    "1": (of_mode("1", 0, 1), [[0.0, 1.0]]),
    "L": (of_mode("L", 51, 255), [[0.2, 1.0]]),
    "I;16": (from_array([[13107, 65535]], np.uint16), [[0.2, 1.0]]),
    "I": (of_mode("I", 0, 1), [[0.0, 1.0]]),
    "F": (of_mode("F", 0.2, 1.0), [[0.2, 1.0]]),
    "RGB": (of_mode("RGB", *PIXELS), COLOURS),
    "RGBA": (of_mode("RGBA", *((*pixel, 255) for pixel in PIXELS)), COLOURS),
    "RGBa": (of_mode("RGB", *PIXELS).convert("RGBA").convert("RGBa"), COLOURS),
    "P": (with_palette(), COLOURS),
    "LA": (of_mode("LA", (51, 255), (255, 255)), [[[0.2] * 3, [1.0] * 3]]),
    "CMYK": (of_mode("CMYK", (0, 0, 0, 0), (204, 255, 255, 0), (255, 255, 0, 0)), COLOURS),
}


@pytest.mark.parametrize("mode", IMAGES)
def test_images_of_every_mode(mode):
    image, expected = IMAGES[mode]
    assert image.mode == mode
    torch.testing.assert_close(as_unit_range(image, "The image"), torch.tensor(expected), rtol=0, atol=1e-7)


@pytest.mark.parametrize("mode", IMAGES)
def test_images_of_every_mode_in_8_bits(mode):
    image, expected = IMAGES[mode]
    colours = np.array(expected)
    colours = np.repeat(colours[..., None], 3, -1) if colours.ndim == 2 else colours
    assert (np.array(rgb_image(image, "The image")) == (255 * colours).round()).all()


def test_8_bits_stay_as_they_are():
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for image in (Image.fromarray(every), Image.fromarray(np.stack([every, every.T, 255 - every], -1))):
        assert rgb_image(image, "The image").tobytes() == image.convert("RGB").tobytes()


def with_transparent_colour(image, colour):
    image.info["transparency"] = colour
    return image


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (np.array([[0, 2]]), "The image has numbers of type int64 other than 0 and 1"),
        (np.array([[0, 255]], np.int16), "of type int16"),
        (np.array([[-1, 1]], np.int8), "of type int8"),
        (np.array([[1, 2**63]], np.uint64), "of type uint64"),
        (torch.tensor([[0, 255]], dtype=torch.int32), "of type int32"),
        ([[0, 255]], "of type int64"),
        (of_mode("I", 0, 65535), "of type int32"),
        (of_mode("F", 0.0, 255.0), "values outside 0 to 1 (or NaN)"),
        (torch.tensor([[0.0, 1.01]]), "values outside 0 to 1 (or NaN)"),
        (torch.tensor([[-0.01]]), "values outside 0 to 1 (or NaN)"),
        (np.array([[np.nan]], np.float16), "values outside 0 to 1 (or NaN)"),
        ([[float("inf")]], "values outside 0 to 1 (or NaN)"),
        (torch.ones(1, 1, dtype=torch.complex64), "complex numbers"),
        (of_mode("RGBA", (255, 0, 0, 255), (0, 0, 0, 254)), "transparent places, which have no colour"),
        (of_mode("LA", (255, 0)), "transparent places"),
        (with_transparent_colour(of_mode("L", 3, 4), 3), "transparent places"),
        (with_transparent_colour(with_palette(), 1), "transparent places"),
        (of_mode("RGBA", (9, 9, 9, 9)).convert("RGBa"), "transparent places"),
        ("left", "The image of type str holds no numbers"),
        (None, "The image of type NoneType holds no numbers"),
        ({}, "The image of type dict holds no numbers"),
        ([[1.0], [1.0, 0.0]], "The image of type list holds no numbers in rows of one length"),
        ([[10**400]], "The image of type list holds no numbers"),
        (torch.ones(2, 2).to_sparse(), "does not hold each of its numbers; pass a dense one"),
        (torch.ones(2, 2, device="meta"), "does not hold each of its numbers"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "does not hold each of its numbers"),
        (torch.tensor([[2.0]]).to(torch.float8_e4m3fn), "values outside 0 to 1 (or NaN)"),
    ],
)
def test_what_has_no_range_is_refused(values, sentence):
    for zeros_and_ones in (False, True):
        with pytest.raises(InputError) as error:
            as_unit_range(values, "The image", zeros_and_ones=zeros_and_ones)
        text = str(error.value)
        assert sentence in text and text.endswith(".") and "\n" not in text


@pytest.mark.parametrize("values", [np.zeros((1, 2), np.float32), torch.zeros(1, 2)])
def test_what_is_written_into_the_source_later_is_not_seen(values):
    unit = as_unit_range(values, "The mask")
    values[:] = 1
    assert unit.tolist() == [[0, 0]]
