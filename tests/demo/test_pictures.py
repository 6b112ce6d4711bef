"""Pictures: every image and every point is on them."""

import numpy as np
import torch
from PIL import Image

from diffusers_sae.demo.pictures import Row, draw_curves, draw_grid


def test_a_grid_shows_every_image(tmp_path):
    colours = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    images = [c[:, None, None].expand(3, 8, 8) for c in colours]
    draw_grid([Row("one", images[:2], ["a", "b"]), Row("two", images[2:], ["c"])], "title", tmp_path / "x" / "grid.png")
    pixels = np.asarray(Image.open(tmp_path / "x" / "grid.png").convert("RGB")).reshape(-1, 3)
    for c in colours:
        assert (pixels == ((c + 1) / 2 * 255).numpy()).all(1).sum() > 1000


def test_curves_are_drawn_with_the_chosen_point(tmp_path):
    def point(value, chosen):
        share = {"value": 0.5, "low": 0.4, "high": 0.6, "images": 9}
        how = {"strength": value}
        figures = dict.fromkeys(("ua", "ira", "cra", "cra_target", "artefacts"), share)
        return {"how": how, "value": value, "chosen": chosen, **figures}

    points = [point(0.0, False), point(-1.0, True)]
    sites = [point(["unet.a", "unet.b"], True), point(True, False)]
    draw_curves({"style": {"strength": points, "sites": sites}}, tmp_path / "curves.png")
    pixels = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).astype(int)
    gold = (np.abs(pixels - [255, 242, 166]).max(-1) < 12).mean()
    assert gold > 0.01
