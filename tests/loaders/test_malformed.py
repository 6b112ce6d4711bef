"""A hundred and more files that are wrong in a hundred ways: a sentence for each, nothing run, little memory taken."""

import io
import itertools
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import random_sae
from layouts import LAYOUTS, D, K, N, random
from safetensors.torch import load_file, save_file

from diffusers_sae import InputError, LatentStatistics, load_sae

MARK = "MARK_OF_CODE_THAT_RAN"
READ = ["sparsify", "sdxl_unbox", "re_n_y", "sae_lens_topk", "dl_batch_topk", "daujotas", "openai"]


def file_of(folder: Path) -> Path:
    return next(p for p in folder.iterdir() if p.suffix in (".safetensors", ".pt", ".pth"))


def change(folder, alter):
    """Write the tensors of the folder's file again after `alter(state)`."""
    file = file_of(folder)
    if file.suffix == ".safetensors":
        state = load_file(file)
        alter(state)
        save_file({k: v.contiguous() for k, v in state.items()}, file)
    else:
        state = torch.load(file, weights_only=True)
        alter(state.get("state_dict", state))
        torch.save(state, file)


def is_weight(tensor):
    return torch.is_tensor(tensor) and tensor.is_floating_point()


def missing(i):
    def alter(state):
        name = [k for k, v in state.items() if is_weight(v) and v.ndim and not k.startswith("latents_")][i]
        del state[name]

    return alter


def reshaped(make):
    def alter(state):
        name = next(k for k, v in state.items() if is_weight(v) and v.ndim == 2)
        state[name] = make(state[name])

    return alter


def all_of(make):
    def alter(state):
        for name, tensor in state.items():
            if is_weight(tensor):
                state[name] = make(tensor)

    return alter


TENSORS = {
    **{f"without tensor {i}": missing(i) for i in range(4)},
    "a row too few": reshaped(lambda t: t[:-1]),
    "a column too few": reshaped(lambda t: t[:, :-1]),
    "three dimensions": reshaped(lambda t: t[None]),
    "flat": reshaped(lambda t: t.flatten()),
    "NaN": reshaped(lambda t: t / 0),
    "infinite everywhere": all_of(lambda t: t * torch.inf),
    "zero latents": all_of(lambda t: t[:0] if t.ndim else t),
    "renamed": lambda state: state.update({f"x.{k}": state.pop(k) for k in list(state)}),
    "empty": lambda state: state.clear() or state.update(x=torch.zeros(1)),
}
BYTES = {
    "nothing": lambda b: b"",
    "cut in half": lambda b: b[: len(b) // 2],
    "the last byte gone": lambda b: b[:-1],
    "noise": lambda b: os.urandom(500),
    "text": lambda b: b"not found\n",
    "a page": lambda b: b"<html>404</html>",
    "the header's length a lie": lambda b: (2**62).to_bytes(8, "little") + b[8:],
    "zeros": lambda b: bytes(len(b)),
}
CONFIGS = {
    "no JSON": "{",
    "a list": "[]",
    "a number": "7",
    "nested without end": "[" * 100_000,
    "not text": "\x00\x01",
    "k = 0": json.dumps({"k": 0}),
    "k < 0": json.dumps({"k": -3}),
    "k as text": json.dumps({"k": "many"}),
    "k true": json.dumps({"k": True}),
    "k = 1e9": json.dumps({"k": 10**9}),
    "k NaN": '{"k": NaN}',
    "another class": json.dumps({"_class_name": "Transformer2DModel"}),
    "an unknown argument": json.dumps({"_class_name": "TopKSAE", "k": 3, "colour": "red"}),
    "a width that lies": json.dumps({"k": 3, "d_in": 7, "d_model": 7, "features": 7}),
    "latents that lie": json.dumps({"k": 3, "num_latents": 99, "n_dirs_local": 99, "pages": 99}),
}


class Runs:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


def hostile(mark):
    """Pickles that run something where they can."""
    code = f"open({str(mark)!r}, 'w').close()"
    yield "os.system", Runs((os.system, (f"touch {mark}",)))
    yield "eval", Runs((eval, (code,)))
    yield "exec", Runs((exec, (code,)))
    yield "__import__", Runs((__import__, ("os",)))
    yield "open", Runs((open, (str(mark), "w")))
    yield "in a state dict", {"encoder.weight": Runs((os.system, (f"touch {mark}",)))}
    yield "in a list", [torch.zeros(2), Runs((os.system, (f"touch {mark}",)))]
    yield "bytearray of a petabyte", Runs((bytearray, (2**50,)))


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def deflated(state):
    """As torch saves it, and compressed, which torch never does and yet reads."""
    small = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(state))) as plain, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as tight:
        for each in plain.infolist():
            tight.writestr(each.filename, plain.read(each))
    return small.getvalue()


