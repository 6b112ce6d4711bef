"""The command line: what it does with mistakes."""

import itertools
import json
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import typer
from conftest import SITE, Harness
from PIL import Image

from diffusers_sae import InputError, LatentStatistics, TopKSAE, cli
from diffusers_sae.capture import StoreConfig, store_activations
from diffusers_sae.cli.app import app
from diffusers_sae.cli.prompts import read_prompts
from diffusers_sae.demo.shipped import CALL as CALL_OF_EMOJI_SD
from diffusers_sae.demo.shipped import MODELS, SITES, load_pipeline
from diffusers_sae.demo.world import sample_captions
from diffusers_sae.training import TrainingConfig
from diffusers_sae.training.config import DEAD_AFTER
from diffusers_sae.training.precision import resolve_precision


def run(monkeypatch, capsys, *arguments):
    """Exit code and what stands on standard error."""
    monkeypatch.setattr(sys, "argv", ["diffusers-sae", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code, capsys.readouterr().err


def done(monkeypatch, capsys, *arguments):
    """What stands on standard output, after a command that worked."""
    monkeypatch.setattr(sys, "argv", ["diffusers-sae", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code in (0, None)
    return capsys.readouterr().out


@pytest.fixture
def folder(tmp_path):
    """A pipeline on disk, and prompts."""
    Harness().bare.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("ab\ncd\n\nef\ngh\nij\n")
    return tmp_path


CALL = json.dumps({"num_inference_steps": 3, "guidance_scale": 5.0, "height": 16, "width": 16})


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_from_a_pipeline_to_an_sae_that_steers_it(monkeypatch, capsys, folder, kind):
    store, out = folder / "store", folder / "sae"
    capture = ("capture", folder / "model", folder / "prompts.txt", "--out", store, "--site", SITE, "--call", CALL)
    told = done(monkeypatch, capsys, *capture, "--batch-size", 2)
    assert told.startswith(f"{SITE}: 960 rows of width 8, 0.000 GB, in {store / SITE}")
    train = (
        "train",
        store / SITE,
        "--out",
        out,
        "--latents",
        32,
        "--kind",
        kind,
        "--k",
        4,
        "--rows",
        64,
        "--steps",
        30,
    )
    told = done(monkeypatch, capsys, *train)
    assert "on 192 rows held out" in told
    assert done(monkeypatch, capsys, *train) == told  # again, from its checkpoint
    figures = json.loads((out / "held_out.json").read_text())
    assert len(figures["fvu_by_timestep"]) == 3 and figures["rows"] == 192
    told = done(monkeypatch, capsys, "inspect", out)
    assert "latents: 32\n" in told and (out / "inspect.png").stat().st_size > 10_000
    harness = Harness()
    bare = harness.run()
    loaded = harness.pipe.load_sae(out)
    assert torch.equal(harness.run(), bare)
    alive = (~LatentStatistics.load(out).dead).nonzero().flatten().tolist()
    harness.pipe.steer(dict.fromkeys(alive[:3], 2.0), unit="max")
    assert not torch.equal(harness.run(), bare), loaded


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("train", "nowhere", "--out", "sae", "--latents", "8"), "nowhere holds no store of activations"),
        (("train", "nowhere", "--out", "sae"), "Neither latents nor a scale is given; pass --latents 5120, or --scale"),
        (("train", "nowhere", "--out", "sae", "--latents", "8", "--kind", "magic"), "'magic' is not a kind of SAE"),
        (
            ("train", "store", "--out", "sae", "--latents", "8", "--optimizer", "magic"),
            "'magic' is not an optimizer; choose from adam, adafactor",
        ),
        *(
            (("train", "store", "--out", "sae", "--latents", "8", f"--{name}", str(value)), f"{name}={value} must be")
            for name, value in (("rows", -1), ("rows", 1), ("steps", 0), ("lr", -0.1), ("lr", 0.0), ("ema", 1.0))
        ),
        (
            ("capture", "model", "prompts.txt", "--out", "store", "--site", "unet", "--call", "{"),
            "call='{' is no JSON",
        ),
        (("capture", "model", "none.txt", "--out", "store", "--site", "unet.mid_block"), "none.txt"),
    ],
)
def test_mistakes_in_capture_and_train(monkeypatch, capsys, folder, arguments, sentence):
    monkeypatch.chdir(folder)
    code, shown = run(monkeypatch, capsys, *arguments)
    assert code == 2 and sentence in shown and "Traceback" not in shown
    assert not (folder / "sae").exists() and not (folder / "store").exists()


def test_a_command_from_a_file_with_flags_above_it(monkeypatch, capsys, folder):
    monkeypatch.chdir(folder)
    (folder / "capture.toml").write_text(
        f"model = 'model'\nprompts = 'prompts.txt'\nout = 'store'\nsite = ['{SITE}']\nbatch-size = 2\n"
        f"places = 9\ncall = '{CALL}'\n"
    )
    assert "45 rows of width 8" not in done(monkeypatch, capsys, "capture", "--config", "capture.toml", "--places", 4)
    told = json.loads((folder / "store" / "run.json").read_text())
    assert told["command"] == "capture" and told["places"] == 4 and told["batch_size"] == 2 and told["site"] == [SITE]
    (folder / "train.toml").write_text("latents = 32\nk = 4\nrows = 16\nsteps = 5\nlr = 0.001\n")
    done(monkeypatch, capsys, "train", f"store/{SITE}", "--out", "sae", "--config", "train.toml", "--steps", 7)
    told = json.loads((folder / "sae" / "training" / "run.json").read_text())
    assert (told["latents"], told["training"]["steps"], told["training"]["lr"]) == (32, 7, 0.001)
    (folder / "train.toml").write_text("latent = 32\n")
    code, shown = run(monkeypatch, capsys, "train", f"store/{SITE}", "--out", "other", "--config", "train.toml")
    assert code == 2 and "train.toml sets latent, and the command has" in shown
    (folder / "train.toml").write_text("latents: 32\n")
    code, shown = run(monkeypatch, capsys, "train", f"store/{SITE}", "--out", "other", "--config", "train.toml")
    assert code == 2 and "train.toml is no TOML" in shown and not (folder / "other").exists()


def test_the_defaults_of_training_are_those_of_the_api(monkeypatch, capsys, folder):
    """They are taken from there, and the help states them."""
    monkeypatch.chdir(folder)
    capture = ("capture", "model", "prompts.txt", "--out", "store", "--site", SITE, "--call", CALL, "--batch-size", 2)
    done(monkeypatch, capsys, *capture)
    done(monkeypatch, capsys, "train", f"store/{SITE}", "--out", "sae", "--latents", 8, "--k", 2, "--rows", 16,
         "--steps", 3)  # fmt: skip
    settings = json.loads((folder / "sae" / "training" / "run.json").read_text())["training"]
    assert settings == {**asdict(TrainingConfig(3, 16)), "precision": resolve_precision()}
    options = {p.name: p.help for p in typer.main.get_command(app).commands["train"].params}
    default = TrainingConfig(5000)
    stated = {"lr": default.lr, "rows": default.batch_size, "sparsity": int(default.sparsity)}
    stated |= {"optimizer": default.optimizer, "precision": default.precision, "dead_after": DEAD_AFTER}
    for name, value in stated.items():
        assert f"{value}" in options[name], name


def test_held_out_rows_without_spread_have_no_fvu(monkeypatch, capsys, folder):
    """One row per timestep: the figure of each is null, and the printed line says so; the pooled one exists."""
    monkeypatch.chdir(folder)
    capture = ("capture", "model", "prompts.txt", "--out", "store", "--site", SITE, "--call", CALL)
    done(monkeypatch, capsys, *capture, "--batch-size", 1, "--places", 1)
    train = ("train", f"store/{SITE}", "--latents", 8, "--k", 2, "--rows", 4, "--steps", 3)
    told = done(monkeypatch, capsys, *train, "--out", "sae")
    assert "(undefined by timestep, as each has equal rows)" in told and "on 3 rows held out" in told
    figures = json.loads((folder / "sae" / "held_out.json").read_text())
    assert set(figures["fvu_by_timestep"].values()) == {None} and 0 < figures["fvu"] < 100
    assert "fvu: " in done(monkeypatch, capsys, "inspect", "sae")
    done(monkeypatch, capsys, *capture[:3], "--out", "alone", *capture[5:], "--batch-size", 1, "--places", 1,
         "--timesteps", 1)  # fmt: skip
    told = done(monkeypatch, capsys, "train", f"alone/{SITE}", *train[2:], "--out", "other")
    assert "FVU undefined, as the rows held out are all the same" in told
    figures = json.loads((folder / "other" / "held_out.json").read_text())
    assert figures["fvu"] is None and 0 <= figures["mse"] < 100
    assert "fvu: None" in done(monkeypatch, capsys, "inspect", "other")


@pytest.fixture(scope="module")
def activations(tmp_path_factory):
    """A store of the embedded model's activations."""
    folder = tmp_path_factory.mktemp("activations")
    pipe, prompts = load_pipeline(), list(sample_captions(12, seed=0))
    store_activations(pipe, [SITES[1]], prompts, folder, StoreConfig(12, 4, places=32), **CALL_OF_EMOJI_SD)
    return folder / SITES[1]


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka", "relu", "jumprelu", "gated"])
@pytest.mark.parametrize("scale", ["1s", "10s"])
def test_presets_train_every_kind(monkeypatch, capsys, activations, tmp_path, kind, scale):
    ticks = itertools.count(step=1 / 40)  # a step takes 1/40 s, so that a slow machine trains as long as a fast one
    monkeypatch.setattr("diffusers_sae.training.scales.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    command = ("train", activations, "--out", tmp_path / "sae", "--kind", kind, "--scale", scale, "--sparsity", 3)
    told = done(monkeypatch, capsys, *command)
    record = json.loads((tmp_path / "sae" / "training" / "run.json").read_text())
    width = TopKSAE.load_config(tmp_path / "sae")["d_in"]
    steps, expansion = {"1s": (50, 1), "10s": (400, 2)}[scale]
    assert record["latents"] == expansion * width and record["training"]["steps"] == steps
    figures = json.loads((tmp_path / "sae" / "held_out.json").read_text())
    assert figures["fvu"] < 0.9 and figures["l0"] < 0.75 * record["latents"]
    assert done(monkeypatch, capsys, *command) == told  # again, with the sizes that were timed the first time
    code, shown = run(monkeypatch, capsys, *map(str, command), "--seed", "5")
    assert code == 2 and "is of another run: seed is 0 in run.json and 5 here" in shown


def test_the_embedded_pipeline_goes_by_its_name(monkeypatch, capsys, folder):
    monkeypatch.chdir(folder)
    told = done(
        monkeypatch, capsys, "capture", "emoji-sd", "prompts.txt", "--site", SITES[1], "--out", "store", "--images", 2,
        "--batch-size", 2, "--call", '{"num_inference_steps": 2, "guidance_scale": 4}',
    )  # fmt: skip
    assert told.startswith(f"{SITES[1]}: 256 rows of width 128")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", 'id,words\n1,"a, b"\n2,cd\n'),
        ("p.jsonl", '{"id": 1, "words": "a, b"}\n\n{"id": 2, "words": "cd"}\n'),
        ("p.txt", "a, b\n\ncd\n"),
    ],
)
def test_prompts_from_a_column(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_prompts(tmp_path / name, "words") == ["a, b", "cd"]
    if name != "p.txt":
        with pytest.raises(InputError, match=f"Row 1 of .*{name} has no text in the column 'prompt'; it has id, words"):
            read_prompts(tmp_path / name, "prompt")


def test_pictures_with_noise(monkeypatch, capsys, folder):
    monkeypatch.chdir(folder)
    (folder / "pictures").mkdir()
    command = (
        "capture", "model", "prompts.txt", "--site", SITE, "--out", "store", "--images", 3, "--batch-size", 2,
        "--pictures", "pictures", "--strength", 0.5, "--strength", 1,
        "--call", '{"num_inference_steps": 4, "guidance_scale": 5.0}',
    )  # fmt: skip
    code, shown = run(monkeypatch, capsys, *map(str, command))
    assert code == 2 and "pictures holds no pictures; put .png" in shown
    for i in range(3):
        Image.new("RGB", (16, 16), (60 * i, 90, 10)).save(folder / "pictures" / f"{i}.png")
    told = done(monkeypatch, capsys, *command)
    assert told.startswith(f"{SITE}: 384 rows of width 8")  # 3 pictures at 2 strengths of 64 places
    assert done(monkeypatch, capsys, *command) == told
    Image.new("RGB", (16, 16), (1, 1, 1)).save(folder / "pictures" / "0.webp")
    code, shown = run(monkeypatch, capsys, *map(str, command))
    assert code == 2 and "is of another run: call.images has other contents" in shown


def test_help_names_every_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diffusers-sae", "--help"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    shown = capsys.readouterr().out
    assert stop.value.code in (0, None)
    assert all(command in shown for command in ("demo", "evaluate", "capture", "train", "inspect"))


def test_a_mistake_is_one_sentence(monkeypatch, capsys):
    code, shown = run(monkeypatch, capsys, "evaluate", "--parts", "model,luck")
    assert code == 2
    assert shown == "error: 'luck' is not a part; choose from model, sae, steering, bare, curves, styles, objects.\n"


def test_debug_shows_where_it_arose(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["diffusers-sae", "evaluate", "--parts", "luck", "--debug"])
    with pytest.raises(InputError, match="'luck' is not a part"):
        cli.main()


def test_an_unknown_command_is_refused(monkeypatch, capsys):
    code, shown = run(monkeypatch, capsys, "dream")
    assert code == 2
    assert "dream" in shown and "Traceback" not in shown


def test_an_sae_is_checked_on_a_pipeline(monkeypatch, capsys):
    site = SITES[0]
    steps = ("--prompt", "a panda on a green background", "--steps", 2, "--guidance", 4)
    check = ("check", "emoji-sd", MODELS / "saes" / site, *steps)
    told = done(monkeypatch, capsys, *check)
    assert told.startswith(f"The SAE fits {site}: FVU 0.")
    told = done(monkeypatch, capsys, *check, "--site", site, "--kind", "update")
    assert f"was not trained on {site}@update but on {site}" in told.splitlines()[0]
    code, message = run(monkeypatch, capsys, *map(str, check), "--site", "unet.nowhere")
    assert code == 2 and "'unet.nowhere' does not exist" in message
