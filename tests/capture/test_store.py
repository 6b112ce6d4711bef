"""Stores of activations: what they hold, going on after a stop at any moment, and what is refused."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SITE, Harness, Stop, file_limit
from safetensors.torch import save_file
from tiny import tiny_unet

from diffusers_sae import InputError, Site
from diffusers_sae.capture import ActivationStore, StoreConfig, store_activations, store_writer
from diffusers_sae.checksums import sha256
from diffusers_sae.disk import hold_folder

CALL = {"num_inference_steps": 3, "guidance_scale": 5.0, "height": 16, "width": 16}
PROMPTS = ["ab", "cd", "ef", "gh", "ij"]
SITES = (SITE, "unet.mid_block")
CONFIG = StoreConfig(images=5, batch_size=2, branches=("cond", "uncond"), dtype="float32", seed=7)


def stored(folder, config=CONFIG, pipe=None, prompts=PROMPTS, sites=SITES, **call):
    return store_activations(pipe or Harness().pipe, sites, prompts, folder, config, **{**CALL, **call})


def whole(one):
    """All rows and labels of a store."""
    shards = [one.shard(i) for i in range(len(one.shard_rows))]
    return {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    stored(folder)
    return folder


def test_rows_are_what_the_pipeline_held_and_know_where_from(finished, sd):
    assert [p.name for p in sorted(finished.iterdir())] == sorted(SITES)
    for path in SITES:
        found = whole(ActivationStore(finished / path))
        for image, prompt in enumerate(PROMPTS):
            with sd.pipe.capture([path]) as direct:
                sd.run(prompt=prompt, generator=torch.Generator().manual_seed(7 + image), num_inference_steps=3)
            for t in set(direct[path].timestep.tolist()):
                for b, branch in enumerate(CONFIG.branches):
                    here = (found["image"] == image) & (found["timestep"] == t) & (found["branch"] == b)
                    rows = direct[path].rows(branch, t)[0]
                    assert found["place"][here].tolist() == list(range(len(rows)))
                    torch.testing.assert_close(found["rows"][here], rows, atol=1e-5, rtol=1e-4)
    one = ActivationStore(finished / SITE)
    assert len(one) == 5 * 3 * 2 * 64 and one.width == 8 and one.site.path == SITE
    assert one.manifest["call"] == CALL and one.manifest["config"]["branches"] == ["cond", "uncond"]


SITES_OF_A_PATH = [SITE, f"{SITE}@input", f"{SITE}@update", f"{SITE}@channels", "unet.mid_block@update,vector"]


def test_sites_of_one_path_are_stored_apart_as_each_is_alone(tmp_path):
    pipe = Harness().pipe
    stores = stored(tmp_path / "together", pipe=pipe, sites=SITES_OF_A_PATH)
    assert sorted(folder.name for folder in (tmp_path / "together").iterdir()) == sorted(SITES_OF_A_PATH)
    assert [store.site for store in stores.values()] == list(stores) == [Site.of(text) for text in SITES_OF_A_PATH]
    for text in SITES_OF_A_PATH:
        stored(tmp_path / "alone", pipe=pipe, sites=[text])
        assert ActivationStore(tmp_path / "alone" / text).site == stores[text].site
    assert files(tmp_path / "alone") == files(tmp_path / "together")
    rows = [whole(stores[text])["rows"] for text in SITES_OF_A_PATH]
    assert torch.equal(rows[0] - rows[1], rows[2]) and rows[3].shape[1] == 64


def test_a_stopped_store_of_sites_of_one_path_goes_on(tmp_path, monkeypatch):
    stored(tmp_path / "whole", sites=SITES_OF_A_PATH)
    left, save = [7], store_writer.save_file

    def stopping(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise Stop
        save(*args, **kwargs)

    monkeypatch.setattr(store_writer, "save_file", stopping)
    with pytest.raises(Stop):
        stored(tmp_path / "stopped", sites=SITES_OF_A_PATH)
    assert not all((tmp_path / "stopped" / text / "000001.safetensors").exists() for text in SITES_OF_A_PATH)
    stored(tmp_path / "stopped", sites=SITES_OF_A_PATH[::-1])
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("site", "name"),
    [
        (Site(SITE, kind="input"), SITE),  # earlier versions named folders by the path alone
        (Site("text_encoder.text_model.encoder.layers.0"), "text_encoder.text_model.encoder.layers.0"),
    ],
)
def test_a_store_of_an_earlier_version_is_loaded_and_gone_on_with(tmp_path, monkeypatch, site, name):
    call = {} if site.is_text_encoder else CALL
    config = replace(CONFIG, branches=("cond",))
    store_activations(Harness().pipe, [site], PROMPTS, tmp_path / "whole", config, **call)
    save = store_writer.save_file

    def stop_at_the_second(tensors, file):
        if file.name.startswith("000001"):
            raise Stop
        save(tensors, file)

    monkeypatch.setattr(store_writer, "save_file", stop_at_the_second)
    with pytest.raises(Stop):
        store_activations(Harness().pipe, [site], PROMPTS, tmp_path / "old", config, **call)
    monkeypatch.setattr(store_writer, "save_file", save)
    (tmp_path / "old" / str(site)).rename(tmp_path / "old" / name)
    again = store_activations(Harness().pipe, [str(site)], PROMPTS, tmp_path / "old", config, **call)[site]
    assert again.folder == tmp_path / "old" / name and again.site == site
    assert files(again.folder) == files(tmp_path / "whole" / str(site))
    assert [folder.name for folder in (tmp_path / "old").iterdir()] == [name]


def test_the_store_of_another_kind_under_a_path_is_another_run(tmp_path):
    """As an earlier version left it there."""
    stored(tmp_path, sites=[f"{SITE}@input"])
    (tmp_path / f"{SITE}@input").rename(tmp_path / SITE)
    before = files(tmp_path)
    with pytest.raises(InputError, match=f"site is {SITE}@input in the store and {SITE} here"):
        stored(tmp_path, sites=[SITE])
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("sites", "sentence"),
    [
        ([SITE, SITE], "is named twice"),
        ([SITE, f"{SITE}@output"], "is named twice"),
        (["unet.up_blocks.1@update"], "unet.up_blocks.1@update does not exist"),
        (["unet.mid_block", "unet.mid_blok"], "'unet.mid_blok' does not exist"),
        (["../elsewhere"], "'../elsewhere' is not a site"),
        (SITE, "Sites are passed as a list"),
    ],
)
def test_sites_that_cannot_be_stored_write_nothing(tmp_path, sites, sentence):
    with pytest.raises(InputError, match=sentence):
        stored(tmp_path / "store", sites=sites)
    assert list(tmp_path.iterdir()) == []


def test_what_is_kept_can_be_thinned_and_does_not_depend_on_the_batch(tmp_path):
    thin = replace(CONFIG, branches=("cond",), timesteps=2, places=5, dtype="float16")
    a, b = (stored(tmp_path / str(n), replace(thin, batch_size=n))[SITE] for n in (1, 5))
    x, y = whole(a), whole(b)
    assert len(a) == 5 * 2 * 5 and x["rows"].dtype == torch.float16
    assert sorted(set(x["timestep"].tolist())) == sorted({667.0, 1.0})
    for key in ("image", "timestep", "branch", "place"):
        assert torch.equal(x[key], y[key])
    torch.testing.assert_close(x["rows"], y["rows"], atol=2e-3, rtol=2e-3)
    places = x["place"].view(-1, 5)
    assert len({tuple(p) for p in places.tolist()}) > 5 and (places[:, 1:] > places[:, :-1]).all()


def test_a_run_that_is_stopped_at_any_moment_ends_with_the_same_bytes(finished, tmp_path, monkeypatch):
    """Before and after each flush, rename and removal of the whole run."""
    expected, harness = files(finished), Harness()
    calls = {"left": 0}

    def counted(function):
        def work(*args, **kwargs):
            for before in (True, False):
                calls["left"] -= 1
                if calls["left"] == 0:
                    raise Stop
                if before:
                    result = function(*args, **kwargs)
            return result

        return work

    for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "unlink"), (store_writer, "save_file")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    stops = 0
    for moment in range(1, 1000, 3):
        folder = tmp_path / "run"
        calls["left"] = moment
        try:
            stored(folder, pipe=harness.pipe)
        except Stop:
            stops += 1
            calls["left"] = 0
            for path in SITES:  # what is not whole is never read as whole
                try:
                    ActivationStore(folder / path)
                except InputError:
                    continue
                assert files(folder / path) == files(finished / path)
            stored(folder, pipe=harness.pipe)
        calls["left"] = 0
        assert files(folder) == expected, moment
        shutil.rmtree(folder)
        if stops < (moment + 2) // 3:
            break
    assert stops > 15


def test_a_finished_run_generates_nothing_anew(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    harness = Harness()
    harness.bare.unet.forward = None
    harness.pipe.unet.forward = None
    assert len(stored(tmp_path / "copy", pipe=harness.pipe)[SITE]) == len(ActivationStore(finished / SITE))
    assert files(tmp_path / "copy") == files(finished)


def test_a_model_that_was_moved_is_the_same(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    pipe = Harness().pipe
    pipe.register_to_config(_name_or_path="elsewhere")
    stored(tmp_path / "copy", pipe=pipe)
    assert files(tmp_path / "copy") == files(finished)


def another_unet():
    harness = Harness()
    torch.manual_seed(5)
    harness.pipe.register_modules(unet=tiny_unet())
    return harness.pipe


def another_text_encoder():
    pipe = Harness().pipe
    with torch.no_grad():
        next(pipe.text_encoder.parameters())[-1, -1] += 0.5  # far from its first numbers
    return pipe


def another_scheduler():
    pipe = Harness().pipe
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")
    return pipe


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"config": replace(CONFIG, seed=8)}, "config.seed is 7 in the store and 8 here; choose another folder, or"),
        ({"config": replace(CONFIG, places=3)}, "config.places is nothing in the store and 3 here"),
        ({"config": replace(CONFIG, branches=("cond",))}, r'is \["cond", "uncond"\] in the store and \["cond"\] here'),
        ({"prompts": [*PROMPTS[:4], "zz"]}, "run: prompts has other contents; choose"),
        ({"num_inference_steps": 4}, "call.num_inference_steps is 3 in the store and 4 here"),
        ({"eta": 0.5, "guidance_rescale": 0.1}, "call.eta is nothing in .* call.guidance_rescale is nothing in"),
        ({"pipe": another_unet}, "model.weights.unet has other contents"),
        ({"pipe": another_text_encoder}, "model.weights.text_encoder has other contents"),
        ({"pipe": another_scheduler}, "model.scheduler.timestep_spacing is leading in the store and trailing here"),
    ],
)
def test_another_run_is_not_mixed_in(finished, tmp_path, change, sentence):
    shutil.copytree(finished, tmp_path / "copy")
    if "pipe" in change:
        change = {"pipe": change["pipe"]()}
    with pytest.raises(InputError, match=sentence):
        stored(tmp_path / "copy", **change)
    assert files(tmp_path / "copy") == files(finished)


def test_a_store_of_an_older_version_is_not_gone_on_with_and_can_be_read(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    file = tmp_path / "copy" / SITE / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps({**manifest, "model": {"name": "tiny", "weights": "0" * 64}}))
    with pytest.raises(InputError, match="that an older version of diffusers_sae stored"):
        stored(tmp_path / "copy")
    assert len(ActivationStore(tmp_path / "copy" / SITE)) == len(ActivationStore(finished / SITE))


def altered(folder, change):
    shard = folder / "000001.safetensors"
    data = shard.read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    if change == "a byte":
        shard.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    if change == "cut off":
        shard.write_bytes(data[:-1])
    if change == "missing":
        shard.unlink()
    if change == "incomplete":
        (folder / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    if change == "schema":
        (folder / "manifest.json").write_text(json.dumps({**manifest, "schema": 99}))
    if change == "no json":
        (folder / "manifest.json").write_text("{")
    if change == "keys":
        (folder / "manifest.json").write_text(json.dumps({"schema": 1, "complete": True, "shards": []}))
    if change == "shards":
        (folder / "manifest.json").write_text(json.dumps({**manifest, "shards": [{"file": "000000.safetensors"}]}))
    if change == "nested":
        (folder / "manifest.json").write_text("[" * 100_000)
    if isinstance(change, dict):
        (folder / "manifest.json").write_text(json.dumps({**manifest, **change}))
    if isinstance(change, tuple):
        i, fields = change
        manifest["shards"][i] |= fields
        (folder / "manifest.json").write_text(json.dumps(manifest))
    if change in ("twice", "left out"):
        first, *rest = manifest["shards"]
        manifest["shards"] = [first, first, *rest] if change == "twice" else rest
        (folder / "manifest.json").write_text(json.dumps(manifest))
    if change == "last left out":
        manifest["shards"].pop()
        (folder / "manifest.json").write_text(json.dumps(manifest))
    if change == "other tensors":
        save_file({"row": torch.zeros(2, 3)}, shard)
        manifest["shards"][1] |= {"bytes": shard.stat().st_size, "sha256": sha256(shard)}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    if change == "random":
        (folder / "manifest.json").write_bytes(bytes(range(128, 256)))
    if change == "nothing":
        (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("a byte", "000001.safetensors is truncated or altered"),
        ("cut off", "000001.safetensors is truncated or altered"),
        ("missing", "000001.safetensors is missing"),
        ("incomplete", "is not complete; run store_activations as before"),
        ("schema", "has schema 99, and this version reads 1"),
        ("no json", "manifest.json cannot be read"),
        ("keys", "manifest.json does not say site, model, scheduler, prompts, call, config"),
        ("shards", "manifest.json does not say what its shards are"),
        ("random", "manifest.json cannot be read"),
        ("nested", "manifest.json cannot be read .*; delete .* and store the activations again"),
        ({"site": "unet.mid_block"}, "contents that no store has in site; delete"),
        ({"model": None, "call": [], "config": {"branches": "cond"}}, "that no store has in model, call, config; del"),
        (
            {"model": {"name": 3}, "scheduler": 1, "prompts": None},
            "that no store has in model, scheduler, prompts",
        ),
        ({"complete": "yes"}, "that no store has in complete; delete"),
        ({"shards": {}}, "that no store has in shards; delete"),
        ({"shards": [1]}, "that no store has in shards; delete"),
        *(
            (
                (1, {"rows": rows}),
                "does not say what its shards are: of shard 1, rows; delete .* and store the",
            )
            for rows in (None, "three", -1, 2.5, True)
        ),
        *(((2, {"file": file}), "of shard 2, file; delete") for file in (None, 3, "", "000001.safetensors", "../a")),
        ((0, {"images": None, "bytes": "many", "sha256": 7}), "of shard 0, images, bytes, sha256; delete"),
        (
            (1, {"rows": 3}),
            r"000001.safetensors holds rows of shape \(\d+, 8\), where .* there are 3; fetch",
        ),
        ((1, {"rows": 10**9}), "there are 1000000000; fetch"),
        ("twice", "of shard 1, file; delete"),
        ("left out", "of shard 0, file; delete"),
        ("last left out", "lists shards of 4 images, and the run was of 5; delete"),
        ("other tensors", r"holds rows of shape \(\), where"),
        ("nothing", "holds no store of activations"),
    ],
)
def test_a_store_that_is_not_whole_is_refused(finished, tmp_path, change, sentence):
    folder = shutil.copytree(finished / SITE, tmp_path / "copy")
    altered(folder, change)
    with pytest.raises(InputError, match=sentence) as error:
        ActivationStore(folder)
    assert str(error.value).endswith(".")
    if change not in ("incomplete", "nothing"):  # nor is it gone on with
        shutil.copytree(finished, tmp_path / "both")
        altered(tmp_path / "both" / SITE, change)
        with pytest.raises(InputError, match=sentence):
            stored(tmp_path / "both")


def test_a_store_that_was_refused_is_stored_again_as_it_says(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "both")
    altered(tmp_path / "both" / SITE, "missing")
    remedy = f"fetch the store whole, or delete {tmp_path / 'both' / SITE} and store the activations again."
    with pytest.raises(InputError) as error:
        stored(tmp_path / "both")
    assert str(error.value).endswith(remedy)
    shutil.rmtree(tmp_path / "both" / SITE)
    stored(tmp_path / "both")
    assert files(tmp_path / "both") == files(finished)


@pytest.mark.parametrize("moment", [1, 4])
def test_a_full_disk_stops_the_run_which_then_goes_on(finished, tmp_path, monkeypatch, moment):
    """The limit stands in for the disk's: the system refuses the file once it has written some of it."""
    save, calls = store_writer.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) < moment:
            return save(tensors, path)
        with file_limit(1000):
            return save(tensors, path)

    monkeypatch.setattr(store_writer, "save_file", full)
    with pytest.raises(InputError, match=r"00000\d.safetensors cannot be written \(File too large\); make room"):
        stored(tmp_path)
    monkeypatch.setattr(store_writer, "save_file", save)
    assert not list(tmp_path.rglob("*.part"))
    stored(tmp_path)
    assert files(tmp_path) == files(finished)


