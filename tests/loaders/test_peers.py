"""Files that other libraries write, read by us; and ours, read by them: with their real classes.

They are no dependencies: `make extras` makes an environment for them and runs these tests. saev is looked at, too,
where it is installed (`--no-deps saev==0.1.0`, since what it asks for pulls a torchvision of its own). `PEER_FORMATS`
names the file that the largest differences go to, such as `benchmarks/results/peer_formats.json`.
"""

import json
import os
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from kinds import of_kind

from diffusers_sae import InputError, load_sae
from diffusers_sae.loaders.formats import FORMATS

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from peers import stand_in_for_torchvision

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
pytestmark = pytest.mark.peers
REPORT = os.environ.get("PEER_FORMATS")
D, N, K = 24, 96, 12


@pytest.fixture(scope="module")
def report():
    found = {}
    yield found
    if REPORT and len({name.split()[0] for name in found} - {"saev"}) == 4:  # all libraries of peers.txt were there
        Path(REPORT).write_text(json.dumps(found, indent=1) + "\n")


def x():
    return 1.5 * torch.randn(200, D, generator=torch.Generator().manual_seed(0)) + 0.5


def randomize(module, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point() and "multiplier" not in name:
                tensor.copy_(0.4 * torch.randn(tensor.shape, generator=generator))
            if "threshold" in name and "thresholds" not in name:
                tensor.copy_(0.2 + tensor.abs())
    return module


def compare(report, library, name, ours, codes, x_hat):
    with torch.no_grad():
        z, mine = ours.encode(x()), ours(x())
    assert 0 < (codes != 0).float().mean() < 0.9
    difference = {
        "codes": float((z - codes).abs().max()),
        "reconstructions": float((mine - x_hat).abs().max()),
        "largest_code": float(codes.abs().max()),
    }
    report[f"{library} {version(library)} {name}"] = difference
    torch.testing.assert_close(z, codes.float(), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(mine, x_hat.float(), atol=5e-5, rtol=5e-5)


SAE_LENS = [
    ("standard", {}), ("standard", {"apply_b_dec_to_input": False}),
    ("standard", {"normalize_activations": "layer_norm"}),
    ("standard", {"normalize_activations": "constant_norm_rescale"}), ("gated", {}),
    ("gated", {"apply_b_dec_to_input": False}), ("topk", {"k": K}),
    ("topk", {"k": K, "rescale_acts_by_decoder_norm": True}), ("topk", {"k": K, "normalize_activations": "layer_norm"}),
    ("jumprelu", {}), ("jumprelu", {"apply_b_dec_to_input": False}),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "options"), SAE_LENS)
@torch.no_grad()
def test_sae_lens(architecture, options, tmp_path, report):
    lens = pytest.importorskip("sae_lens")
    cls, config = lens.registry.get_sae_class(architecture)
    sae = randomize(cls(config(d_in=D, d_sae=N, **options)))
    sae.save_model(tmp_path)
    codes = sae.encode(x())
    name = " ".join([architecture, *(f"{k}={v}" for k, v in options.items() if k != "k")])
    compare(report, "sae-lens", name, load_sae(tmp_path), codes, sae.decode(codes))


@torch.no_grad()
def test_sae_lens_batch_topk_becomes_jump_relu(tmp_path, report):
    lens = pytest.importorskip("sae_lens")
    cls, config = lens.registry.get_sae_training_class("batchtopk")
    sae = randomize(cls(config(d_in=D, d_sae=N, k=K)))
    sae.topk_threshold.fill_(0.5)
    sae.save_inference_model(tmp_path)
    theirs = lens.SAE.load_from_disk(tmp_path)
    codes = theirs.encode(x())
    compare(report, "sae-lens", "batchtopk, saved for inference", load_sae(tmp_path), codes, theirs.decode(codes))


@pytest.mark.parametrize(
    ("name", "options"), [("batchtopk", {}), ("matryoshka_batchtopk", {"matryoshka_widths": [24, N]})]
)
@torch.no_grad()
def test_a_training_of_sae_lens_is_read_as_what_it_saves_for_inference(name, options, tmp_path, report):
    lens = pytest.importorskip("sae_lens")
    cls, config = lens.registry.get_sae_training_class(name)
    sae = randomize(cls(config(d_in=D, d_sae=N, k=K, **options)))
    sae.topk_threshold.fill_(0.5)
    sae.save_model(tmp_path / "training")
    sae.save_inference_model(tmp_path / "inference")
    theirs = lens.SAE.load_from_disk(tmp_path / "inference")
    codes = theirs.encode(x())
    compare(report, "sae-lens", f"{name}, a training", load_sae(tmp_path / "training"), codes, theirs.decode(codes))


@pytest.mark.parametrize("name", ["transcoder", "skip_transcoder"])
@torch.no_grad()
def test_transcoders_of_sae_lens_are_refused(name, tmp_path):
    lens = pytest.importorskip("sae_lens")
    cls, config = lens.registry.get_sae_class(name)
    randomize(cls(config(d_in=D, d_sae=N, d_out=D, apply_b_dec_to_input=False))).save_model(tmp_path)
    with pytest.raises(InputError, match="W_skip|has the architecture 'transcoder'"):
        load_sae(tmp_path)


@torch.no_grad()
def test_saev(tmp_path, report):
    """The release on PyPI; later ones have another header."""
    lib, config = pytest.importorskip("saev.nn"), pytest.importorskip("saev.config")
    sae = randomize(lib.SparseAutoencoder(config.SparseAutoencoder(d_vit=D, exp_factor=N // D)))
    lib.dump(str(tmp_path / "sae.pt"), sae)
    x_hat, codes, _ = lib.load(str(tmp_path / "sae.pt"))(x())
    compare(report, "saev", "ReLU", load_sae(tmp_path), codes, x_hat)


@torch.no_grad()
def test_sparsify(tmp_path, report):
    sparsify = pytest.importorskip("sparsify")
    sae = randomize(sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=N, k=K)))
    sae.save_to_disk(tmp_path)
    values, indices, _ = sae.encode(x())
    codes = torch.zeros(len(x()), N).scatter(-1, indices, values)
    compare(report, "eai-sparsify", "topk", load_sae(tmp_path), codes, sae.decode(values, indices))


@torch.no_grad()
def test_transcoders_of_sparsify_are_refused(tmp_path):
    sparsify = pytest.importorskip("sparsify")
    for name in ("skip_connection", "transcode"):
        sae = randomize(sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=N, k=K, **{name: True})))
        sae.save_to_disk(tmp_path / name)
        with pytest.raises(InputError, match="is a transcoder"):
            load_sae(tmp_path / name)


