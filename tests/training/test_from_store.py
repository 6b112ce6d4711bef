"""Training on a store: the same bits after a stop at any moment, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from conftest import SITE, Harness, Stop, file_limit
from kinds import KINDS

from diffusers_sae import InputError
from diffusers_sae.capture import StoreConfig, store_activations
from diffusers_sae.disk import hold_folder
from diffusers_sae.saes import ARCHITECTURES
from diffusers_sae.training import SAETrainer, TrainingConfig, train_on_store

CONFIG = TrainingConfig(steps=24, batch_size=128, lr=3e-3, dead_after=500, sparsity=0.3)
CALL = {"num_inference_steps": 3, "guidance_scale": 5.0, "height": 16, "width": 16}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    config = StoreConfig(images=6, batch_size=2, dtype="float32")
    return store_activations(Harness().pipe, [SITE], list("abcdef"), folder, config, **CALL)[SITE]


def trained(stored, folder, kind=("TopKSAE", {"k": 4}), config=CONFIG, latents=32, **kwargs):
    name, arguments = kind
    return train_on_store(
        stored, lambda d: ARCHITECTURES[name](d, latents, **arguments), folder, config,
        **{"checkpoint_every": 5, "log_every": 2, **kwargs},
    )  # fmt: skip


def logged(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [(kind, "adam") for kind in KINDS] + [(("BatchTopKSAE", {"k": 4}), "adafactor"), (KINDS[-1], "adafactor")],
    ids=str,
)
def test_a_run_that_is_stopped_ends_with_the_same_bits(stored, tmp_path, steps_left, kind, optimizer):
    config = replace(CONFIG, optimizer=optimizer)
    expected = trained(stored, tmp_path / "whole", kind, config).state_dict()
    log = logged(tmp_path / "whole")
    assert [entry["step"] for entry in log] == list(range(2, 25, 2)) and log[-1]["fvu"] < log[0]["fvu"]
    for moment in (4, 3, 9, 7):  # before the first checkpoint, and between others
        steps_left[:] = [moment]
        with pytest.raises(Stop):
            trained(stored, tmp_path / "stopped", kind, config)
    steps_left[:] = [0]
    found = trained(stored, tmp_path / "stopped", kind, config).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert logged(tmp_path / "stopped") == log


def test_a_stop_while_a_checkpoint_is_written_leaves_the_last_one(stored, tmp_path, monkeypatch):
    expected = trained(stored, tmp_path / "whole").state_dict()
    save, saved = torch.save, []

    def half(state, file):
        saved.append(file)
        if len(saved) == 3:
            file.write(b"half")
            raise Stop
        save(state, file)

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(Stop):
        trained(stored, tmp_path / "stopped")
    found = trained(stored, tmp_path / "stopped").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_run_that_is_done_gives_its_sae_again(stored, tmp_path):
    first, again = trained(stored, tmp_path), trained(stored, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_the_seed_decides_whatever_was_drawn_before(stored, tmp_path):
    torch.manual_seed(1)
    first = trained(stored, tmp_path / "a")
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    again, other = trained(stored, tmp_path / "b"), trained(stored, tmp_path / "c", seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.W_dec, again.W_dec) and not torch.equal(first.W_dec, other.W_dec)


@pytest.mark.parametrize(
    ("factor", "error", "sentence"),
    [
        (1e30, FloatingPointError, "The loss is nan at step 7; lower the rate"),
        (float("nan"), InputError, "The rows of step 7 hold numbers that are not finite; leave those out"),
        (0.0, InputError, "The rows of step 7 are all the same; an SAE needs rows that vary"),
    ],
)
def test_a_loss_that_is_not_finite_stops_with_the_last_good_state(
    stored, tmp_path, monkeypatch, factor, error, sentence
):
    step = SAETrainer.step

    def spoiled(self, rows):
        return step(self, rows * (factor if self.step_count == 7 else 1.0))

    monkeypatch.setattr(SAETrainer, "step", spoiled)
    with pytest.raises(error, match=sentence):
        trained(stored, tmp_path, ("BatchTopKSAE", {"k": 4}))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    state = state["trainer"]
    assert state["step_count"] == 7 and all(tensor.isfinite().all() for tensor in state["sae"].values())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": 1}, "run: seed is 0 in the checkpoint and 1 here; start has other contents; delete it to begin"),
        ({"config": replace(CONFIG, lr=1e-3)}, "run: training.lr is 0.003 in the checkpoint and 0.001 here; delete"),
        ({"config": replace(CONFIG, optimizer="adafactor")}, "optimizer is adam in the checkpoint and adafactor here"),
        ({"kind": ("TopKSAE", {"k": 9})}, "run: sae.k is 4 in the checkpoint and 9 here; delete it to begin anew"),
        ({"kind": ("ReLUSAE", {})}, "run: sae.class is TopKSAE in the checkpoint and ReLUSAE here"),
        ({"latents": 64}, "sae.n_latents is 32 in the checkpoint and 64 here"),
        ({"config": replace(CONFIG, batch_size=5000)}, "has 1152 rows, fewer than the 5000 of a step"),
    ],
)
def test_what_does_not_fit_is_refused(stored, tmp_path, change, sentence):
    trained(stored, tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(InputError, match=sentence):
        trained(stored, tmp_path, **change)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_other_rows_and_other_first_weights_are_refused(stored, tmp_path):
    trained(stored, tmp_path)
    with pytest.raises(InputError, match="run: store.rows is 1152 in the checkpoint and 768 here; store.count is 3 in"):
        trained(stored.part(stop=2), tmp_path)

    def other(d):
        sae = ARCHITECTURES["TopKSAE"](d, 32, 4)
        sae.b_enc.data[-1] = 1.0
        return sae

    with pytest.raises(InputError, match="run: start has other contents; delete it to begin anew"):
        train_on_store(stored, other, tmp_path, CONFIG)


def test_a_full_disk_stops_the_training_which_then_goes_on(stored, tmp_path, monkeypatch):
    expected = trained(stored, tmp_path / "whole").state_dict()
    save, calls = torch.save, []

    def full(state, file):
        calls.append(file)
        if len(calls) != 3:
            return save(state, file)
        with file_limit(3000):
            return save(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match=r"checkpoint.pt cannot be written \(File too large\); make room and run the"):
        trained(stored, tmp_path / "stopped")
    assert sorted(file.name for file in (tmp_path / "stopped").iterdir()) == ["checkpoint.pt", "log.jsonl"]
    found = trained(stored, tmp_path / "stopped").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert logged(tmp_path / "stopped") == logged(tmp_path / "whole")


def test_what_is_refused_leaves_no_folder_and_a_folder_in_use_is_left_alone(stored, tmp_path):
    with pytest.raises(InputError, match="takes its rows in order"):
        trained(stored, tmp_path / "sae", ("ChannelAwareSAE", {"channels": 4}))
    assert not (tmp_path / "sae").exists()
    with hold_folder(tmp_path / "sae"), pytest.raises(InputError, match="Another process is writing"):
        trained(stored, tmp_path / "sae")


def test_figures_go_to_a_tracker(stored, tmp_path):
    class Notes(GeneralTracker):
        name, requires_logging_directory = "notes", False

        def __init__(self):
            super().__init__()
            self.seen = []

        tracker = property(lambda self: self.seen)

        def log(self, values, step=None, **kwargs):
            self.seen.append((step, dict(values)))

    notes = Notes()
    accelerator = Accelerator(log_with=notes, cpu=True)
    accelerator.init_trackers("test")
    trained(stored, tmp_path, accelerator=accelerator)
    assert [step for step, _ in notes.seen] == list(range(1, 25))
    assert notes.seen[-1][1] == {name: value for name, value in logged(tmp_path)[-1].items() if name != "step"}