def test_a_full_disk_stops_the_manifest_too(finished, tmp_path):
    with file_limit(200), pytest.raises(InputError, match=r"manifest.json cannot be written \(File too large\)"):
        stored(tmp_path)
    assert not list(tmp_path.iterdir())
    stored(tmp_path)
    assert files(tmp_path) == files(finished)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"config": replace(CONFIG, max_bytes=100_000)}, r"take [\d,]+ bytes in .* and 100,000 are allowed"),
        ({"config": replace(CONFIG, images=6)}, "There are 5 prompts for 6 images"),
        ({"config": replace(CONFIG, branches=("perturbed",))}, "held no rows of perturbed; it held cond, uncond"),
        ({"sites": (SITE, "unet.nowhere")}, "'unet.nowhere' does not exist"),
        ({"prompts": "ab"}, r"prompts takes a list of prompts; pass \['ab'\]"),
        ({"prompts": [*PROMPTS[:4], 5]}, "Prompt 4 is 5, no string"),
    ],
)
def test_what_is_refused_leaves_nothing_and_can_be_stored_after_a_change(finished, tmp_path, change, sentence):
    with pytest.raises(InputError, match=sentence):
        stored(tmp_path / "store", **change)
    assert not (tmp_path / "store").exists()
    stored(tmp_path / "store")
    assert files(tmp_path / "store") == files(finished)


