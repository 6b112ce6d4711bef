"""`diffusers-sae capture`, and mistakes in it: nothing is written."""

import json
import shutil

import pytest
from conftest import SITE, Harness
from PIL import Image

from diffusers_sae.capture import ActivationStore

LAYER = "text_encoder.encoder.layers.0"
CALL = '{"num_inference_steps": 2, "guidance_scale": 5.0, "height": 16, "width": 16}'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A pipeline on disk."""
    folder = tmp_path_factory.mktemp("pipelines") / "model"
    Harness().bare.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(model, tmp_path, monkeypatch):
    """Where commands run: prompts, and a few files that are none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "p.txt").write_text("ab\ncd\n\nef\ngh\nij\n")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "d").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text('{"_class_name": "NoSuchPipeline"}')
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "0.png").write_bytes(b"\x89PNG no picture")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("no/such/model", "p.txt"), "'no/such/model' is no folder here and could not be fetched from the hub ("),
        (("emoji-sb", "p.txt"), "did you mean emoji-sd?"),
        (("d", "p.txt"), "d holds no pipeline: model_index.json is missing"),
        (("p.txt", "p.txt"), "p.txt is a file; pass the folder of a pipeline"),
        (("broken", "p.txt"), "The pipeline in broken cannot be loaded ("),
        (("model", "latin1.txt"), "latin1.txt is no UTF-8 text (byte 3 is 0xe9); save it as UTF-8"),
        (("model", "d"), "d is a folder; pass a file"),
        (("model", "empty.txt"), "empty.txt holds no prompts"),
        (("model", "none.txt"), "none.txt is not there"),
        (("model", "p.txt", "--call", "[1]"), "call='[1]' is no JSON object"),
        (("model", "p.txt", "--call", '{"num_inference_steps": 0}'), "num_inference_steps=0 must be at least 1"),
        (("model", "p.txt", "--call", '{"num_inference_step": 4}'), "the nearest is 'num_inference_steps'"),
        (("model", "p.txt", "--call", '{"height": 13, "width": 16}'), "`height` and `width` have to be divisible by 8"),
        (("model", "p.txt", "--call", '{"callback_on_step_end": "x"}'), "cannot be called like this"),
        (("model", "p.txt", "--site", "unet.mid_blok"), "'unet.mid_blok' does not exist"),
        (("model", "p.txt", "--site", "unet"), "'unet' cannot be steered as a whole"),
        (("model", "p.txt", "--site", f"{SITE}@inptu"), "the nearest is 'input'"),
        (("model", "p.txt", "--site", f"{SITE}@input,update"), "says its kind twice"),
        (("model", "p.txt", "--site", "unet.conv_in@update"), "unet.conv_in@update does not exist"),
        (("model", "p.txt", "--site", SITE, "--site", f"{SITE}@image"), "is named twice, as"),
        (("model", "p.txt", "--site", ""), "is not a site of StableDiffusionPipeline"),
        (("model", "p.txt", "--out", "p.txt/store"), "p.txt/store cannot be written, since"),
        (("model", "p.txt", "--out", "p.txt"), "p.txt cannot be written, since"),
        (("model", "p.txt", "--images", 9), "There are 5 prompts for 9 images"),
        (("model", "p.txt", "--images", 0), "images=0 must be"),
        (("model", "p.txt", "--batch-size", -1), "batch_size=-1 must be"),
        (("model", "p.txt", "--dtype", "float8"), "'float8' is"),
        (("model", "p.txt", "--max-gb", "nan"), "max_gb=nan must be a number above 0"),
        (("model", "p.txt", "--max-gb", "1e-9"), "keep fewer images"),
        (("model", "p.txt", "--branch", "neither"), "held no rows of neither"),
        (("model", "p.txt", "--tokens", "words"), "tokens='words' is of text encoders"),
        (
            ("model", "p.txt", "--tokens", "nope"),
            "tokens='nope' is no choice of tokens; choose one of words, padded",
        ),
        (("model", "p.txt", "--site", LAYER, "--tokens", "nope"), "tokens='nope' is no choice of tokens; choose"),
        (("model", "p.txt", "--call", "[" * 100_000), "recursion depth exceeded"),
        (("model", "p.txt", "--strength", 0.5), "--strength is of the noise that pictures get"),
        (("model", "p.txt", "--pictures", "nowhere"), "nowhere holds no pictures"),
        (("model", "p.txt", "--pictures", "pictures", "--images", 1), "0.png is no picture that can be read"),
        (("model", "p.txt", "--seed", "x"), "--seed"),
        (("model", "p.txt", "--sead", 3), "No such option"),
    ],
)
def test_a_mistake_is_a_sentence_and_writes_nothing(command, folder, arguments, sentence):
    out = () if "--out" in arguments else ("--out", "store")
    site = () if "--site" in arguments else ("--site", SITE)
    outcome = command("capture", *arguments, *site, *out)
    assert outcome.code == 2 and sentence in outcome.err
    assert [file for file in (folder / "store").rglob("*") if file.suffix in (".safetensors", ".json")] == []


