"""Recipes: the same seed gives the same bits, and what does not fit is refused and changes nothing."""

import json
import warnings

import numpy as np
import pytest
import torch
from conftest import OTHER, SITE, Harness, file_limit, random_sae, with_saes

from diffusers_sae import (
    InputError,
    LatentStatistics,
    Rule,
    SAESteeringPipeline,
    StrengthMap,
    StrengthTable,
)


def steered():
    harness = with_saes()
    mask = np.zeros((16, 16))
    mask[:, 3:11] = 0.3
    pipe = harness.pipe
    pipe.steer({3: 5.0, 7: -0.123456789}, "hand", stop=0.6, branch="contrast")
    pipe.steer({4: StrengthTable((900.0, 100.0), (1.0, 0.1))}, "hand", mode="set", mask=mask)
    pipe.steer({5: StrengthMap((500.0,), torch.randn(1, 4, 4))}, "other", preserve_norm=True)
    pipe.steer({6: [0.1]}, "other", mode="scale", when=Rule({1: 1.0, 2: 0.3}, 0.05, "hand", at="place"))
    return harness


@pytest.fixture
def written(tmp_path):
    harness = steered()
    path = tmp_path / "plan.json"
    harness.pipe.save_recipe(path)
    return harness.run(), path


def test_a_recipe_gives_the_same_bits(written):
    images, path = written
    fresh = with_saes()
    assert not torch.equal(fresh.run(), images)
    fresh.pipe.load_recipe(path)
    assert torch.equal(fresh.run(), images)
    fresh.pipe.save_recipe(path.with_name("again.json"))
    assert path.with_name("again.json").read_text() == path.read_text()


def test_a_recipe_can_be_read(written):
    recipe = json.loads(written[1].read_text())
    assert recipe["schema_version"] == 2 and recipe["pipeline"] == "StableDiffusionPipeline"
    assert recipe["saes"]["hand"]["site"]["path"] == SITE
    assert recipe["edits"][0] == {
        "adapter_name": "hand",
        "mode": "add",
        "features": {"3": 5.0, "7": -0.123456789},
        "start": 0.0,
        "stop": 0.6,
        "branch": "contrast",
        "unit": "raw",
    }


def test_functions_cannot_be_written(sd, sae, tmp_path):
    sd.pipe.load_sae(sae)
    sd.pipe.steer({3: lambda progress: progress})
    with pytest.raises(InputError, match="is a function, which a recipe cannot hold; pass a StrengthTable."):
        sd.pipe.save_recipe(tmp_path / "plan.json")
    assert not (tmp_path / "plan.json").exists()


def edit(**changes):
    def change(recipe):
        recipe["edits"][0].update(changes)

    return change


def drop(*path):
    def change(recipe):
        for key in path[:-1]:
            recipe = recipe[key]
        del recipe[path[-1]]

    return change