def test_a_half_finished_store_is_left_as_it_is_by_what_is_refused(finished, tmp_path, monkeypatch):
    save, calls = store_writer.save_file, []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise Stop
        save(*arguments)

    monkeypatch.setattr(store_writer, "save_file", stopping)
    with pytest.raises(Stop):
        stored(tmp_path)
    before = files(tmp_path)
    for change in ({"config": replace(CONFIG, seed=8)}, {"config": replace(CONFIG, max_bytes=100)}):
        with pytest.raises(InputError):
            stored(tmp_path, **change)
        assert files(tmp_path) == before
    (tmp_path / SITE / "notes.txt").write_text("mine")
    stored(tmp_path)
    assert (tmp_path / SITE / "notes.txt").read_text() == "mine"
    (tmp_path / SITE / "notes.txt").unlink()
    assert files(tmp_path) == files(finished)


def test_a_folder_that_another_process_writes_is_refused(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    with hold_folder(tmp_path / "copy" / SITE), pytest.raises(InputError, match="Another process is writing"):
        stored(tmp_path / "copy")
    stored(tmp_path / "copy")


def test_bad_configs():
    with pytest.raises(InputError, match="dtype='int8' is none of float16"):
        StoreConfig(images=1, dtype="int8")
    with pytest.raises(InputError, match="places=0 must be at least 1"):
        StoreConfig(images=1, places=0)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / SITE).mkdir()
    (tmp_path / SITE / "thesis.txt").write_text("all of it")
    with pytest.raises(InputError, match="is not empty and holds no store"):
        stored(tmp_path)
    assert (tmp_path / SITE / "thesis.txt").read_text() == "all of it"


