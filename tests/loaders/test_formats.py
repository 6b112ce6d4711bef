"""Other people's files: codes and reconstructions as their authors' code makes them, or a sentence why not."""

import json

import numpy as np
import pytest
import torch
from conftest import SITE, WIDTH
from layouts import LAYOUTS, D, K, N, random, rows, sae_lens, saev, sdxl_unbox, sparsify, write
from safetensors.torch import save_file

from diffusers_sae import InputError, load_sae
from diffusers_sae.loaders.formats import FORMATS, format_of
from diffusers_sae.loaders.reading import is_weights, read_config, read_file
from diffusers_sae.loaders.weights import Weights


@pytest.mark.parametrize("name", LAYOUTS)
def test_codes_and_reconstructions_are_the_authors(name, tmp_path):
    arguments, rule = LAYOUTS[name](tmp_path / "sae", random())
    x = rows()
    z, x_hat = rule(x.double().numpy())
    positive = (z > 0).sum(-1)
    assert positive.min() < K and (z != 0).any()  # where the orders of ReLU and TopK could differ
    sae = load_sae(tmp_path / "sae", **arguments)
    assert (sae.n_latents, sae.d_in) == (N, D)
    with torch.no_grad():
        np.testing.assert_allclose(sae.encode(x), z, atol=1e-5)
        np.testing.assert_allclose(sae(x), x_hat, atol=2e-5)
        np.testing.assert_allclose(sae.encode(x[5:6]), z[5:6], atol=1e-5)  # a row alone
        np.testing.assert_allclose(sae.encode_only(x, torch.tensor([3, 0])), z[:, [3, 0]], atol=1e-5)
    assert sae.provenance["sha256"] and sae.provenance["file"]


@pytest.mark.parametrize("config", [{}, {"threshold": 1.0}])
def test_a_latent_that_reaches_its_threshold_is_active_in_overcomplete(config, tmp_path):
    unit = torch.eye(D)
    state = {
        "encoder.final_block.0.weight": unit,
        "encoder.final_block.0.bias": torch.zeros(D),
        "dictionary._weights": unit,
    }
    write(tmp_path, {**state, **({} if config else {"thresholds": torch.zeros(D)})}, config, "model.pt")
    sae = load_sae(tmp_path)
    assert torch.equal(sae.encode(unit), unit) and not sae.encode(unit * 0.999).any()


def test_every_format_has_a_file_that_it_reads(tmp_path):
    read = set()
    for name, layout in LAYOUTS.items():
        arguments, _ = layout(tmp_path / name, random())
        tensors, beside = read_file(next(p for p in (tmp_path / name).iterdir() if is_weights(p)))
        config = {**beside, **read_config(tmp_path / name), **arguments.get("config", {})}
        read.add(format_of(Weights(tensors, config, name)).name)
    assert read == set(FORMATS) - {"diffusers_sae"}


@pytest.mark.parametrize("name", [n for n in LAYOUTS if n != "stylegan" and not n.startswith("saev")])
def test_matrices_that_lie_the_other_way_are_turned(name, tmp_path):
    """Biases tell how many latents there are, so that n x d and d x n cannot be mistaken."""
    arguments, rule = LAYOUTS[name](tmp_path, random())
    (file,) = [p for p in tmp_path.iterdir() if p.suffix in (".safetensors", ".pt", ".pth")]
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        save_file({k: v.T.contiguous() if v.ndim == 2 else v for k, v in load_file(file).items()}, file)
    else:
        state = torch.load(file, weights_only=True)
        inner = state.get("state_dict", state)
        torch.save({k: v.T if torch.is_tensor(v) and v.ndim == 2 else v for k, v in inner.items()}, file)
    z, _ = rule(rows().double().numpy())
    np.testing.assert_allclose(load_sae(tmp_path, **arguments).encode(rows()).detach(), z, atol=1e-5)


