"""Pictures that a command is given, read from files."""

import numpy as np
import pytest
from PIL import Image

from diffusers_sae import InputError
from diffusers_sae.cli.sources import Pictures

LEVELS = np.arange(48, dtype=np.uint16).reshape(4, 4, 3)
COLOURS = Image.fromarray((5 * LEVELS).astype(np.uint8))


def opened(folder, image, name="a.png"):
    image.save(folder / name)
    [picture] = Pictures(folder)[:1]
    assert picture.mode == "RGB"
    return np.array(picture)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1"])
def test_pictures_of_every_mode_are_read_as_rgb(tmp_path, mode):
    image = COLOURS.convert(mode)
    assert np.array_equal(opened(tmp_path, image), np.array(image.convert("RGB")))


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    grey = (5 * LEVELS[..., 0]).astype(np.uint16)
    assert np.array_equal(opened(tmp_path, Image.fromarray(257 * grey)), np.repeat(grey[..., None], 3, -1))


def test_pictures_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(InputError, match="a.png has transparent places"):
        opened(tmp_path, Image.new("RGBA", (4, 4)))
    COLOURS.save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="a.png is no picture that can be read"):
        Pictures(tmp_path).check(1)
    with pytest.raises(InputError, match="holds no pictures"):
        Pictures(tmp_path / "none")
