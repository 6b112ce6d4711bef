"""What is written in any layout is read again exactly; cards, labels, and pickles that are converted, not run."""

import json

import pytest
import torch
from kinds import KINDS, READ_ONLY, of_kind
from layouts import LAYOUTS, D, N, random, rows
from typer.testing import CliRunner

from diffusers_sae import InputError, LatentStatistics, load_sae
from diffusers_sae.cli.app import app
from diffusers_sae.loaders.formats import FORMATS

WRITERS = [name for name, layout in FORMATS.items() if layout.write is not None]
REFUSED = {"sparsify": "sparsify holds TopK SAEs of plain rows", "sae_lens": "SAELens has nothing that codes as this"}


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def is_known(layout, kind, arguments):
    """Whether a layout has what codes as an SAE does."""
    plain = arguments.get("relu", True)
    if layout == "sparsify":
        return kind == "TopKSAE" and plain and "input_norm" not in arguments
    return layout != "sae_lens" or plain


@pytest.mark.parametrize("layout", WRITERS)
@pytest.mark.parametrize("kind", [*KINDS, *READ_ONLY], ids=lambda kind: f"{kind[0]} {kind[1]}")
def test_round_trips_are_exact(layout, kind, tmp_path):
    sae = of_kind(*kind)
    if not is_known(layout, *kind):
        with pytest.raises(InputError, match=REFUSED[layout]):
            FORMATS[layout].write(sae, tmp_path)
        assert not list(tmp_path.iterdir())
        return
    FORMATS[layout].write(sae, tmp_path)
    again = load_sae(tmp_path)
    assert type(again) is type(sae)
    assert set(again.state_dict()) == set(sae.state_dict())
    assert all(torch.equal(tensor, sae.state_dict()[name]) for name, tensor in again.state_dict().items())
    x = torch.randn(20, 8)
    assert torch.equal(again.encode(x), sae.encode(x)) and torch.equal(again(x), sae(x))
    if layout != "sparsify":
        assert again.provenance["site"] == sae.provenance["site"]
        assert {k: v for k, v in again.config.items() if k in kind[1]} == kind[1]


@pytest.mark.parametrize("to", WRITERS)
def test_the_command_converts_between_layouts(to, tmp_path):
    LAYOUTS["sdxl_unbox"](tmp_path / "theirs", random())
    done = run("convert", tmp_path / "theirs", tmp_path / "ours", "--to", to, "--site", "unet.mid_block.attentions.0",
               "--kind", "update", "--base-model", "some/model")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert torch.equal(load_sae(tmp_path / "ours").encode(rows()), load_sae(tmp_path / "theirs").encode(rows()))
    if to != "sparsify":
        told = load_sae(tmp_path / "ours").provenance
        assert told["site"]["kind"] == "update" and told["base_model"] == "some/model" and told["sha256"]


def test_the_command_tells_what_is_wrong(tmp_path):
    LAYOUTS["sparsify"](tmp_path / "theirs", random())
    for arguments, sentence in (
        (("convert", tmp_path / "theirs", tmp_path / "theirs"), "is there already; choose a new folder"),
        (("convert", tmp_path / "theirs", tmp_path / "b", "--to", "openai"), "'openai' cannot be written; choose one"),
        (("convert", tmp_path / "theirs", tmp_path / "b", "--set", "k"), "--set k is not a setting"),
        (("convert", tmp_path / "theirs", tmp_path / "b", "--set", "k=99"), "says k = 9, and k = 99 was passed"),
    ):
        done = run(*arguments)
        assert done.exit_code != 0 and sentence in str(done.exception) and not (tmp_path / "b").exists()


class Config:
    """As Revelio's files hold: an object of a class that readers don't have."""

    def __init__(self):
        self.k, self.expansion_factor = 9, 4