DICTIONARY_LEARNING = {
    "AutoEncoder": lambda lib: lib.dictionary.AutoEncoder(D, N),
    "AutoEncoderNew": lambda lib: lib.dictionary.AutoEncoderNew(D, N),
    "GatedAutoEncoder": lambda lib: lib.dictionary.GatedAutoEncoder(D, N),
    "JumpReluAutoEncoder": lambda lib: lib.dictionary.JumpReluAutoEncoder(D, N),
    "AutoEncoderTopK": lambda lib: lib.trainers.top_k.AutoEncoderTopK(D, N, K),
    "BatchTopKSAE": lambda lib: lib.trainers.batch_top_k.BatchTopKSAE(D, N, K),
    "MatryoshkaBatchTopKSAE": lambda lib: lib.trainers.matryoshka_batch_top_k.MatryoshkaBatchTopKSAE(
        D, N, K, [N // 4, N // 4, N // 2]
    ),
}


@pytest.mark.parametrize("name", DICTIONARY_LEARNING)
@torch.no_grad()
def test_dictionary_learning(name, tmp_path, report):
    lib = pytest.importorskip("dictionary_learning")
    for part in ("utils", "trainers.top_k", "trainers.batch_top_k", "trainers.matryoshka_batch_top_k"):
        import_module(f"dictionary_learning.{part}")
    sae = randomize(DICTIONARY_LEARNING[name](lib))
    torch.save(sae.state_dict(), tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": name, "k": K}, "buffer": {}}))
    theirs, _ = lib.utils.load_dictionary(str(tmp_path), "cpu")
    codes = theirs.encode(x())
    compare(report, "dictionary-learning", name, load_sae(tmp_path), codes, theirs.decode(codes))


@pytest.fixture
def overcomplete_lib():
    stand_in_for_torchvision()
    return pytest.importorskip("overcomplete")


@pytest.mark.parametrize("name", ["TopKSAE", "JumpSAE"])
@torch.no_grad()
def test_overcomplete(name, tmp_path, report, overcomplete_lib):
    import overcomplete.sae as lib

    sae = randomize(getattr(lib, name)(D, N, **({"top_k": K} if name == "TopKSAE" else {})))
    sae.dictionary.multiplier.fill_(0.3)
    sae.eval()
    torch.save(sae.state_dict(), tmp_path / "model.pt")
    codes = sae.encode(x())[1]
    ours = load_sae(tmp_path, config={"k": K})
    compare(report, "overcomplete", name, ours, codes, sae.decode(codes))
    torch.save(sae, tmp_path / "model.pt")
    with pytest.raises(InputError, match="is a pickle that could run code"):
        load_sae(tmp_path, config={"k": K})


EXPORTS = [
    ("sparsify", "TopKSAE", {"k": K}), ("sae_lens", "TopKSAE", {"k": K}), ("sae_lens", "ReLUSAE", {}),
    ("sae_lens", "ReLUSAE", {"tied": True}), ("sae_lens", "JumpReLUSAE", {}), ("sae_lens", "GatedSAE", {}),
    ("sae_lens", "BatchTopKSAE", {"k": K}), ("sae_lens", "MatryoshkaSAE", {"k": K}),
    ("sae_lens", "TopKSAE", {"k": K, "input_norm": "layer_norm"}),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "kind", "arguments"), EXPORTS)
@torch.no_grad()
def test_their_loaders_read_ours(layout, kind, arguments, tmp_path, report):
    lib = pytest.importorskip(layout)
    ours = of_kind(kind, arguments, D, N)
    FORMATS[layout].write(ours, tmp_path)
    if layout == "sparsify":
        theirs = lib.SparseCoder.load_from_disk(tmp_path)
        values, indices, _ = theirs.encode(x())
        codes, x_hat = torch.zeros(len(x()), N).scatter(-1, indices, values), theirs.decode(values, indices)
    else:
        theirs = lib.SAE.load_from_disk(tmp_path)
        codes = theirs.encode(x())
        x_hat = theirs.decode(codes)
    library = {"sparsify": "eai-sparsify", "sae_lens": "sae-lens"}[layout]
    compare(report, library, f"reads our {kind} {arguments or ''}".strip(), ours, codes, x_hat)
