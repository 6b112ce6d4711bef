"""Rows that are read from a file, against the whole file."""

import json

import pytest
import torch
from conftest import random_sae
from safetensors.torch import load_file, save_file

from diffusers_sae import InputError, load_sae
from diffusers_sae.loaders.stored import stored_tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_rows_are_those_of_the_file(tmp_path, dtype):
    file = tmp_path / "x.safetensors"
    matrix = torch.randn(7, 5).to(dtype)
    save_file({"first": torch.arange(3), "m": matrix, "last": torch.randn(2)}, file, metadata={"format": "pt"})
    stored = stored_tensors(file)
    assert set(stored) == {"first", "m", "last"} and stored["first"].dtype == torch.int64
    assert stored["m"].shape == (7, 5) and stored["m"].dtype == dtype
    for rows in ([0], [6, 2, 2], list(range(7))):
        assert torch.equal(stored["m"].rows(rows), load_file(file)["m"][rows])


def altered(data: bytes, change: str) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if change == "cut off":
        return data[:-4]
    if change == "cut off in the header":
        return data[:20]
    if change == "longer":
        return data + b"abcd"
    if change == "empty":
        return b""
    if change == "a list":
        header = list(header)
    if change == "no offsets":
        del header["W_dec"]["data_offsets"]
    if change == "another shape":
        header["W_dec"]["shape"][0] += 1
    told = json.dumps(header).encode()
    return len(told).to_bytes(8, "little") + told + body


@pytest.mark.parametrize(
    "change", ["cut off", "cut off in the header", "longer", "empty", "a list", "no offsets", "another shape"]
)
def test_a_file_that_is_none_is_refused_before_anything_is_steered(sd, tmp_path, monkeypatch, change):
    random_sae().save_pretrained(tmp_path)
    (tmp_path / "checksums.json").unlink()
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    monkeypatch.setattr("diffusers_sae.loaders.LARGE", 0)
    bare = sd.run()
    file.write_bytes(altered(file.read_bytes(), change))
    with pytest.raises(InputError, match="cannot be read .* fetch it again"):
        sd.pipe.load_sae(tmp_path)
    assert not sd.pipe.get_list_saes() and torch.equal(sd.run(), bare)


def test_rows_that_are_not_finite_stop_the_call(sd, tmp_path, monkeypatch):
    sae = random_sae()
    with torch.no_grad():
        sae.W_dec[3, 0] = float("nan")
    sae.save_pretrained(tmp_path)
    monkeypatch.setattr("diffusers_sae.loaders.LARGE", 0)
    bare = sd.run()
    sd.pipe.load_sae(tmp_path)
    sd.pipe.steer({3: 1.0})
    with pytest.raises(InputError, match="weights that are not finite"):
        sd.run()
    sd.pipe.reset_steering()
    assert torch.equal(sd.run(), bare)


@pytest.mark.parametrize("place", [(0, 0), (-1, -1)])
def test_every_weight_is_looked_at(tmp_path, monkeypatch, place):
    monkeypatch.setattr("diffusers_sae.loaders.weights.AT_ONCE", 5)
    sae = random_sae()
    sae.save_pretrained(tmp_path / "good")
    assert torch.equal(load_sae(tmp_path / "good").W_enc, sae.W_enc)
    with torch.no_grad():
        sae.W_enc[place] = float("inf")
    sae.save_pretrained(tmp_path / "bad")
    with pytest.raises(InputError, match="weights that are not finite"):
        load_sae(tmp_path / "bad")
