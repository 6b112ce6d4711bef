"""Weights in several files, whole or left on disk, and the index that names them."""

import json

import pytest
import torch
from conftest import random_sae
from layouts import LAYOUTS, K, N, random, rows
from safetensors.torch import load_file, save_file

from diffusers_sae import InputError, load_sae
from diffusers_sae.loaders.shards import is_index, is_shard

INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path):
    sae = random_sae()
    sae.labels = {3: "cat"}
    sae.save_pretrained(tmp_path, max_shard_size=600)
    assert sum(is_shard(path.name) for path in tmp_path.iterdir()) > 2
    return sae, tmp_path


def is_equal(a, b):
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("options", [{"max_shard_size": 600}, {"max_shard_size": 600, "safe_serialization": False}])
def test_shards_are_loaded(options, variant, tmp_path):
    sae = random_sae()
    sae.save_pretrained(tmp_path, variant=variant, **options)
    assert is_equal(load_sae(tmp_path, variant=variant), sae)
    (index,) = [path for path in tmp_path.iterdir() if is_index(path.name)]
    assert is_equal(load_sae(index), sae) and is_equal(load_sae(tmp_path, weight_name=index.name), sae)
    with pytest.raises(InputError, match="holds no weights of variant 'bf16'"):
        load_sae(tmp_path, variant="bf16")


def test_shards_steer_and_stay_on_disk(sharded, sd, monkeypatch):
    sae, folder = sharded
    sd.pipe.load_sae(sae, adapter_name="whole")
    sd.pipe.steer({3: 5.0})
    added = sd.run()
    sd.pipe.unload_sae()
    monkeypatch.setattr("diffusers_sae.loaders.LARGE", 0)
    sd.pipe.load_sae(folder, adapter_name="lazy")
    lazy = sd.pipe._steering.loaded["lazy"].sae
    assert lazy.W_dec.is_meta and lazy.labels == {3: "cat"}
    sd.pipe.steer({3: 5.0})
    assert torch.equal(sd.run(), added) and lazy.W_dec.is_meta
    lazy.fetch()
    assert is_equal(lazy, sae)


def test_files_of_others_in_shards(tmp_path):
    """As transformers names them."""
    arguments, rule = LAYOUTS["re_n_y"](tmp_path, random())
    state, places = load_file(tmp_path / "model.safetensors"), {}
    (tmp_path / "model.safetensors").unlink()
    for i, (name, tensor) in enumerate(state.items()):
        places[name] = f"model-{i + 1:05}-of-{len(state):05}.safetensors"
        save_file({name: tensor}, tmp_path / places[name])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    sae = load_sae(tmp_path, **arguments)
    assert (sae.n_latents, sae.k) == (N, K)
    z, _ = rule(rows().double().numpy())
    torch.testing.assert_close(sae.encode(rows()).double(), torch.tensor(z), atol=1e-5, rtol=0)


@pytest.mark.parametrize("lazy", [False, True])
def test_every_shard_has_a_checksum(lazy, sharded, monkeypatch):
    _, folder = sharded
    monkeypatch.setattr("diffusers_sae.loaders.LARGE", 0 if lazy else 2**28)
    recorded = json.loads((folder / "checksums.json").read_text())
    shards = sorted(path for path in folder.iterdir() if is_shard(path.name))
    assert {INDEX, *(path.name for path in shards)} <= set(recorded)
    for shard in shards:
        data = bytearray(shard.read_bytes())
        shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(InputError, match=f"{shard.name} does not have the checksum"):
            load_sae(folder).fetch()
        shard.write_bytes(data)
    load_sae(folder).fetch()


WRONG = {
    "a list": lambda index: [],
    "no map": lambda index: {},
    "an empty map": lambda index: {"weight_map": {}},
    "a map of numbers": lambda index: {"weight_map": {"W_dec": 3}},
    "a map that is a list": lambda index: {"weight_map": ["W_dec"]},
    "null": lambda index: {"weight_map": None},
    "a shard that is not there": lambda index: {"weight_map": dict.fromkeys(index["weight_map"], "x.safetensors")},
    "another folder": lambda index: {"weight_map": dict.fromkeys(index["weight_map"], "../x.safetensors")},
    "a tensor too few": lambda index: {"weight_map": dict(list(index["weight_map"].items())[1:])},
    "tensors elsewhere": lambda index: {"weight_map": dict.fromkeys(index["weight_map"], index["weight_map"]["W_dec"])},
}


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("wrong", WRONG)
def test_an_index_that_is_wrong_is_refused(wrong, lazy, sharded, monkeypatch):
    _, folder = sharded
    monkeypatch.setattr("diffusers_sae.loaders.LARGE", 0 if lazy else 2**28)
    (folder / "checksums.json").unlink()
    index = folder / INDEX
    index.write_text(json.dumps(WRONG[wrong](json.loads(index.read_text()))))
    with pytest.raises(InputError) as error:
        load_sae(folder)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("change", ["gone", "cut off", "empty", "a folder"])
def test_a_shard_that_is_wrong_is_refused(change, lazy, sharded, monkeypatch):
    _, folder = sharded
    monkeypatch.setattr("diffusers_sae.loaders.LARGE", 0 if lazy else 2**28)
    (folder / "checksums.json").unlink()
    for shard in [path for path in folder.iterdir() if is_shard(path.name)]:
        data = shard.read_bytes()
        shard.unlink()
        if change == "a folder":
            shard.mkdir()
        elif change != "gone":
            shard.write_bytes(data[:-3] if change == "cut off" else b"")
        with pytest.raises(InputError) as error:
            load_sae(folder)
        assert shard.name in str(error.value) and "\n" not in str(error.value)
        shard.rmdir() if change == "a folder" else shard.unlink(missing_ok=True)
        shard.write_bytes(data)


def test_what_is_called_an_index_and_a_shard():
    assert (
        is_index(INDEX) and is_index("model.safetensors.index.fp16.json") and is_index("pytorch_model.bin.index.json")
    )
    assert not any(is_index(name) for name in ("model_index.json", "config.json", "index.json", "x.safetensors"))
    assert is_shard("model-00001-of-00002.safetensors") and not is_shard("model-1.safetensors")
