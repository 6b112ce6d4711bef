"""Options from a TOML file."""

import json

import pytest

from diffusers_sae import InputError
from diffusers_sae.cli.capture import capture
from diffusers_sae.cli.configs import _read_config
from diffusers_sae.cli.train import train


def read(tmp_path, text, command=capture):
    file = tmp_path / "run.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return _read_config(file, command)


def test_tables_lists_and_single_values(tmp_path):
    values = read(
        tmp_path,
        'site = "unet.mid_block"\nstrength = [0.5, 1]\nbatch-size = 2\nmax_gb = 1\nout = "store"\n'
        'branch = ["cond", "uncond"]\n[call]\nnum_inference_steps = 20\nguidance_scale = 4.5\n'
        'height = 64\nnegative_prompt = "caf\u00e9"\nsigmas = [1.0, 0.5]\n',
    )
    assert json.loads(values.pop("call")) == {
        "num_inference_steps": 20, "guidance_scale": 4.5, "height": 64, "negative_prompt": "café", "sigmas": [1.0, 0.5],
    }  # fmt: skip
    assert values == {
        "site": ["unet.mid_block"], "strength": [0.5, 1], "batch_size": 2, "max_gb": 1, "out": "store",
        "branch": ["cond", "uncond"],
    }  # fmt: skip


def test_a_byte_order_mark_and_windows_line_ends(tmp_path):
    text = "\ufeffsteps = 7\r\nlr = 0.001\r\n"
    assert read(tmp_path, text, train) == read(tmp_path, text[1:].encode("utf-16"), train) == {"steps": 7, "lr": 0.001}


@pytest.mark.parametrize(
    ("command", "text", "sentence"),
    [
        (train, "steps = 5.5", "sets steps to 5.5, a number; it takes an integer"),
        (train, "steps = '5'", "sets steps to '5', a string; it takes an integer"),
        (train, "steps = true", "sets steps to True, a boolean; it takes an integer"),
        (train, "lr = 'fast'", "sets lr to 'fast', a string; it takes a number"),
        (train, "steps = [1, 2]", "an array; it takes an integer"),
        (train, "out = 3", "sets out to 3, an integer; it takes a string"),
        (train, "scale = 1", "it takes a string"),
        (train, "seed = 2020-01-01", "a date or a time; it takes an integer"),
        (train, "[steps]\na = 1", "a table; it takes an integer"),
        (capture, "site = 3", "it takes a string, or an array of them"),
        (capture, "site = ['a', 3]", "sets site to 3, an integer; it takes a string, or an array of them"),
        (capture, "strength = ['a']", "it takes a number, or an array of them"),
        (capture, "call = 3", "it takes a string, or a table"),
        (capture, "call = {a = 2020-01-01}", "a date or a time in call, which JSON has not"),
        (train, "stepz = 3", "sets stepz, and the command has .*; the nearest is steps"),
        (train, "config = 'other.toml'", "sets config, which only the command line can"),
        (train, "debug = true", "sets debug, which only the command line can"),
        (capture, "batch-size = 2\nbatch_size = 3", "sets batch_size twice"),
        (train, "steps = 3\nsteps = 4", "is no TOML"),
        (train, "steps: 3", "is no TOML .*write lines such as: steps = 5000"),
        (train, b"scale = '\xe9'", "is no UTF-8 text"),
    ],
)
def test_mistakes_are_told(tmp_path, command, text, sentence):
    with pytest.raises(InputError, match=sentence):
        read(tmp_path, text, command)


def test_a_file_that_is_not_there(command, tmp_path):
    for file, sentence in ((tmp_path / "none.toml", "is not there"), (tmp_path, "is a folder")):
        outcome = command("train", "store", "--out", tmp_path / "sae", "--config", file)
        assert outcome.code == 2 and sentence in outcome.err
