"""Drawings from npm packages, rasterised to sprites: `python sprites.py --out outputs/emoji_world`.

Writes `sprites.npz` (96 x 96 RGBA, one array per drawing). The npm client fetches the packages as tarballs, from the
registry that it is set up for. They are checked against the SHA-512 below and read without being unpacked; nothing of
them is executed.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image
from tqdm import tqdm

from diffusers_sae.demo.world import GENDERS, ROLES, SKIN_TONES, THINGS

SIZE = 96


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    licence: str
    authors: str
    sha512: str
    """In base64, as registries and lock files state it."""


PACKAGES = {
    "3d": Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "MIT",
        "Fluent Emoji, Microsoft; packed by LobeHub",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
    ),
    "flat": Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "MIT",
        "Fluent Emoji, Microsoft; packed by Iconify",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    ),
    "ink": Package(
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "MIT",
        "Fluent Emoji, Microsoft; packed by Iconify",
        "esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==",
    ),
    "cartoon": Package(
        "@iconify-json/noto",
        "1.2.9",
        "Apache-2.0",
        "Noto Emoji, Google; packed by Iconify",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    ),
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
    """The package's tarball, from `cache` or else from npm.

    Raises:
        SystemExit: without an npm client, if it finds no such package, or if the SHA-512 of what it fetched differs.
    """
    path = cache / f"{package.name.replace('/', '+')}-{package.version}.tgz"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            pack(package, Path(folder)).rename(path)
    data = path.read_bytes()
    if base64.b64encode(hashlib.sha512(data).digest()).decode() != package.sha512:
        path.unlink()
        raise SystemExit(f"{package.name} {package.version} is not what it was; its SHA-512 differs. Run this again.")
    return data


def pack(package: Package, folder: Path) -> Path:
    """The package's tarball as the npm client writes it into an empty folder; scripts of the package don't run."""
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit("The drawings come from npm packages; install Node.js, which has the client npm.")
    command = [npm, "pack", "--loglevel=error", "--ignore-scripts", f"{package.name}@{package.version}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"npm did not fetch {package.name} {package.version}: {done.stderr.strip() or done.stdout}")
    (tarball,) = folder.glob("*.tgz")
    return tarball


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
    parser.add_argument("--smoke", action="store_true", help="changes nothing: this takes seconds at full size")
    args = parser.parse_args()
    sprites = build(args.out / "npm")
    np.savez_compressed(args.out / "sprites.npz", **sprites)
    print(f"{len(sprites)} sprites in {args.out / 'sprites.npz'}")


if __name__ == "__main__":
    main()
