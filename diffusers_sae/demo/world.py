"""EmojiCanvas: what its images are made of, and how they are put into words.

A scene has an object, a style and a background. Some objects are people, who have a gender and a skin tone too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

THINGS = (
    "cat", "dog", "panda", "frog", "fox", "owl", "unicorn", "butterfly",
    "apple", "strawberry", "hamburger", "pizza", "doughnut",
    "cactus", "sunflower", "mushroom",
    "rocket", "car", "sailboat",
    "umbrella", "crown", "house", "snowman", "gift",
)  # fmt: skip
ROLES = ("cook", "farmer", "police officer", "doctor")
OBJECTS = THINGS + ROLES
STYLES = ("3d", "flat", "cartoon", "ink", "pixel art", "pencil sketch", "sepia", "neon")
BACKGROUNDS = ("white", "black", "red", "yellow", "green", "blue", "purple", "pink")
GENDERS = ("woman", "man")
SKIN_TONES = ("light", "medium", "dark")

FACTORS: dict[str, tuple[str, ...]] = {
    "object": OBJECTS,
    "style": STYLES,
    "background": BACKGROUNDS,
    "gender": GENDERS,
    "skin": SKIN_TONES,
}
"""Every factor and its values, in the order of the judge's classes."""

CONCEPT_SUFFIX = {"background": " background", "skin": " skin"}


def concept_name(factor: str, value: str) -> str:
    """What a factor's value is called as a concept: `red background`, `dark skin`, else the value itself."""
    return value + CONCEPT_SUFFIX.get(factor, "")


CONCEPTS: dict[str, str] = {concept_name(f, v): f for f, values in FACTORS.items() for v in values}
"""Every concept and the factor it is a value of."""

CONCEPT_VALUES: dict[str, str] = {concept_name(f, v): v for f, values in FACTORS.items() for v in values}
"""Every concept and the value it is."""

STYLES_WITHOUT_SKIN = frozenset({"ink", "pencil sketch", "sepia", "neon"})
"""Styles that draw every skin tone alike, so that the tone has no label."""

STYLE_PHRASES = {
    "3d": "a 3d render of",
    "flat": "a flat icon of",
    "cartoon": "a cartoon of",
    "ink": "an ink drawing of",
    "pixel art": "pixel art of",
    "pencil sketch": "a pencil sketch of",
    "sepia": "a sepia photo of",
    "neon": "a neon sign of",
}


@dataclass(frozen=True)
class Scene:
    """One image's content. A factor that is `None` is left to chance."""

    object: str | None = None
    style: str | None = None
    background: str | None = None
    gender: str | None = None
    skin: str | None = None

    @property
    def is_person(self) -> bool:
        return self.object in ROLES

    def labels(self) -> dict[str, int]:
        """Index of every factor's value among its classes; -1 where the factor is absent or cannot be seen."""
        labels = {f: FACTORS[f].index(v) if v is not None else -1 for f, v in asdict(self).items()}
        if self.style in STYLES_WITHOUT_SKIN:
            labels["skin"] = -1
        return labels

    def noun(self) -> str:
        """`a panda`, `a woman cook with dark skin`."""
        words = " ".join(w for w in (self.gender, self.object or "picture") if w)
        skin = f" with {self.skin} skin" if self.skin else ""
        return f"{'an' if words[0] in 'aeiou' and not words.startswith('uni') else 'a'} {words}{skin}"

    def concepts(self) -> tuple[str, ...]:
        """Names of the concepts that the scene shows: `panda`, `neon`, `red background`, `woman`, `dark skin`."""
        labels = self.labels()
        return tuple(concept_name(f, FACTORS[f][i]) for f, i in labels.items() if i >= 0)

    def caption(self, template: int = 0) -> str:
        """The scene in words. There are `len(TEMPLATES)` ways to say it; the first is the canonical one."""
        return TEMPLATES[template % len(TEMPLATES)](self)


def _sentence(scene: Scene) -> str:
    head = f"{STYLE_PHRASES[scene.style]} {scene.noun()}" if scene.style else scene.noun()
    return f"{head} on a {scene.background} background" if scene.background else head


def _list(scene: Scene) -> str:
    parts = [scene.noun()]
    if scene.style:
        parts.append(f"{scene.style} style")
    if scene.background:
        parts.append(f"{scene.background} background")
    return ", ".join(parts)


def _behind(scene: Scene) -> str:
    wall = f" in front of a {scene.background} wall" if scene.background else ""
    return f"{scene.noun()}{wall}" + (f", {scene.style} style" if scene.style else "")


TEMPLATES = (_sentence, _list, _behind)


def sample_scene(rng: random.Random) -> Scene:
    """A full scene. Roles come up twice as often as things, for their genders and skin tones."""
    obj = rng.choice(THINGS + 2 * ROLES)
    person = obj in ROLES
    return Scene(
        obj,
        rng.choice(STYLES),
        rng.choice(BACKGROUNDS),
        rng.choice(GENDERS) if person else None,
        rng.choice(SKIN_TONES) if person else None,
    )


def leave_out(scene: Scene, rng: random.Random, keep: float = 0.9) -> Scene:
    """`scene` with each factor kept with chance `keep`, the object nearly always."""
    return Scene(
        **{f: v if rng.random() < (0.97 if f == "object" else keep) else None for f, v in asdict(scene).items()}
    )


def sample_caption(scene: Scene, rng: random.Random, keep: float = 0.9) -> str:
    """A caption of `scene` in a random template, with factors left out at times."""
    return leave_out(scene, rng, keep).caption(rng.randrange(len(TEMPLATES)))


def grid(objects: Sequence[str] = OBJECTS, styles: Sequence[str] = STYLES) -> list[Scene]:
    """Every object in every style, without a background: the cells of an UnlearnCanvas grid."""
    return [Scene(o, s) for o in objects for s in styles]


def scene_with(factor: str, value: str, rng: random.Random) -> Scene:
    """A random full scene that shows this value."""
    while True:
        scene = sample_scene(rng)
        if factor in ("gender", "skin") and not scene.is_person:
            continue
        if factor != "object":
            scene = replace(scene, **{factor: value})
        if getattr(scene, factor) == value and scene.labels()[factor] >= 0:
            return scene


def sample_captions(count: int, seed: int) -> Iterator[str]:
    """Captions in which factors are left out at times, as in the training of the U-Net."""
    rng = random.Random(seed)
    return (sample_caption(sample_scene(rng), rng) for _ in range(count))