@pytest.mark.parametrize("pool", [1, 2, 16])
def test_batches_hold_every_row_once_an_epoch_in_an_order_that_follows_from_the_seed(finished, pool):
    one = ActivationStore(finished / SITE)
    rows = whole(one)["rows"]
    batches = list(one.batches(100, seed=3, epochs=2, pool=pool))
    assert len(batches) == 2 * len(one) // 100 and all(b.shape == (100, 8) for b in batches)
    first = torch.cat(batches)[: len(one)]
    assert torch.equal(first.sort(0).values, rows.sort(0).values) and not torch.equal(first, rows)
    again = list(one.batches(100, seed=3, epochs=2, pool=pool, skip=21))
    assert len(again) == len(batches) - 21 and all(torch.equal(a, b) for a, b in zip(again, batches[21:], strict=True))
    assert not torch.equal(next(one.batches(100, seed=4, pool=pool)), batches[0])


@pytest.mark.parametrize(
    ("bias", "dtype", "sentence"),
    [
        (1e5, "float16", r"held 100,\d+, and float16 ends at 65,504; store with dtype='bfloat16' or 'float32'"),
        (float("nan"), "float16", "held numbers that are not finite; run the pipeline in fp32 or bfloat16"),
        (float("inf"), "float32", "held numbers that are not finite"),
    ],
)
def test_numbers_that_the_dtype_cannot_hold_are_refused_before_they_are_written(tmp_path, bias, dtype, sentence):
    harness, path = Harness(), "unet.mid_block.resnets.1"
    with torch.no_grad():
        harness.pipe.unet.mid_block.resnets[1].conv2.bias[3] += bias
    call = {"num_inference_steps": 2, "height": 16, "width": 16}
    with pytest.raises(InputError, match=sentence):
        store_activations(harness.pipe, [path], ["ab", "cd"], tmp_path, StoreConfig(2, 1, dtype=dtype), **call)
    assert not list(tmp_path.rglob("*.safetensors*")) and not list(tmp_path.rglob("manifest*"))
    if bias == 1e5:  # the remedy works, in the same folder
        store = store_activations(harness.pipe, [path], ["ab", "cd"], tmp_path, StoreConfig(2, 1, dtype="bfloat16"),
                                  **call)[path]  # fmt: skip
        assert store.shard(0)["rows"].isfinite().all() and store.shard(0)["rows"].max() > 65504