class Module(torch.nn.Module):
    """As overcomplete's files hold: a whole module."""

    def __init__(self, g):
        super().__init__()
        self.encoder = torch.nn.Module()
        self.encoder.final_block = torch.nn.Sequential(torch.nn.Linear(D, N), torch.nn.Identity())
        self.dictionary = torch.nn.Module()
        self.dictionary._weights = torch.nn.Parameter(g.V)
        self.dictionary.register_buffer("multiplier", torch.tensor(0.3))
        self.encoder.final_block[0].weight.data, self.encoder.final_block[0].bias.data = g.W, g.b
        self.top_k = 9


def test_a_pickled_config_is_converted(tmp_path):
    g = random()
    state = {"W_enc": g.W.T, "b_enc": g.b, "W_dec": g.V, "b_dec": g.p}
    torch.save({"cfg": Config(), "state_dict": state}, tmp_path / "sae.pt")
    with pytest.raises(InputError, match="is a pickle that could run code.*diffusers-sae convert sae.pt FOLDER"):
        load_sae(tmp_path / "sae.pt", config={"format": "revelio"})
    done = run("convert", tmp_path / "sae.pt", tmp_path / "out", "--set", "format=revelio")
    assert done.exit_code == 0, done.output
    _, rule = LAYOUTS["revelio"](tmp_path / "plain", g)
    z, _ = rule(rows().double().numpy())
    torch.testing.assert_close(load_sae(tmp_path / "out").encode(rows()).double(), torch.tensor(z), atol=1e-5, rtol=0)


def test_a_pickled_module_is_converted(tmp_path):
    g = random()
    torch.save(Module(g), tmp_path / "model.pt")
    with pytest.raises(InputError, match="is a pickle that could run code"):
        load_sae(tmp_path / "model.pt")
    assert run("convert", tmp_path / "model.pt", tmp_path / "out").exit_code == 0
    _, rule = LAYOUTS["overcomplete_topk"](tmp_path / "plain", g)
    z, _ = rule(rows().double().numpy())
    torch.testing.assert_close(load_sae(tmp_path / "out").encode(rows()).double(), torch.tensor(z), atol=1e-5, rtol=0)


def test_statistics_labels_and_a_card(tmp_path):
    sae = of_kind("TopKSAE", {"k": 4})
    sae.register_to_config(provenance={**sae.provenance, "base_model": "some/model", "num_inference_steps": 20})
    sae.statistics = LatentStatistics(torch.tensor([9.0]), *(torch.rand(1, 32) for _ in range(3)))
    sae.labels = {3: "panda", 7: "ink"}
    sae.save_pretrained(tmp_path, figures={"fvu": 0.0814, "fvu_by_timestep": {"9": 0.1}})
    again = load_sae(tmp_path)
    assert again.labels == {3: "panda", 7: "ink"} and torch.equal(again.statistics.mean, sae.statistics.mean)
    card = (tmp_path / "README.md").read_text()
    for told in (
        "base_model: some/model", "# TopKSAE of unet.up_blocks.1.attentions.1", "| k | 4 |", "| fvu | 0.0814 |",
        "| num inference steps | 20 |", "3 panda, 7 ink", 'unit="mean"',
    ):  # fmt: skip
        assert told in card
    (tmp_path / "README.md").write_text("mine")
    again.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine" and load_sae(tmp_path).labels == sae.labels


@pytest.mark.parametrize("labels", [{"99": "panda"}, {"x": "panda"}, {"3": 4}, []])
def test_labels_of_no_feature_are_refused(labels, tmp_path):
    of_kind("TopKSAE", {"k": 4}).save_pretrained(tmp_path)
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    with pytest.raises(InputError, match=r"labels.json (must be an object|holds a list)"):
        load_sae(tmp_path)
    sae = of_kind("TopKSAE", {"k": 4})
    sae.labels = {99: "panda"}
    with pytest.raises(InputError, match="Feature 99 is out of range"):
        sae.save_pretrained(tmp_path)
