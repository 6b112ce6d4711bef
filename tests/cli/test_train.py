"""`diffusers-sae train` and `inspect`, and mistakes in them."""

import json

import pytest
from conftest import SITE, Harness, file_limit

from diffusers_sae.capture import StoreConfig, store_activations

RUN = ("--latents", 16, "--k", 4, "--rows", 32, "--steps", 4)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of a tiny pipeline, in three shards of 128 rows."""
    folder, call = tmp_path_factory.mktemp("store"), {"num_inference_steps": 2, "height": 16, "width": 16}
    store_activations(Harness().pipe, [SITE], ["a", "b", "c"], folder, StoreConfig(3, batch_size=1), **call)
    return folder / SITE


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--rows", 0), "must be"),
        (("--rows", -1), "must be"),
        (("--rows", 100_000), "fewer than the 100000 of a step"),
        (("--steps", 0), "must be"),
        (("--steps", -3), "must be"),
        (("--lr", -1), "must be"),
        (("--lr", "nan"), "must be"),
        (("--ema", 2), "must be"),
        (("--dead-after", -1), "must be"),
        (("--resample-every", 0), "must be"),
        (("--sparsity", -1), "must be"),
        (("--latents", 0), "latents=0 must be at least 1"),
        (("--latents", -8), "latents=-8 must be at least 1"),
        (("--k", 0), "k is 0, which must lie between 1 and n_latents (16)"),
        (("--k", 17), "k is 17, which must lie between 1 and n_latents (16)"),
        (("--kind", "magic"), "'magic' is not a kind of SAE"),
        (("--optimizer", "magic"), "magic"),
        (("--precision", "float8"), "float8"),
        (("--scale", "2y"), "'2y' is not a scale"),
        (("--scale", "1s"), "steps=4 does nothing with scale=1s; leave one of them out"),
        (("--tracker", "nope"), "'nope' is not a tracker; choose from"),
        (("--tracker", "aim"), "The tracker aim is not installed; run: pip install aim"),
        (("--held-out", 0), "held_out=0 must be at least 1 and less than the 3 shards"),
        (("--held-out", 3), "held_out=3 must be at least 1"),
        (("--out", "file"), "file cannot be written"),
        (("--out", "file/sae"), "file/sae cannot be written"),
        (("--config", "none.toml"), "none.toml is not there"),
    ],
)
def test_a_mistake_is_a_sentence_and_writes_nothing(command, folder, store, arguments, sentence):
    outcome = command("train", store, "--out", "sae", *RUN, *arguments)
    assert outcome.code == 2 and sentence in outcome.err
    assert sorted(file.name for file in folder.iterdir()) == ["file"]


def test_a_loss_that_is_not_finite(command, folder, store):
    outcome = command("train", store, "--out", "sae", *RUN, "--lr", 1e30)
    assert outcome.code == 2
    assert "The loss is nan at step 1" in outcome.err and "pass a lower --lr, and another --out" in outcome.err
    assert not (folder / "sae" / "config.json").exists()
    assert command("train", store, "--out", "other", *RUN).code == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("sae", "--out", "x.nope"), "x.nope ends in no format of pictures; choose from"),
        (("sae", "--out", "x"), "x ends in no format of pictures"),
        (("sae", "--out", "."), ". is a folder; pass a file to write"),
        (("sae", "--out", "file/x.png"), "cannot be written, since"),
        (("nowhere",), "nowhere is no folder; pass the folder of an SAE"),
        (("file",), "file is no folder"),
        ((".",), "holds no SAE"),
    ],
)
def test_mistakes_in_inspect(command, folder, store, arguments, sentence):
    assert command("train", store, "--out", "sae", *RUN).code == 0
    outcome = command("inspect", *arguments)
    assert outcome.code == 2 and sentence in outcome.err
    assert not list(folder.rglob("inspect.png")) and not list(folder.glob("x*"))


@pytest.mark.parametrize("file", ["held_out.json", "training/log.jsonl"])
@pytest.mark.parametrize("text", ["{", "[]", "{}", "3"])
def test_figures_that_were_cut_off(command, folder, store, file, text):
    assert command("train", store, "--out", "sae", *RUN).code == 0
    (folder / "sae" / file).write_text(text)
    outcome = command("inspect", "sae")
    assert outcome.code == 2 and ("cannot be read" in outcome.err or "truncated or altered" in outcome.err)


def test_a_picture_in_another_format(command, folder, store):
    assert command("train", store, "--out", "sae", *RUN).code == 0
    assert command("inspect", "sae", "--out", "pictures/x.SVG").code == 0
    assert "<svg" in (folder / "pictures" / "x.SVG").read_text()


def test_a_picture_on_a_full_disk(command, folder, store):
    assert command("train", store, "--out", "sae", *RUN).code == 0
    (folder / "x.png").write_bytes(b"an older one")
    with file_limit(2000):
        outcome = command("inspect", "sae", "--out", "x.png")
    assert outcome.code == 2 and "x.png cannot be written (File too large); make room" in outcome.err
    assert (folder / "x.png").read_bytes() == b"an older one" and not list(folder.glob("x.png.part"))


def test_every_option_can_stand_in_a_file(command, folder, store):
    (folder / "run.toml").write_text(
        f'store = "{store}"\nout = "sae"\nlatents = 16\nk = 4\nrows = 32\nsteps = 4\nlr = 1e-3\n'
    )
    assert command("train", "--config", "run.toml").code == 0
    assert json.loads((folder / "sae" / "training" / "run.json").read_text())["training"]["steps"] == 4


def test_a_resumed_scale_keeps_its_sizes_and_compares_what_is_asked(command, folder, store):
    run = ("train", store, "--k", 4, "--scale", "1s", "--out", "sae")
    assert command(*run).code == 0
    latents = json.loads((folder / "sae/training/run.json").read_text())["latents"]
    assert command(*run).code == 0
    refused = command(*run, "--latents", latents + 1)
    assert refused.code == 2 and f"latents is {latents} in run.json and {latents + 1} here" in refused.err