def put(value, *path):
    def change(recipe):
        for key in path[:-1]:
            recipe = recipe[key]
        recipe[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (drop("schema_version"), "This is not a recipe"),
        (drop("edits"), "This is not a recipe"),
        (put(7, "schema_version"), "schema version 7 and this library reads 2 and those before"),
        (put(True, "schema_version"), "schema version True and"),
        (put([1], "schema_version"), "schema version [1] and"),
        (put([], "saes"), "saes must be an object"),
        (put({}, "edits"), "edits a list"),
        (put("0" * 64, "saes", "hand", "sha256"), "not the recipe's, since their weights differ"),
        (put({"path": OTHER}, "saes", "hand", "site"), f"at {OTHER} and it is loaded at {SITE}"),
        (drop("saes", "hand", "sha256"), "does not say the site and the sha256"),
        (put({}, "saes", "third"), "needs an SAE named 'third'"),
        (edit(adapter_name="third"), "for the SAE 'third', which its saes do not list"),
        (put("add", "edits", 0), "which its saes do not list"),
        (edit(mode="boost"), "Edit 0 of the recipe cannot be read: 'boost' is not a mode"),
        (edit(branch="left"), "'left' is not a branch"),
        (edit(unit="mean"), "needs the SAE's statistics"),
        (edit(start=0.9), "it needs 0 <= start < stop <= 1"),
        (edit(features={}), "at least one feature"),
        (edit(features={"99": 1.0}), "Feature 99 is out of range"),
        (edit(features={"x": 1.0}), "'x' is not a feature"),
        (edit(features={"3": 1.0, "03": 2.0}), "'03' is not a feature"),
        (edit(features={"３": 1.0}), "'３' is not a feature"),
        (edit(features={"3.0": 1.0}), "'3.0' is not a feature"),
        (edit(features={"true": 1.0}), "'true' is not a feature"),
        (edit(features={"3": None}), "is not a number"),
        (edit(features={"3": {"timesteps": [], "values": []}}), "as many values as timesteps"),
        (edit(features={"3": {"timesteps": [1.0], "values": [1.0, 2.0]}}), "as many values as timesteps"),
        (edit(features={"3": {"values": [1.0]}}), "Edit 0 of the recipe cannot be read: 'timesteps'"),
        (edit(mask=[[[2.0]]]), "values outside 0 to 1"),
        (edit(mask=[[1.0], [1.0, 0.0]]), "Edit 0 of the recipe cannot be read"),
        (edit(tokens=[3]), "tokens are for sites of text"),
        (
            edit(when={"adapter_name": "third", "features": {"1": 1.0}, "above": 0}),
            "the SAE 'third', which the recipe's saes do not list",
        ),
        (edit(when={"adapter_name": "hand", "features": {"77": 1.0}, "above": 0}), "Feature 77 is out of range"),
        (edit(when={"adapter_name": "hand", "features": {"1": 1.0}, "above": 0, "at": "end"}), "'end' is not where"),
        (edit(when={"adapter_name": "hand", "above": 0}), "Edit 0 of the recipe cannot be read: 'features'"),
        (edit(volume=11), "volume is unknown to this version"),
        (
            edit(when={"adapter_name": "hand", "features": {"1": 1.0}, "above": 0, "wher": "place"}),
            "wher is unknown to this version",
        ),
        (edit(features={"3": {"timesteps": [1.0], "values": [1.0], "unit": "mean"}}), "unit is unknown"),
        (edit(features=[3]), "features = [3] is no object"),
        (edit(when=[1]), "[1] is no object"),
        (drop("edits", 0, "features"), "'features' is missing"),
        (put([], "saes", "hand", "dtype"), "dtype = [] of the SAE 'hand'; it must be a name"),
        (put(-1, "base_model"), "The recipe's base_model is -1, and it must be a name"),
        (put({}, "base_model"), "The recipe's base_model is {}, and it must be a name"),
        (put(["x"], "pipeline"), "The recipe's pipeline is ['x'], and it must be a name"),
        (
            put("ReLUSAE", "saes", "hand", "architecture"),
            "architecture = 'ReLUSAE' of the SAE 'hand', and the one loaded",
        ),
        (put(3, "saes", "hand", "architecture"), "architecture = 3 of the SAE 'hand'"),
        (put(64, "saes", "hand", "n_latents"), "n_latents = 64 of the SAE 'hand', and the one loaded has 32"),
        (put("32", "saes", "hand", "n_latents"), "n_latents = '32' of the SAE 'hand'"),
        (put(1, "saes", "hand", "settings", "k"), "k = 1 of the SAE 'hand', and the one loaded has 4; load the"),
        (put("4", "saes", "hand", "settings", "k"), "k = '4' of the SAE 'hand'"),
        (put(None, "saes", "hand", "settings", "k"), "k = None of the SAE 'hand', and the one loaded has 4"),
        (put(False, "saes", "hand", "settings", "relu"), "relu = False of the SAE 'hand', and the one loaded has True"),
        (put(1, "saes", "hand", "settings", "relu"), "relu = 1 of the SAE 'hand'"),
        (put("layer_norm", "saes", "hand", "settings", "input_norm"), "input_norm = 'layer_norm' of the SAE 'hand'"),
        (put(2, "saes", "hand", "settings", "groups"), "groups = 2 of the SAE 'hand', and the one loaded has no such"),
        (put([], "saes", "hand", "settings"), "settings = [] of the SAE 'hand'; it must be an object"),
        (put("max", "saes", "hand", "statistics"), "statistics = 'max' of the SAE 'hand'; it must be an object"),
        (put(1, "saes", "hand", "enabled"), "enabled = 1 of the SAE 'hand'; it must be true or false"),
        (put({"path": SITE, "kind": []}, "saes", "hand", "site"), "kind"),
        (put(-1, "saes", "hand", "site"), "is no site"),
        (edit(mask={}), "Edit 0 of the recipe cannot be read"),
        (edit(mask="left"), "Edit 0 of the recipe cannot be read"),
        (edit(mask=[]), "it must be (H, W)"),
        (edit(mask=[[10**400]]), "Edit 0 of the recipe cannot be read"),
        (edit(mask=[[None]]), "Edit 0 of the recipe cannot be read"),
        (edit(features={"3": "12"}), "is not a number"),
        (edit(features={"3": {"timesteps": "12", "values": "34"}}), "are lists"),
        (edit(features={"3": {"timesteps": [1.0], "values": [[{}]]}}), "Edit 0 of the recipe cannot be read"),
        (edit(features={"3": {"timesteps": [1.0], "values": {"0": 1.0}}}), "are lists"),
        (edit(features=[3]), "Edit 0 of the recipe cannot be read"),
        (edit(preserve_norm="no"), "preserve_norm='no' is no choice"),
        (edit(start="a"), "Edit 0 of the recipe cannot be read"),
        (edit(mode=[]), "is not a mode"),
        (edit(unit={}), "is not a unit"),
        (edit(tokens={}), "is not a list of positions"),
        (edit(when=[]), "Edit 0 of the recipe cannot be read"),
        (edit(when={}), "Edit 0 of the recipe cannot be read"),
        (edit(when={"adapter_name": [], "features": {"1": 1.0}, "above": 0}), "Edit 0 of the recipe cannot be read"),
        (
            edit(when={"adapter_name": "hand", "features": {"1": "x"}, "above": 0}),
            "Edit 0 of the recipe cannot be read",
        ),
        (
            edit(when={"adapter_name": "hand", "features": {"1": 1.0}, "above": {}}),
            "Edit 0 of the recipe cannot be read",
        ),
        (edit(when={"adapter_name": "hand", "features": {"1": 1.0}, "above": 0, "at": []}), "is not where"),
    ],
)
def test_recipes_that_do_not_fit_change_nothing(written, change, sentence):
    recipe = json.loads(written[1].read_text())
    change(recipe)
    written[1].write_text(json.dumps(recipe))
    harness = with_saes()
    harness.pipe.steer({1: 2.0}, "hand")
    before = harness.run()
    with pytest.raises(InputError) as error:
        harness.pipe.load_recipe(written[1])
    text = str(error.value)
    assert sentence in text and "\n" not in text
    assert torch.equal(before, harness.run())