def test_statistics_of_sdxl_unbox(tmp_path, sd):
    sdxl_unbox(tmp_path, random())
    mean = torch.arange(1.0, N + 1)
    torch.save(mean, tmp_path / "mean.pt")
    state = torch.load(tmp_path / "state_dict.pth", weights_only=True)
    state["state_dict"]["stats_last_nonzero"][4] = 99_999
    torch.save(state, tmp_path / "state_dict.pth")
    sae = load_sae(tmp_path)
    torch.testing.assert_close(sae.statistics.at(500).scale("mean")[3], torch.tensor(4.0))
    assert sae.statistics.dead.nonzero().flatten().tolist() == [4]


def test_units_that_statistics_do_not_tell_are_refused(tmp_path, sd, monkeypatch):
    monkeypatch.setattr("layouts.D", WIDTH)
    sdxl_unbox(tmp_path, random())
    torch.save(torch.ones(N), tmp_path / "mean.pt")
    sd.pipe.load_sae(tmp_path, site=SITE)
    sd.pipe.steer({3: 1.0}, unit="mean")
    with pytest.raises(InputError, match="do not tell the max of latent 3; use another unit"):
        sd.pipe.steer({3: 1.0}, unit="max")


REFUSED = {
    "a transcoder": (lambda f: sparsify(f, random(), transcode=True), {}, "is a transcoder"),
    "groupmax": (lambda f: sparsify(f, random(), activation="groupmax"), {}, "has the activation 'groupmax'"),
    "another width": (lambda f: sparsify(f, random(), d_in=7), {}, "comes with d_in = 7, and its tensors have 6"),
    "no k": (lambda f: sdxl_unbox(f, random(), k=None), {}, "does not say k; pass config={'k': ...}"),
    "k as text": (lambda f: sdxl_unbox(f, random(), k="9"), {}, "comes with k = '9'; it must be a whole number"),
    "k too large": (lambda f: sdxl_unbox(f, random(), k=21), {}, "k is 21, which must lie between 1 and n_latents"),
    "abstopk": (lambda f: sae_lens(f, random(), "abstopk", k=3), {}, "has the architecture 'abstopk'"),
    "whitening": (
        lambda f: sae_lens(f, random(), normalize_activations="covariance_whitening"), {}, "for which its files lack",
    ),
    "abs": (lambda f: saev(f, random(), "AbsBatchTopK"), {}, "has the activation 'AbsBatchTopK'"),
    "no class": (
        lambda f: write(f, {"encoder.weight": random().W, "encoder.bias": random().b, "decoder.weight": random().V.T,
                            "b_dec": random().p, "k": torch.tensor(9), "threshold": torch.tensor(-1.0)}, None, "ae.pt"),
        {}, "does not tell its class; pass config={'dict_class': ...}",
    ),
    "never set": (
        lambda f: write(f, {"encoder.weight": random().W, "encoder.bias": random().b, "decoder.weight": random().V.T,
                            "b_dec": random().p, "k": torch.tensor(9), "threshold": torch.tensor(-1.0)}, None, "ae.pt"),
        {"config": {"dict_class": "BatchTopKSAE"}}, "was never set; pass config={'threshold': ...}",
    ),
    "a bare sdxl-unbox dict": (
        lambda f: write(f, {"encoder.weight": random().W, "decoder.weight": random().V.T, "pre_bias": random().p,
                            "latent_bias": random().b}), {}, "does not say k",
    ),
    "an unknown layout": (lambda f: write(f, {"a": torch.zeros(3)}), {}, "is of no known layout (tensors a)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_with_the_reason(case, tmp_path):
    make, arguments, sentence = REFUSED[case]
    make(tmp_path)
    with pytest.raises(InputError) as error:
        load_sae(tmp_path, **arguments)
    assert sentence in str(error.value) and str(error.value).endswith(".")


def cache(folder, repository, subfolder, make):
    """A cache of the hub as huggingface_hub lays it out, with one repository in it."""
    root = folder / f"models--{repository.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    make(root / "snapshots" / commit / subfolder)
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    return {"cache_dir": str(folder), "local_files_only": True}


KNOWN = [
    ("surokpro2/sdxl-saes", "unet.up_blocks.0.attentions.1_k10_hidden5120_auxk256_bs4096_lr0.0001/final", "style",
     {"path": "unet.up_blocks.0.attentions.1", "kind": "update"}, sdxl_unbox),
    ("surokpro2/sdxl-saes", "unet.mid_block.attentions.0_k10_hidden5120_auxk256_bs4096_lr0.0001/final", "middle",
     {"path": "unet.mid_block.attentions.0", "kind": "update"}, sdxl_unbox),
    ("antoniomari/SAE_flux_18", "", None, {"path": "transformer.transformer_blocks.18", "kind": "update"}, sdxl_unbox),
    ("bcywinski/SAeUron", "unet.up_blocks.1.attentions.2", "styles",
     {"path": "unet.up_blocks.1.attentions.2", "kind": "output"}, sparsify),
    ("bcywinski/SAeUron_coco", "unet.up_blocks.1.attentions.1", "unet.up_blocks.1.attentions.1",
     {"path": "unet.up_blocks.1.attentions.1", "kind": "output"}, sparsify),
    ("leno3003/SAEmnesia", "", None, {"path": "unet.up_blocks.1.attentions.1", "kind": "output"}, sparsify),
    ("RE-N-Y/cc3m-transformer_blocks.18-0", "", None,
     {"path": "transformer.transformer_blocks.18", "kind": "output", "stream": "text"}, LAYOUTS["re_n_y"]),
    ("RE-N-Y/cc3m-single_transformer_blocks.37", "", None,
     {"path": "transformer.single_transformer_blocks.37", "kind": "output", "stream": "image"}, LAYOUTS["re_n_y"]),
    ("gytdau/clip-sae-128", "", None, {"path": "image_embeds", "kind": "output"}, LAYOUTS["daujotas"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("repository", "folder", "asked", "site", "make"), KNOWN, ids=[each[0] + each[1] for each in KNOWN]
)
def test_known_repositories_tell_their_site(repository, folder, asked, site, make, tmp_path):
    hub = cache(tmp_path, repository, folder, lambda place: make(place, random()))
    sae = load_sae(repository, subfolder=asked, **hub)
    assert sae.provenance["site"] == site and sae.provenance["repository"] == repository
    assert sae.provenance["revision"].startswith("0123") and sae.provenance["subfolder"] == folder


def test_nicknames_are_told(tmp_path):
    hub = cache(tmp_path, "surokpro2/sdxl-saes", "x", lambda place: sdxl_unbox(place, random()))
    with pytest.raises(InputError, match="pass subfolder, one of composition, middle, details, style"):
        load_sae("surokpro2/sdxl-saes", **hub)


def test_an_unknown_repository_needs_a_site(tmp_path, sd):
    hub = cache(tmp_path, "somebody/saes", "up1", lambda place: sparsify(place, random()))
    with pytest.raises(InputError, match=r"does not say which site it is for; pass site='unet"):
        sd.pipe.load_sae("somebody/saes", subfolder="up1", **hub)


def test_variants(tmp_path):
    sparsify(tmp_path, random())
    (tmp_path / "sae.safetensors").rename(tmp_path / "sae.fp16.safetensors")
    assert load_sae(tmp_path, variant="fp16").n_latents == N
    with pytest.raises(InputError, match="holds no weights of variant 'bf16'; it holds sae.fp16.safetensors"):
        load_sae(tmp_path, variant="bf16")


def test_a_large_file_in_the_layout_of_sparsify_stays_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_sae.loaders.LARGE", 0)
    _, rule = sparsify(tmp_path, random())
    sae = load_sae(tmp_path)
    assert sae.W_dec.is_meta
    torch.testing.assert_close(sae.decoder_rows([3, 1]), random().V[[3, 1]])
    sae.fetch()
    np.testing.assert_allclose(sae.encode(rows()), rule(rows().double().numpy())[0], atol=1e-5)


def test_a_config_in_the_file_and_beside_it(tmp_path):
    sparsify(tmp_path, random())
    told = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**told, "k": 3}))
    assert load_sae(tmp_path).k == 3 and load_sae(tmp_path, config={"k": 3}).k == 3