def claiming(shape, offsets, held=0):
    """A safetensors file whose header claims a tensor."""
    header = json.dumps({"W_dec": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(held)


def wide():
    """128 MB, if it were filled."""
    return torch.zeros(1).expand(2**13, 2**12)


def stretched():
    biases = {"enc_bias": torch.zeros(2**13), "dec_bias": torch.zeros(2**12)}
    return saved({"encoder.weight": wide(), "decoder.weight": wide(), **biases})


BOMBS = {
    "safetensors: a petabyte": ("x.safetensors", lambda: claiming([2**48, 1], [0, 2**50])),
    "safetensors: overflow": ("x.safetensors", lambda: claiming([2**61, 1], [0, 2**63])),
    "safetensors: a shape that lies": ("x.safetensors", lambda: claiming([2**40, 2**40], [0, 4], 4)),
    "safetensors: negative": ("x.safetensors", lambda: claiming([-1, -4], [0, 16], 16)),
    "torch: 256 MB with stride 0": ("x.pt", stretched),
    "zip: 256 MB in 1 MB": ("x.pt", lambda: deflated({"W_enc": wide().clone(), "W_dec": wide().clone()})),
    "saev: 256 MB in 1 MB": (
        "sae.pt",
        lambda: b'{"schema": 5}\n' + deflated({"W_enc": wide().clone(), "W_dec": wide().clone()}),
    ),
    "saev: a header without end": ("sae.pt", lambda: b"{" * 2**20),
}
"""Files that claim far more than they hold."""


def refused(folder, **arguments):
    with pytest.raises(InputError) as error:
        load_sae(folder, **arguments)
    sentence = str(error.value)
    assert sentence.endswith(".") and "\n" not in sentence and len(sentence) < 1500, sentence
    return sentence


@pytest.mark.parametrize(("layout", "wrong"), itertools.product(READ, TENSORS))
def test_tensors(layout, wrong, tmp_path):
    arguments, _ = LAYOUTS[layout](tmp_path, random())
    change(tmp_path, TENSORS[wrong])
    refused(tmp_path, **arguments)


@pytest.mark.parametrize(("layout", "wrong"), itertools.product(["sparsify", "sdxl_unbox", "saev_topk"], BYTES))
def test_bytes(layout, wrong, tmp_path):
    arguments, _ = LAYOUTS[layout](tmp_path, random())
    file = file_of(tmp_path)
    file.write_bytes(BYTES[wrong](file.read_bytes()))
    refused(tmp_path, **arguments)


@pytest.mark.parametrize(("layout", "wrong"), itertools.product(["sparsify", "sdxl_unbox", "re_n_y"], CONFIGS))
def test_configs(layout, wrong, tmp_path):
    LAYOUTS[layout](tmp_path, random())
    (config,) = tmp_path.glob("*.json")
    config.write_text(CONFIGS[wrong])
    refused(tmp_path)


@pytest.mark.parametrize("inert", [False, True])
def test_hostile_pickles_run_nothing(inert, tmp_path):
    for i, (name, thing) in enumerate(hostile(tmp_path / MARK)):
        for how in (torch.save, lambda thing, file: file.write_bytes(pickle.dumps(thing))):
            file = tmp_path / f"{i}.pt"
            how(thing, file)
            refused(file, inert=inert)
            assert not (tmp_path / MARK).exists(), name


def test_the_pickles_above_do_run_where_they_can(tmp_path):
    name, thing = next(hostile(tmp_path / MARK))
    pickle.loads(pickle.dumps(thing))
    assert (tmp_path / MARK).exists(), name


ALONE = """
import re, sys
from pathlib import Path
from diffusers_sae import InputError, LatentStatistics, load_sae

def most():  # getrusage would begin with what the parent had
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

for folder in sys.argv[1:]:
    before, told = most(), []
    for inert in (False, True):
        try:
            load_sae(Path(folder), config={"k": 2}, inert=inert)
            told.append("loaded")
        except InputError:
            told.append("refused")
    print(*told, most() - before)
"""


@pytest.fixture(scope="module")
def bombs_alone(tmp_path_factory):
    """How each bomb ends, plain and inert, and by how many kB it raises the most memory that a process ever had.

    In a process of its own, since the most that this one ever had hides what is taken now.
    """
    folders = []
    for file, make in BOMBS.values():
        folders.append(tmp_path_factory.mktemp("bomb"))
        (folders[-1] / file).write_bytes(make())
    done = subprocess.run([sys.executable, "-c", ALONE, *folders], capture_output=True, text=True, check=True)
    return dict(zip(BOMBS, (line.split() for line in done.stdout.splitlines()), strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the most memory that a process had where Linux tells it")
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_and_take_no_memory(bomb, bombs_alone, tmp_path):
    file, make = BOMBS[bomb]
    (tmp_path / file).write_bytes(make())
    refused(tmp_path, config={"k": 2})
    refused(tmp_path, config={"k": 2}, inert=True)
    first, second, taken = bombs_alone[bomb]
    assert (first, second) == ("refused", "refused") and int(taken) < 100_000


OURS = ["config.json", "labels.json", "statistics.safetensors", "checksums.json", "diffusion_pytorch_model.safetensors"]
INSTEAD = {
    "a folder": lambda path: path.mkdir(),
    "a link to nothing": lambda path: path.symlink_to(path.with_name("nothing")),
    "a link to itself": lambda path: path.symlink_to(path),
    "no text": lambda path: path.write_bytes(b'{"k": "\xe9"}'),
    "null": lambda path: path.write_bytes(b"null"),
    "a word": lambda path: path.write_bytes(b'"x"'),
    "nested without end": lambda path: path.write_bytes(b"[" * 100_000),
}


@pytest.mark.parametrize("instead", INSTEAD)
@pytest.mark.parametrize("name", OURS)
def test_what_stands_in_the_place_of_a_file_of_ours(name, instead, tmp_path):
    sae = random_sae()
    sae.labels, sae.statistics = {3: "cat"}, LatentStatistics(torch.ones(1), *(torch.ones(1, 32) for _ in range(3)))
    sae.save_pretrained(tmp_path)
    (tmp_path / "checksums.json").unlink()
    (tmp_path / name).unlink(missing_ok=True)
    INSTEAD[instead](tmp_path / name)
    refused(tmp_path)


WRONG_TYPES = {
    "k": [1.5, True, "4", [4], {"k": 4}], "relu": [0, "x", [], {}], "input_norm": [1, "x", [], True],
    "provenance": ["x", 3, [], True], "n_latents": [1.5, True, "32"], "_class_name": [3, [], {}, "Sequential"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG_TYPES.items() for value in values])
def test_fields_of_our_config_have_their_type(name, value, tmp_path):
    random_sae().save_pretrained(tmp_path)
    (tmp_path / "checksums.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
    refused(tmp_path)


@pytest.mark.parametrize("site", [3, "", [], {}, {"path": 3}, {"path": "unet.x", "colour": "red"}, {"kind": "output"}])
def test_a_site_that_is_none_is_refused(site, sd, tmp_path):
    random_sae(site=site).save_pretrained(tmp_path)
    with pytest.raises(InputError):
        sd.pipe.load_sae(tmp_path)


CALLS = [
    {"source": 3}, {"source": None}, {"source": ""}, {"source": b"x"}, {"source": "a" * 5000}, {"source": []},
    {"source": torch.zeros(3)}, {"source": {}}, {"source": {"W_dec": None}}, {"source": {1: torch.zeros(2, 2)}},
    {"subfolder": 3}, {"weight_name": 3}, {"variant": 3}, {"weight_name": "config.json"}, {"config": [1]},
    {"config": {3: 4}}, {"config": "x"}, {"variant": "../x"}, {"weight_name": "../x"},
]  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_arguments_that_are_wrong(call, tmp_path):
    random_sae().save_pretrained(tmp_path)
    call = {"source": tmp_path, **call}
    refused(call.pop("source"), **call)


@pytest.mark.parametrize(
    "told", [{"/etc/hosts": "x"}, {"../x": "x"}, {"": "x"}, {"config.json": 3}, {"x": "x"}, [], "x"]
)
def test_checksums_that_are_wrong(told, tmp_path):
    random_sae().save_pretrained(tmp_path)
    (tmp_path / "checksums.json").write_text(json.dumps(told))
    refused(tmp_path)


def test_the_files_are_right_before_they_are_made_wrong(tmp_path):
    for layout in (*READ, "saev_topk"):
        arguments, _ = LAYOUTS[layout](tmp_path / layout, random())
        change(tmp_path / layout, lambda state: None) if layout != "saev_topk" else None
        assert load_sae(tmp_path / layout, **arguments).n_latents == N
    assert (D, K) == (6, 9)