@pytest.mark.parametrize("resting", [(), ("hand",), ("other",), ("hand", "other")])
def test_edits_that_rest_go_on_resting(resting, tmp_path):
    harness = steered()
    for name in resting:
        harness.pipe.disable_sae(name)
    images = harness.run()
    harness.pipe.save_recipe(tmp_path / "plan.json")
    for before in ((), ("hand",), ("hand", "other")):
        fresh = with_saes()
        for name in before:
            fresh.pipe.disable_sae(name)
        fresh.pipe.load_recipe(tmp_path / "plan.json")
        assert torch.equal(fresh.run(), images)
        enabled = {name: sae["enabled"] for name, sae in fresh.pipe.get_list_saes().items()}
        assert enabled == {name: name not in resting for name in ("hand", "other")}


@pytest.mark.parametrize("resting", [False, True])
def test_edits_that_rest_do_not_silence_those_of_the_plan(resting, tmp_path):
    """An SAE has one switch for all of its edits."""
    harness, fresh = with_saes("hand"), with_saes("hand")
    harness.pipe.steer({3: 5.0})
    fresh.pipe.steer({4: 5.0})
    (harness if resting else fresh).pipe.disable_sae("hand")
    harness.pipe.save_recipe(tmp_path / "plan.json")
    before = fresh.run()
    call = "disable_sae" if resting else "enable_sae"
    with pytest.raises(InputError) as error:
        fresh.pipe.load_recipe(tmp_path / "plan.json")
    assert f"call {call}('hand') or reset_steering('hand') first." in str(error.value)
    assert torch.equal(fresh.run(), before) and fresh.pipe.get_list_saes()["hand"]["enabled"] == resting
    getattr(fresh.pipe, call)("hand")
    fresh.pipe.load_recipe(tmp_path / "plan.json")
    assert fresh.pipe.get_list_saes()["hand"] == {**harness.pipe.get_list_saes()["hand"], "edits": 2}


