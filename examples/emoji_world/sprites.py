"""Drawings from the npm registry, rasterised to sprites: `python sprites.py --out outputs/emoji_world`.

Writes `sprites.npz` (96 x 96 RGBA, one array a drawing). Packages are fetched as tarballs,
checked against the registry's own SHA-512, and read without unpacking. Nothing of them is executed.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import tarfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image
from tqdm import tqdm

from diffusers_sae.demo.world import GENDERS, ROLES, SKIN_TONES, THINGS

SIZE = 96
REGISTRY = "https://registry.npmjs.org"


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    licence: str
    authors: str

    @property
    def url(self) -> str:
        return f"{REGISTRY}/{self.name}/-/{self.name.split('/')[-1]}-{self.version}.tgz"


PACKAGES = {
    "3d": Package("@lobehub/fluent-emoji-3d", "1.1.0", "MIT", "Fluent Emoji, Microsoft; packed by LobeHub"),
    "flat": Package("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "Fluent Emoji, Microsoft; packed by Iconify"),
    "ink": Package(
        "@iconify-json/fluent-emoji-high-contrast", "1.2.6", "MIT", "Fluent Emoji, Microsoft; packed by Iconify"
    ),
    "cartoon": Package("@iconify-json/noto", "1.2.9", "Apache-2.0", "Noto Emoji, Google; packed by Iconify"),
}

# object -> (icon name in the Iconify sets, code point of the 3D bitmap)
THING_ICONS = {
    "cat": ("cat-face", "1f431"),
    "dog": ("dog-face", "1f436"),
    "panda": ("panda", "1f43c"),
    "frog": ("frog", "1f438"),
    "fox": ("fox", "1f98a"),
    "owl": ("owl", "1f989"),
    "unicorn": ("unicorn", "1f984"),
    "butterfly": ("butterfly", "1f98b"),
    "apple": ("red-apple", "1f34e"),
    "strawberry": ("strawberry", "1f353"),
    "hamburger": ("hamburger", "1f354"),
    "pizza": ("pizza", "1f355"),
    "doughnut": ("doughnut", "1f369"),
    "cactus": ("cactus", "1f335"),
    "sunflower": ("sunflower", "1f33b"),
    "mushroom": ("mushroom", "1f344"),
    "rocket": ("rocket", "1f680"),
    "car": ("automobile", "1f697"),
    "sailboat": ("sailboat", "26f5"),
    "umbrella": ("umbrella", "2602-fe0f"),
    "crown": ("crown", "1f451"),
    "house": ("house", "1f3e0"),
    "snowman": ("snowman-without-snow", "26c4"),
    "gift": ("wrapped-gift", "1f381"),
}
ROLE_ICONS = {
    "cook": ("cook", "1f373"),
    "farmer": ("farmer", "1f33e"),
    "police officer": ("police-officer", "1f46e"),
    "doctor": ("health-worker", "2695-fe0f"),
}
GENDER_CODES = {"woman": ("1f469", "2640-fe0f"), "man": ("1f468", "2642-fe0f")}
TONE_CODES = {"light": "1f3fb", "medium": "1f3fd", "dark": "1f3ff"}


def person_code(role: str, gender: str, tone: str) -> str:
    """Code points of a person: `1f469-1f3fb-200d-1f373`; police officers are gendered at the end instead."""
    person, sign = GENDER_CODES[gender]
    code = ROLE_ICONS[role][1]
    if role == "police officer":
        return f"{code}-{TONE_CODES[tone]}-200d-{sign}"
    return f"{person}-{TONE_CODES[tone]}-200d-{code}"


def sprite_keys() -> dict[str, tuple[str, str | None, str | None]]:
    """Key of every subject: `panda`, `cook/woman/dark` -> (object, gender, skin)."""
    keys: dict[str, tuple[str, str | None, str | None]] = {t: (t, None, None) for t in THINGS}
    keys |= {f"{r}/{g}/{s}": (r, g, s) for r in ROLES for g in GENDERS for s in SKIN_TONES}
    return keys


def fetch(package: Package, cache: Path) -> bytes:
    """The package's tarball, from `cache` or the registry; raises `ValueError` if its SHA-512 is not the registry's."""
    path = cache / f"{package.name.replace('/', '+')}-{package.version}.tgz"
    if not path.exists():
        with urllib.request.urlopen(f"{REGISTRY}/{package.name}/{package.version}") as reply:
            integrity = json.load(reply)["dist"]["integrity"]
        with urllib.request.urlopen(package.url) as reply:
            data = reply.read()
        if integrity != "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode():
            raise ValueError(f"{package.url} does not have the registry's checksum; fetch it again.")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        partial.write_bytes(data)
        partial.rename(path)
    return path.read_bytes()


def read_members(tarball: bytes, names: set[str]) -> dict[str, bytes]:
    """The files `names` (paths inside the package) of an npm tarball."""
    with tarfile.open(fileobj=io.BytesIO(tarball)) as tar:
        wanted = {f"package/{n}": n for n in names}
        return {wanted[m.name]: tar.extractfile(m).read() for m in tar if m.name in wanted}


def rasterise(icons: dict, name: str) -> Image.Image:
    icon = icons["icons"][name] if name in icons["icons"] else icons["icons"][icons["aliases"][name]["parent"]]
    w, h = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {w} {h}" color="#000">{icon["body"]}</svg>'
    )
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE))))


def icon_name(artist: str, obj: str, gender: str | None, skin: str | None) -> str:
    if gender is None:
        return THING_ICONS[obj][0]
    base = f"{gender}-{ROLE_ICONS[obj][0]}"
    return {"ink": base, "cartoon": f"{base}-{skin}-skin-tone"}.get(artist, f"{base}-{skin}")


def build(cache: Path) -> dict[str, np.ndarray]:
    """`{artist:key}` -> (96, 96, 4) uint8."""
    sprites = {}
    subjects = sprite_keys()
    for artist, package in PACKAGES.items():
        tarball = fetch(package, cache)
        if artist == "3d":
            paths = {
                k: f"assets/{THING_ICONS[o][1] if g is None else person_code(o, g, s)}.webp"
                for k, (o, g, s) in subjects.items()
            }
            files = read_members(tarball, set(paths.values()))
            images = {k: Image.open(io.BytesIO(files[p])) for k, p in paths.items()}
        else:
            icons = json.loads(read_members(tarball, {"icons.json"})["icons.json"])
            images = {k: rasterise(icons, icon_name(artist, *subject)) for k, subject in subjects.items()}
        for key, image in tqdm(images.items(), desc=artist):
            image = image.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            sprites[f"{artist}:{key}"] = np.asarray(image)
    return sprites


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/emoji_world"))
    args = parser.parse_args()
    sprites = build(args.out / "npm")
    np.savez_compressed(args.out / "sprites.npz", **sprites)
    print(f"{len(sprites)} sprites in {args.out / 'sprites.npz'}")


if __name__ == "__main__":
    main()
