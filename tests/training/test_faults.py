"""Processes that die, and several that work together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SITE, Harness
from safetensors.torch import load_file

from diffusers_sae.capture import StoreConfig, store_activations


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_killed_processes_end_as_undisturbed_ones(tmp_path, precision):
    script = Path(__file__).with_name("kill_nine.py")
    found = subprocess.run(
        [sys.executable, script, tmp_path, "4", precision], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0 and found.stdout.count("all the same") == 3, found.stdout + found.stderr[-2000:]


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_two_processes_make_the_steps_of_one(tmp_path, kind):
    call = {"num_inference_steps": 3, "guidance_scale": 5.0, "height": 16, "width": 16}
    store = store_activations(Harness().pipe, [SITE], list("abcdefgh"), tmp_path / "store", StoreConfig(8, 2), **call)
    command = [
        "-m", "diffusers_sae.cli", "train", str(store[SITE].folder), "--latents", "64", "--k", "2", "--kind", kind,
        "--rows", "128", "--steps", "60", "--dead-after", "128", "--lr", "0.004", "--precision", "float32", "--out",
    ]  # fmt: skip
    # as the README says; accelerate launch starts processes on CPUs through MPI alone
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name, before in (("one", []), ("two", ["-m", *launch])):
        done = subprocess.run(
            [sys.executable, *before, *command, str(tmp_path / name)],
            capture_output=True, text=True, env=environment, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("rows held out") == 1
        record = json.loads((tmp_path / name / "training" / "run.json").read_text())
        assert record["processes"] == {"one": 1, "two": 2}[name]
    one, two = (
        [json.loads(line) for line in (tmp_path / n / "training" / "log.jsonl").read_text().splitlines()]
        for n in ("one", "two")
    )
    assert [a["step"] for a in one] == [b["step"] for b in two] and one[-1]["fvu"] < 0.9 * one[0]["fvu"]
    for a, b in zip(one, two, strict=True):
        assert b["fvu"] == pytest.approx(a["fvu"], rel=1e-3) and b["dead"] == pytest.approx(a["dead"])
        assert b["aux"] == pytest.approx(a["aux"], rel=1e-3) and (a["aux"] > 0 or kind == "jumprelu")
    odd = [argument if argument != "128" else "127" for argument in command]
    refused = subprocess.run(
        [sys.executable, "-m", *launch, *odd, str(tmp_path / "odd")],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert refused.returncode != 0 and not (tmp_path / "odd").exists()
    assert refused.stderr.count("batch_size=127 cannot be shared by 2 processes; make it (--rows) a multiple") == 1
    weights = [load_file(next((tmp_path / n).glob("*.safetensors"))) for n in ("one", "two")]
    torch.testing.assert_close(weights[0]["W_dec"], weights[1]["W_dec"], atol=2e-3, rtol=0)
