"""The measuring code on a grid of four images of the embedded model: every figure follows from the rows beside it."""

from __future__ import annotations

import json

import pytest

from diffusers_sae.demo.measure_removal import SEED, TUNING_SEED
from diffusers_sae.demo.measure_steering import load_towards
from diffusers_sae.demo.quality import Quality
from diffusers_sae.demo.world import grid
from diffusers_sae.evaluation.ledger import Ledger
from diffusers_sae.evaluation.rows import Rows, pooled
from diffusers_sae.evaluation.unlearning import COLUMNS

SCENES = grid(("panda", "rocket"), ("3d", "neon"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Removal of the two objects, and what the bare model draws, from a ledger that is read again once it is full."""
    file = tmp_path_factory.mktemp("quality") / "ledger.jsonl"
    measure = Quality(Ledger(file, {}), scenes=SCENES)
    figures = {"objects": measure.objects(), "bare": measure.bare()}
    lines = file.read_text()
    again = Quality(Ledger(file, {}), scenes=SCENES)
    assert {"objects": again.objects(), "bare": again.bare()} == figures and file.read_text() == lines
    return json.loads(json.dumps(figures))


def test_figures_of_a_removal_follow_from_its_rows(measured):
    objects = measured["objects"]
    assert list(objects["targets"]) == ["panda", "rocket"]
    rows = {target: Rows.from_dict(figures["rows"]) for target, figures in objects["targets"].items()}
    assert all(list(each.images) == [0, 1, 2, 3] for each in rows.values())
    for name in COLUMNS:
        assert objects[name] == pooled(rows.values(), name).as_dict()
        for target, each in rows.items():
            assert objects["targets"][target][name] == each.share(name).as_dict()
    assert (objects["cra"]["images"], objects["cra"]["judgements"]) == (4, 8)
    assert (objects["ua"]["images"], objects["ira"]["images"]) == (4, 4)


def test_a_rule_edits_the_targets_images_alone(measured):
    rows = {target: figures["rows"] for target, figures in measured["objects"]["targets"].items()}
    assert {target: record["edited"] for target, record in rows.items()} == {"panda": "1100", "rocket": "0011"}
    for record in rows.values():  # images that no edit changed are seen as before and have no artefacts
        for i, edited in enumerate(record["edited"]):
            if edited == "0":
                assert record["ira"][i] == record["ira_bare"][i] and record["cra"][i] == record["cra_bare"][i]
            assert (record["artefacts"][i] == "-") == (edited == "0")


def test_bare_figures_are_those_of_the_same_images(measured):
    bare, objects = measured["bare"], measured["objects"]
    assert bare["object"]["value"] == objects["ira_bare"]["value"]
    assert bare["style"]["value"] == objects["cra_bare"]["value"]
    assert Rows.from_dict(bare["rows"]).share("unsure").as_dict() == bare["unsure"]


def test_settings_are_chosen_on_other_noise_than_they_are_measured_on(measured):
    objects = measured["objects"]
    assert (objects["seed"], objects["tuning_seed"]) == (SEED, TUNING_SEED)
    assert abs(SEED - TUNING_SEED) >= len(grid())


def test_steering_has_rows(tmp_path):
    measure = Quality(Ledger(tmp_path / "ledger.jsonl", {}))
    measure._towards = {"ink": load_towards()["ink"]}
    (figures,) = measure.steering(images=2).values()
    rows = Rows.from_dict(figures["rows"])
    assert list(rows.images) == [0, 1] and abs(figures["seed"] - figures["tuning_seed"]) >= 1000
    assert all(figures[name] == rows.share(name).as_dict() for name in ("seen", "seen_bare", "kept"))
