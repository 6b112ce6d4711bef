"""EmojiCanvas: scenes composed from sprites, with exact labels. `python canvas.py` draws a contact sheet.

Four styles are drawn by artists; four are made from those drawings by the recipes below. A scene is a sprite at a
random place and size, flipped or not, on a plain colour.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from diffusers_sae.demo.world import BACKGROUNDS, OBJECTS, ROLES, STYLES, Scene

SIZE = 64
PIXEL = 3  # side of one square of pixel art
COLOURS = {
    "white": (246, 246, 246),
    "black": (22, 22, 26),
    "red": (212, 48, 48),
    "yellow": (250, 212, 72),
    "green": (64, 168, 88),
    "blue": (64, 128, 224),
    "purple": (132, 76, 188),
    "pink": (248, 168, 204),
}
MARGIN = 8  # transparent border that filters may spread into


def _luminance(rgb: np.ndarray) -> np.ndarray:
    return rgb @ np.array([0.299, 0.587, 0.114])


def _blur(mask: np.ndarray, radius: float) -> np.ndarray:
    image = Image.fromarray(mask.clip(0, 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius)), dtype=float)


def _rgba(rgb: np.ndarray, alpha: np.ndarray) -> Image.Image:
    return Image.fromarray(np.dstack([rgb.clip(0, 255), alpha.clip(0, 255)]).astype(np.uint8), "RGBA")


def _on_paper(sprite: Image.Image, paper: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(H, W) luminance of the sprite over `paper`, and its alpha."""
    rgba = np.asarray(sprite, dtype=float)
    alpha = rgba[..., 3:] / 255
    return _luminance(rgba[..., :3] * alpha + np.array(paper) * (1 - alpha)), rgba[..., 3]


def pencil_sketch(sprite: Image.Image) -> Image.Image:
    """Colour dodge: grey over its blurred inverse leaves the contours; some of the tone is kept as shading."""
    grey, alpha = _on_paper(sprite, (255, 255, 255))
    contours = 255 * (grey + 1) / (_blur(grey, 3.0) + 1)
    silhouette = np.abs(alpha - _blur(alpha, 1.2)) * 1.6
    tone = 0.78 * np.minimum(contours, 255) + 0.22 * grey - silhouette
    return _rgba(tone[..., None] * np.array([1.0, 0.99, 0.96]), np.maximum(alpha, _blur(alpha, 1.0)))


def sepia(sprite: Image.Image) -> Image.Image:
    """Grey, stretched to full contrast and mapped to the ramp from dark brown to cream."""
    rgba = np.asarray(sprite, dtype=float)
    grey = _luminance(rgba[..., :3])
    low, high = np.percentile(grey[rgba[..., 3] > 128], (2, 98))
    t = ((grey - low) / max(high - low, 60)).clip(0, 1)[..., None]
    return _rgba((1 - t) * np.array([52, 30, 14]) + t * np.array([248, 224, 178]), rgba[..., 3])


def neon(lines: Image.Image, body: Image.Image) -> Image.Image:
    """Glowing tubes, magenta above and cyan below, on a dark board of the object's shape."""
    line = np.asarray(lines, dtype=float)[..., 3]
    alpha = np.maximum(np.asarray(body, dtype=float)[..., 3], line)
    board = _blur(np.minimum(255, 3 * _blur(alpha, 2.0)), 0.8)
    ramp = np.linspace(0, 1, line.shape[0])[:, None, None]
    tube = (1 - ramp) * np.array([255, 48, 200]) + ramp * np.array([40, 240, 255])
    glow = (0.55 * _blur(line, 3.0) / 255)[..., None]
    core = (line / 255)[..., None]
    rgb = np.array([16, 12, 36]) * (1 - glow) + tube * glow
    rgb = rgb * (1 - core) + (0.85 * tube + 0.15 * 255) * core
    return _rgba(rgb, board)