def test_a_mistake_does_not_spoil_the_folder(command, folder):
    wrong = CALL.replace("16}", "13}")
    assert command("capture", "model", "p.txt", "--site", SITE, "--out", "store", "--call", wrong).code == 2
    assert command("capture", "model", "p.txt", "--site", SITE, "--out", "store", "--call", CALL).code == 0


def test_a_broken_picture_is_refused_before_the_first_shard(command, folder):
    """Mended, it does not count as another run's."""
    for i in range(5):
        Image.effect_noise((16, 16), 50 + i).save(folder / "pictures" / f"{i}.png")
    third, call = folder / "pictures" / "2.png", '{"num_inference_steps": 2}'
    whole = third.read_bytes()
    third.write_bytes(whole[: len(whole) // 2])
    capture = ("capture", "model", "p.txt", "--site", SITE, "--out", "store", "--pictures", "pictures")
    capture = (*capture, "--strength", 1.0, "--batch-size", 1, "--call", call)
    outcome = command(*capture)
    assert outcome.code == 2 and "2.png is no picture that can be read" in outcome.err
    assert not (folder / "store").exists()
    assert command(*capture, "--images", 2).code == 0  # to which it does not belong
    third.write_bytes(whole)
    shutil.rmtree(folder / "store")
    assert command(*capture).code == 0 and len(list((folder / "store" / SITE).glob("*.safetensors"))) == 5


def test_text_encoders_from_prompts_to_an_sae(command, folder):
    """Neither the figures nor the picture of such an SAE speak of timesteps."""
    capture = ("capture", "model", "p.txt", "--site", LAYER, "--out", "store", "--tokens", "words", "--batch-size", 1)
    outcome = command(*capture)
    assert outcome.code == 0 and outcome.out.startswith(f"{LAYER}: 10 rows of width 16")
    assert command(*capture).out == outcome.out
    manifest = json.loads((folder / "store" / LAYER / "manifest.json").read_text())
    assert manifest["config"]["tokens"] == "words" and len(ActivationStore(folder / "store" / LAYER)) == 10
    train = ("--latents", 24, "--k", 2, "--rows", 4, "--steps", 20)
    outcome = command("train", f"store/{LAYER}", "--out", "sae", *train)
    assert outcome.code == 0 and "FVU" in outcome.out and "timestep" not in outcome.out
    outcome = command("inspect", "sae")
    assert outcome.code == 0 and (folder / "sae" / "inspect.png").stat().st_size > 5_000
    harness = Harness()
    harness.pipe.load_sae(folder / "sae")
    bare = harness.run()
    harness.pipe.steer(dict.fromkeys(range(24), 3.0), tokens=[1, 2])
    assert (harness.run() != bare).any()
    assert "| tokens | words |" in (folder / "sae" / "README.md").read_text()


def test_two_kinds_of_one_path_from_prompts_to_saes(command, folder):
    kinds = [f"{SITE}@input", f"{SITE}@update,channels"]
    options = [word for kind in kinds for word in ("--site", kind)]
    capture = ("capture", "model", "p.txt", *options, "--out", "store", "--batch-size", 1, "--call", CALL)
    outcome = command(*capture)
    assert outcome.code == 0
    assert [line.partition(": ")[0] for line in outcome.out.splitlines()] == kinds
    assert command(*capture).out == outcome.out  # it goes on where it was
    for i, (kind, width) in enumerate(zip(kinds, (8, 64), strict=True)):
        assert ActivationStore(folder / "store" / kind).width == width
        train = ("--latents", 24, "--k", 2, "--rows", 16, "--steps", 5)
        assert command("train", f"store/{kind}", "--out", f"sae{i}", *train).code == 0
    harness = Harness()
    for i in range(2):
        harness.pipe.load_sae(folder / f"sae{i}")
    assert [sae["site"] for sae in harness.pipe.get_list_saes().values()] == kinds


def test_a_config_names_sites_by_their_text(command, folder):
    (folder / "run.toml").write_text(f'site = ["{SITE}@channels,input", "{SITE}"]\nimages = 1\n')
    outcome = command("capture", "model", "p.txt", "--out", "store", "--call", CALL, "--config", "run.toml")
    assert outcome.code == 0
    assert {path.name for path in (folder / "store").iterdir()} == {SITE, f"{SITE}@input,channels", "run.json"}


def test_a_whole_captures_folder_is_no_store(command, folder):
    assert command("capture", "model", "p.txt", "--site", SITE, "--out", "store", "--call", CALL).code == 0
    outcome = command("train", "store", "--out", "sae", "--latents", 8)
    assert outcome.code == 2 and f"pass the folder of a site in it: store/{SITE}" in outcome.err
