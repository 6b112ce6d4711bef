"""Checkpoints on disk: whatever happens to the file, it is read as it was written or refused in a sentence."""

import random
import zipfile

import numpy as np
import pytest
import torch
from conftest import file_limit

from diffusers_sae import InputError, TopKSAE
from diffusers_sae.capture.descriptions import describe
from diffusers_sae.training import SAETrainer, TrainingConfig
from diffusers_sae.training.checkpoints import check_run, read_checkpoint, write_checkpoint

REFUSED = "cannot be read as a checkpoint; delete it to begin anew"


@pytest.fixture
def state():
    trainer = SAETrainer(TopKSAE(8, 32, 4), TrainingConfig(steps=5), torch.randn(50, 8))
    trainer.step(torch.randn(50, 8))
    return {"run": {"seed": 0}, "trainer": trainer.state_dict()}


def test_what_is_written_is_read(tmp_path, state):
    assert read_checkpoint(tmp_path / "checkpoint.pt") is None
    write_checkpoint(tmp_path / "checkpoint.pt", state)
    assert describe(read_checkpoint(tmp_path / "checkpoint.pt")) == describe(state)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_any_change_of_its_bytes_is_noticed_or_changes_nothing(tmp_path, state):
    path, rng = tmp_path / "checkpoint.pt", random.Random(0)
    write_checkpoint(path, state)
    whole, refused, expected = path.read_bytes(), 0, describe(read_checkpoint(path))
    for i in range(300):
        damaged = bytearray(whole)
        at = rng.randrange(len(whole))
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            found = read_checkpoint(path)
        except InputError:
            refused += 1
            continue
        assert describe(found) == expected, i
    assert refused > 100  # the rest lies in padding between the tensors


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(tmp_path, state, share):
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, state)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(InputError, match=REFUSED):
        read_checkpoint(path)


def foreign(path, kind):
    if kind == "text":
        path.write_text("no checkpoint")
    if kind == "zeros":
        path.write_bytes(bytes(5000))
    if kind == "random":
        path.write_bytes(random.Random(1).randbytes(5000))
    if kind == "pickle":
        path.write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % str(path.with_name("never")).encode())
    if kind == "pickle in a zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'touch %s'\ntR." % bytes(path.with_name("never")))
            archive.writestr("archive/version", "3")
    if kind == "arrays":
        with path.open("wb") as file:
            np.savez(file, a=np.zeros(3))
    if kind == "tensor":
        torch.save(torch.zeros(3), path)
    if kind == "module":
        torch.save(torch.nn.Linear(2, 2), path)
    if kind == "older torch":
        torch.save({"trainer": 1}, path, _use_new_zipfile_serialization=False)
    if kind == "folder":
        path.mkdir()


@pytest.mark.parametrize(
    "kind",
    ["text", "zeros", "random", "pickle", "pickle in a zip", "arrays", "tensor", "module", "older torch", "folder"],
)
def test_a_foreign_file_is_refused_and_no_code_of_it_runs(tmp_path, kind):
    foreign(tmp_path / "checkpoint.pt", kind)
    with pytest.raises(InputError, match=REFUSED):
        read_checkpoint(tmp_path / "checkpoint.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({"weight": torch.zeros(2)}, "checkpoint.pt has no trainer, so it is no checkpoint of this; delete it"),
        ({"trainer": {}, "seed": 0}, "checkpoint.pt was written by an older version of diffusers_sae, without what"),
        ({"trainer": {}, "run": {"seed": 1}}, "checkpoint.pt is of another run: seed is 1 in the checkpoint and 0"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(tmp_path, state, sentence):
    with pytest.raises(InputError, match=sentence):
        check_run(state, {"seed": 0}, tmp_path / "checkpoint.pt", ("trainer",))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, state):
    path = tmp_path / "checkpoint.pt"
    write_checkpoint(path, {"a": 1})
    with file_limit(2000), pytest.raises(InputError, match=r"checkpoint.pt cannot be written \(File too large\); make"):
        write_checkpoint(path, state)
    assert read_checkpoint(path) == {"a": 1} and [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]