def as_version_1(path):
    """Rewrite a recipe as this library wrote it before version 2."""
    recipe = json.loads(path.read_text())
    recipe["schema_version"] = 1
    for sae in recipe["saes"].values():
        for name in ("settings", "dtype", "sha256_rounded", "statistics", "enabled"):
            sae.pop(name, None)
    path.write_text(json.dumps(recipe))


@pytest.mark.parametrize("window", [{}, {"start": 0.25}, {"stop": 0.6}, {"start": 0.25, "stop": 0.6}])
def test_recipes_of_version_1_load_and_windows_are_a_warning(window, tmp_path):
    harness = with_saes("hand")
    harness.pipe.steer({3: 5.0}, **window)
    harness.pipe.save_recipe(tmp_path / "plan.json")
    as_version_1(tmp_path / "plan.json")
    fresh = with_saes("hand")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fresh.pipe.load_recipe(tmp_path / "plan.json")
    assert torch.equal(fresh.run(), harness.run())
    shown = f"({window.get('start', 0)} to {window.get('stop', 1)}) may hold other steps"
    told = [each for each in caught if shown in str(each.message)]
    assert len(caught) == len(told) == bool(window)
    assert all(each.filename == __file__ for each in told)


@pytest.mark.parametrize("mode", ["scale", "ablate"])
def test_recipes_of_version_1_with_units_of_factors_are_refused(mode, tmp_path):
    harness = with_saes("hand")
    full = torch.ones(1, 32)
    harness.pipe._steering.loaded["hand"].sae.statistics = LatentStatistics(torch.zeros(1), full, full, full)
    harness.pipe.steer({3: 0.5}, mode=mode)
    harness.pipe.save_recipe(tmp_path / "plan.json")
    as_version_1(tmp_path / "plan.json")
    recipe = json.loads((tmp_path / "plan.json").read_text())
    recipe["edits"][0]["unit"] = "max"
    (tmp_path / "plan.json").write_text(json.dumps(recipe))
    with pytest.raises(InputError, match=f"A strength of mode='{mode}' is a factor and has no unit"):
        harness.pipe.load_recipe(tmp_path / "plan.json")


def test_recipes_of_version_1_are_checked_as_far_as_they_tell(tmp_path):
    harness = with_saes("hand")
    harness.pipe.steer({3: 5.0})
    harness.pipe.save_recipe(tmp_path / "plan.json")
    as_version_1(tmp_path / "plan.json")
    other = with_saes("hand")
    other.pipe._steering.loaded["hand"].sae.b_dec[0] += 1
    with pytest.raises(InputError, match="since their weights differ"):
        other.pipe.load_recipe(tmp_path / "plan.json")


def test_positions_of_recipes_count_once(tmp_path):
    path = "text_encoder.encoder.layers.0"
    pipes = []
    for tokens in ([1], [1, 1]):
        harness = Harness()
        torch.manual_seed(1)
        harness.pipe.load_sae(random_sae(harness.pipe.text_encoder.config.hidden_size), site=path, adapter_name="text")
        harness.pipe.steer({3: 5.0}, tokens=[1])
        harness.pipe.save_recipe(tmp_path / "plan.json")
        recipe = json.loads((tmp_path / "plan.json").read_text())
        recipe["edits"][0]["tokens"] = tokens
        (tmp_path / "plan.json").write_text(json.dumps(recipe))
        harness.pipe.reset_steering()
        harness.pipe.load_recipe(tmp_path / "plan.json")
        pipes.append(harness.run())
    assert torch.equal(*pipes)


@pytest.mark.parametrize("shape", [(4, 1), (1, 4), (2, 4, 1), (8, 8), (2, 8, 8)])
def test_masks_of_every_shape_come_back(shape, tmp_path):
    harness = with_saes("hand")
    harness.pipe.steer({3: 5.0}, mask=torch.rand(2, 1, 4, 1) if shape == (2, 4, 1) else torch.rand(shape))
    harness.pipe.save_recipe(tmp_path / "plan.json")
    fresh = with_saes("hand")
    fresh.pipe.load_recipe(tmp_path / "plan.json")
    ours, again = (each.pipe._steering.loaded["hand"].edits[0].mask for each in (harness, fresh))
    assert torch.equal(ours, again)


