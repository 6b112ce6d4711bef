"""The world's scenes and the figures made of what the judge sees in them."""

import random

import pytest

from diffusers_sae.demo.measure_removal import Sighting, cells_of, outcomes
from diffusers_sae.demo.measure_steering import silent_scenes, steering_rows
from diffusers_sae.demo.world import CONCEPT_VALUES, CONCEPTS, FACTORS, STYLES, Scene, grid, scene_with


def test_every_concept_has_its_factor_and_value():
    assert len(CONCEPTS) == sum(len(values) for values in FACTORS.values())
    assert CONCEPTS["red background"] == "background" and CONCEPT_VALUES["red background"] == "red"
    assert CONCEPTS["dark skin"] == "skin" and CONCEPT_VALUES["dark skin"] == "dark"


@pytest.mark.parametrize("concept", ["panda", "cook", "ink", "pink background", "woman", "dark skin"])
def test_a_scene_with_a_concept_shows_it(concept):
    rng = random.Random(0)
    factor, value = CONCEPTS[concept], CONCEPT_VALUES[concept]
    scenes = [scene_with(factor, value, rng) for _ in range(30)]
    assert all(concept in s.concepts() and value in s.caption() for s in scenes)
    assert len(set(scenes)) > 15


@pytest.mark.parametrize("factor", list(FACTORS))
def test_silent_scenes_do_not_tell_the_factor(factor):
    scenes = silent_scenes(factor, 20)
    assert scenes == silent_scenes(factor, 20)
    assert all(getattr(s, factor) is None for s in scenes)
    if factor in ("gender", "skin"):
        assert all(s.is_person for s in scenes)


def test_cells_are_half_the_targets():
    cells = cells_of("panda", 8)
    inside = [s for _, s in cells if s.object == "panda"]
    assert sorted(s.style for s in inside) == sorted(STYLES)
    assert len(cells) == 16 and len({i for i, _ in cells}) == 16
    assert all(grid()[i] == s for i, s in cells)


def seen(**values):
    return {factor: (values.get(factor, "none"), 1.0) for factor in FACTORS}


def test_steering_rows_count_the_concept_and_the_told_factors_alone():
    scenes = [Scene("cat", None, "red"), Scene("cook", None, "blue", "woman", "dark")]
    bare = [seen(object="cat", style="flat", background="red"), seen(object="cook", background="pink", gender="woman")]
    steered = [
        seen(object="cat", style="ink", background="red", gender="man"),  # a cat's gender is nobody's business
        seen(object="cook", style="neon", background="blue", gender="woman", skin="light"),  # ink hides the skin
    ]
    rows = steering_rows("ink", scenes, bare, steered)
    assert rows.columns == {"seen": [True, False], "seen_bare": [False, False], "kept": [True, False]}
    # the second image's background was pink before


def test_an_artefact_is_what_could_be_named_before_and_was_not_to_be_removed():
    bare = {i: Sighting(i, "flat", "cat", ["background"] if i == 1 else []) for i in range(5)}
    steered = [
        Sighting(0, "ink", "cat", ["background"]),
        Sighting(1, "ink", "dog", ["background"]),  # could not be named before
        Sighting(2, "ink", "dog", ["style"]),  # is what was removed
        Sighting(3, "ink", "dog", ["object"]),
        Sighting(4, "flat", "cat", []),  # not edited
    ]
    result = outcomes(steered, bare, grid(), "style", edited={0, 1, 2, 3})
    assert [o.artefact for o in result] == [True, False, False, True, None]
    assert [(o.style, o.object) for o in result] == [(s.style, s.object) for s in grid()[:5]]
    assert [(o.seen_style, o.seen_object) for o in result[:2]] == [("ink", "cat"), ("ink", "dog")]
    assert {(o.bare_style, o.bare_object) for o in result} == {("flat", "cat")}