def pixelate(sprite: Image.Image, squares: int) -> Image.Image:
    """`squares` x `squares` cells of few colours with hard edges and a dark contour."""
    small = sprite.resize((squares, squares), Image.Resampling.BOX)
    rgba = np.asarray(small, dtype=float)
    solid = rgba[..., 3] > 90
    rgb = np.round(rgba[..., :3] / 42) * 42
    padded = np.pad(solid, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    rgb[solid & ~inner] *= 0.4
    image = _rgba(rgb, solid * 255.0)
    return image.resize((squares * PIXEL, squares * PIXEL), Image.Resampling.NEAREST)


def _shadow(sprite: Image.Image) -> Image.Image:
    """Alpha of the soft shadow that a 3D object casts."""
    return sprite.getchannel("A").filter(ImageFilter.GaussianBlur(1.8)).point(lambda a: int(a * 0.5))


class Canvas:
    """Renders `Scene`s at 64 x 64 from the sprites that `sprites.py` wrote."""

    def __init__(self, sprites: Path) -> None:
        stored = np.load(sprites)
        drawn = {key: ImageOps.expand(Image.fromarray(stored[key], "RGBA"), MARGIN, (0, 0, 0, 0)) for key in stored}
        self._sprites = drawn
        for subject in [k.split(":")[1] for k in drawn if k.startswith("flat:")]:
            drawn[f"pixel art:{subject}"] = drawn[f"flat:{subject}"]
            drawn[f"pencil sketch:{subject}"] = pencil_sketch(drawn[f"cartoon:{subject}"])
            drawn[f"sepia:{subject}"] = sepia(drawn[f"3d:{subject}"])
            drawn[f"neon:{subject}"] = neon(drawn[f"ink:{subject}"], drawn[f"flat:{subject}"])

    @classmethod
    def fetched(cls, world: Path) -> Canvas:
        """With `sprites.npz` of a folder; unless it is there, it is made of drawings from the npm registry."""
        stored = world / "sprites.npz"
        if not stored.exists():
            from sprites import build

            world.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(stored, **build(world / "npm"))
        return cls(stored)

    def sprite(self, scene: Scene) -> Image.Image:
        subject = f"{scene.object}/{scene.gender}/{scene.skin}" if scene.is_person else scene.object
        return self._sprites[f"{scene.style}:{subject}"]

    def render(self, scene: Scene, rng: random.Random) -> Image.Image:
        """One image of a full scene; place, size and flip come from `rng`."""
        background = COLOURS[scene.background]
        image = Image.new("RGB", (SIZE, SIZE), background)
        sprite = self.sprite(scene)
        if rng.random() < 0.5:
            sprite = ImageOps.mirror(sprite)
        if scene.style == "pixel art":
            squares = rng.choice((19, 20, 21))
            sprite, step = pixelate(sprite, squares), PIXEL
        else:
            side = rng.randint(56, 66)
            sprite, step = sprite.resize((side, side), Image.Resampling.BILINEAR), 1
        if scene.style == "ink" and scene.background == "black":
            sprite = _rgba(np.full((*sprite.size[::-1], 3), 240.0), np.asarray(sprite, dtype=float)[..., 3])
        x, y = ((SIZE - sprite.width) // 2 + step * rng.randint(-(4 // step), 4 // step) for _ in "xy")
        if scene.style == "3d":
            image.paste(Image.new("RGB", sprite.size, (16, 12, 24)), (x + 3, y + 3), _shadow(sprite))
        image.paste(self._contour(sprite, background, scene.style), (x, y), self._halo(sprite, scene.style))
        image.paste(sprite, (x, y), sprite)
        return image

    @staticmethod
    def _halo(sprite: Image.Image, style: str) -> Image.Image:
        """Alpha of a thin contour around the sprite, so that a white snowman shows on white."""
        if style in ("ink", "pixel art"):
            return Image.new("L", sprite.size, 0)
        return sprite.getchannel("A").filter(ImageFilter.GaussianBlur(1.0)).point(lambda a: min(a, 150))

    @staticmethod
    def _contour(sprite: Image.Image, background: tuple[int, int, int], style: str) -> Image.Image:
        dark = _luminance(np.array(background, dtype=float)) > 70
        return Image.new("RGB", sprite.size, (40, 36, 48) if dark else (225, 225, 232))


def contact_sheet(
    render: Callable[[Scene, random.Random], Image.Image], objects: tuple[str, ...] = OBJECTS, scale: int = 1
) -> Image.Image:
    """Objects down, styles across, backgrounds in turn."""
    rng = random.Random(0)
    head, side = 14, 90
    sheet = Image.new("RGB", (side + 66 * scale * len(STYLES), head + 66 * scale * len(objects)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, obj in enumerate(objects):
        draw.text((2, head + 66 * scale * row + 24), obj, fill="black")
        for col, style in enumerate(STYLES):
            draw.text((side + 66 * scale * col, 1), style, fill="black")
            person = obj in ROLES
            scene = Scene(
                obj,
                style,
                BACKGROUNDS[(row + col) % len(BACKGROUNDS)],
                ("woman", "man")[col % 2] if person else None,
                ("light", "medium", "dark")[col % 3] if person else None,
            )
            tile = render(scene, rng).resize((64 * scale, 64 * scale), Image.Resampling.NEAREST)
            sheet.paste(tile, (side + 66 * scale * col, head + 66 * scale * row))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", type=Path, default=Path("outputs/emoji_world"), help="folder with sprites.npz")
    parser.add_argument("--smoke", action="store_true", help="changes nothing: this takes seconds at full size")
    args = parser.parse_args()
    canvas = Canvas(args.world / "sprites.npz")
    path = args.world / "contact_sheet.png"
    contact_sheet(canvas.render).save(path)
    print(path)


if __name__ == "__main__":
    main()