@pytest.mark.parametrize("text", ['{"3": 1.0, "3": 2.0}', '{"3": 1.0, "4": 0.5, "3": 1.0}'])
def test_a_name_that_comes_twice_is_refused(text, written):
    path = written[1]
    path.write_text(path.read_text().replace('{\n    "3": 5.0,\n    "7": -0.123456789\n   }', text))
    assert text in path.read_text()
    with pytest.raises(InputError, match="cannot be read as JSON .the name '3' comes twice in an object.; pass"):
        with_saes().pipe.load_recipe(path)


def test_a_recipe_of_another_class_of_pipelines_is_told(written, recwarn):
    fresh = with_saes()
    fresh.pipe.load_recipe(written[1])
    assert not [each for each in recwarn if "The recipe was made" in str(each.message)]
    recipe = json.loads(written[1].read_text())
    written[1].write_text(json.dumps({**recipe, "pipeline": "FluxPipeline"}))
    with pytest.warns(UserWarning, match="made for a FluxPipeline and this is a StableDiffusionPipeline") as told:
        with_saes().pipe.load_recipe(written[1])
    assert told[0].filename == __file__


def test_a_full_disk_leaves_the_recipe_that_was_there(written):
    before = written[1].read_text()
    with file_limit(100), pytest.raises(InputError, match=r"cannot be written \(File too large\); make room"):
        steered().pipe.save_recipe(written[1])
    assert written[1].read_text() == before and [path.name for path in written[1].parent.iterdir()] == ["plan.json"]


@pytest.mark.parametrize("content", ["", "[1, 2", "\x00\x01"])
def test_files_that_are_no_json(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(InputError, match="cannot be read as JSON"):
        with_saes().pipe.load_recipe(path)


def test_a_recipe_of_saes_that_are_not_loaded(written):
    with pytest.raises(InputError, match="needs an SAE named 'other'; load it first"):
        with_saes("hand").pipe.load_recipe(written[1])


OPTIONAL = ["mode", "start", "stop", "branch", "unit", "tokens", "preserve_norm", "when", "mask"]


@pytest.mark.parametrize("name", OPTIONAL)
def test_null_is_a_field_that_is_missing(name, tmp_path):
    harness = with_saes("hand")
    harness.pipe.steer({3: 5.0}, "hand")
    harness.pipe.save_recipe(tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    plan["edits"][0][name] = plan["base_model"] = plan["saes"]["hand"]["architecture"] = None
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    fresh = with_saes("hand")
    fresh.pipe.load_recipe(tmp_path / "plan.json")
    assert torch.equal(fresh.run(), harness.run())


NULL = {
    "a strength": (lambda plan: plan["edits"][0]["features"].update({"7": None}), "Edit 0 of the recipe cannot be"),
    "features": (lambda plan: plan["edits"][0].update(features=None), "Edit 0 of the recipe cannot be"),
    "a site": (lambda plan: plan["saes"]["hand"].update(site=None), "does not say the site and the sha256"),
    "a sum": (lambda plan: plan["saes"]["hand"].update(sha256=None), "does not say the site and the sha256"),
    "a path": (lambda plan: plan["saes"]["hand"]["site"].update(path=None), "is no site; pass a path"),
    "the edits": (lambda plan: plan.update(edits=None), "its edits a list"),
    "the saes": (lambda plan: plan.update(saes=None), "saes must be an object"),
}  # fmt: skip


@pytest.mark.parametrize("what", NULL)
def test_null_for_what_a_recipe_needs_is_refused(what, written):
    change, sentence = NULL[what]
    plan = json.loads(written[1].read_text())
    change(plan)
    written[1].write_text(json.dumps(plan))
    fresh = with_saes()
    bare = fresh.run()
    with pytest.raises(InputError, match=sentence):
        fresh.pipe.load_recipe(written[1])
    assert torch.equal(fresh.run(), bare)


def test_a_pipeline_loaded_from_a_path_makes_recipes(tmp_path):
    Harness().bare.save_pretrained(tmp_path / "model")
    pipe = SAESteeringPipeline.from_pretrained(tmp_path / "model")  # whose name is then a path
    torch.manual_seed(1)
    pipe.load_sae(random_sae(), adapter_name="hand")
    pipe.steer({3: 5.0})
    pipe.save_recipe(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["base_model"] == str(tmp_path / "model")
    pipe.load_recipe(tmp_path / "plan.json")
