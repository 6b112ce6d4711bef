"""The site `image_embeds` of Kandinsky 2.2, and the same edits on embeddings in hand."""

import copy

import numpy as np
import pytest
import torch
from conftest import Harness, random_sae
from kinds import READ_ONLY, of_kind
from reference import codes, edited

from diffusers_sae import InputError, Rule, Site, load_sae
from diffusers_sae.adapters.image_embeds import transferred, turned

WIDTH = 32
MODES = ["add", "set", "scale", "cap", "ablate"]


@pytest.fixture(params=["Kandinsky 2.2", "Kandinsky 2.2 img2img", "Kandinsky 2.2 combined"])
def kandinsky(request):
    return Harness(request.param)


@pytest.fixture
def sae():
    torch.manual_seed(1)
    return random_sae(WIDTH, 64, 8, site={"path": "image_embeds"})


def embeds_of(harness, **call):
    with harness.pipe.capture(["image_embeds"]) as activations:
        images = harness.run(**call)
    return activations["image_embeds"], images


@pytest.mark.parametrize("mode", MODES)
def test_edits_follow_the_formula_on_the_branch_they_name(kandinsky, sae, mode):
    before, bare = embeds_of(kandinsky)
    assert before.rows("cond").shape[1:] == (1, WIDTH)
    kandinsky.pipe.load_sae(sae)
    same, images = embeds_of(kandinsky)
    assert torch.equal(bare, images) and torch.equal(before.tensor, same.tensor)
    x = before.rows("cond")[0]
    features = [int(j) for j in codes(sae, x).mean((0, 1) if x.ndim == 3 else 0).argsort()[-3:]]
    kandinsky.pipe.steer(dict.fromkeys(features, 0.4), mode=mode)
    after, images = embeds_of(kandinsky)
    expected = edited(sae, x[None], features, np.full((1, 3), 0.4), mode)
    np.testing.assert_allclose(after.rows("cond")[0][None], expected, atol=1e-5)
    assert torch.equal(after.rows("uncond"), before.rows("uncond")) and not torch.equal(images, bare)
    torch.testing.assert_close(turned(sae, x, dict.fromkeys(features, 0.4), mode), after.rows("cond")[0])
    kandinsky.pipe.unload_sae()
    assert torch.equal(kandinsky.run(), bare) and not kandinsky.pipe.unet._forward_pre_hooks


def test_passing_turned_embeddings_gives_the_steered_image(sae):
    harness = Harness("Kandinsky 2.2")
    from tiny import EMBEDDED

    harness.pipe.load_sae(sae)
    harness.pipe.steer({3: 5.0})
    steered = harness.run()
    harness.pipe.reset_steering()
    own = EMBEDDED["Kandinsky 2.2"](1)
    arguments = {**harness.tiny.arguments, **own, "image_embeds": turned(sae, own["image_embeds"], {3: 5.0})}
    images = harness.pipe(
        num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="pt", **arguments
    ).images
    torch.testing.assert_close(images, steered, atol=1e-5, rtol=0)


def test_windows_rules_recipes_and_units_work_as_elsewhere(kandinsky, sae, tmp_path):
    before, bare = embeds_of(kandinsky)
    kandinsky.pipe.load_sae(sae, adapter_name="clip")
    kandinsky.pipe.steer({3: 5.0}, stop=0.5)
    after, _ = embeds_of(kandinsky)
    moved = [not torch.equal(a, b) for a, b in zip(before.rows("cond"), after.rows("cond"), strict=True)]
    assert moved[0] and not moved[-1] and moved == sorted(moved, reverse=True)
    kandinsky.pipe.save_recipe(tmp_path / "r.json")
    steered = kandinsky.run()
    kandinsky.pipe.reset_steering()
    kandinsky.pipe.load_recipe(tmp_path / "r.json")
    assert torch.equal(kandinsky.run(), steered)
    kandinsky.pipe.reset_steering()
    kandinsky.pipe.steer({3: 5.0}, when=Rule({7: 1.0}, above=1e6))
    assert torch.equal(kandinsky.run(), bare)


def test_a_copy_of_the_unet_is_not_steered(kandinsky, sae):
    kandinsky.pipe.load_sae(sae)
    kandinsky.pipe.steer({3: 5.0})
    steered = kandinsky.run()
    twin = copy.deepcopy(kandinsky.pipe.unet)
    hooks = list(twin._forward_pre_hooks.values())
    assert all(hook(twin, (), {}) is None for hook in hooks)
    assert torch.equal(kandinsky.run(), steered)


def test_beside_an_sae_of_a_block(kandinsky, sae):
    block = kandinsky.sae()
    kandinsky.pipe.load_sae(block, adapter_name="block")
    kandinsky.pipe.steer({1: 3.0}, adapter_name="block")
    alone = kandinsky.run()
    kandinsky.pipe.load_sae(sae, adapter_name="embeds")
    kandinsky.pipe.steer({3: 5.0}, adapter_name="embeds")
    both = kandinsky.run()
    kandinsky.pipe.delete_saes("embeds")
    assert torch.equal(kandinsky.run(), alone) and not torch.equal(both, alone)


def test_what_makes_no_sense_is_refused(kandinsky, sd, sae):
    kandinsky.pipe.load_sae(sae)
    for arguments, sentence in (
        ({"mask": torch.ones(4, 4)}, "has one row an image and no places"),
        ({"mode": "replace"}, "has one row an image and no places"),
        ({"tokens": [1]}, "tokens are for sites of text"),
    ):
        with pytest.raises(InputError, match=sentence):
            kandinsky.pipe.steer({3: 5.0}, **arguments)
    with pytest.raises(InputError, match="unet of StableDiffusionPipeline is given no image_embeds"):
        sd.pipe.load_sae(sae)
    with pytest.raises(InputError, match="has no kinds, streams or layouts"):
        kandinsky.pipe.load_sae(sae, Site("image_embeds", kind="update"))


def test_three_hundred_stacked_edits_are_their_sum(sae):
    x = torch.randn(5, WIDTH)
    generator = torch.Generator().manual_seed(0)
    edits = [
        (int(torch.randint(64, (), generator=generator)), float(torch.randn((), generator=generator)))
        for _ in range(300)
    ]
    stacked = x
    for feature, strength in edits:
        stacked = turned(sae, stacked, {feature: strength})
    total = x.double()
    for feature, strength in edits:
        total = total + strength * sae.W_dec[feature].detach().double()
    torch.testing.assert_close(stacked.double(), total, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", [("TopKSAE", {"k": 8}), *READ_ONLY], ids=str)
def test_transfers_follow_the_formula(kind):
    sae = of_kind(*kind, d_in=WIDTH, n_latents=64)
    generator = torch.Generator().manual_seed(5)
    a, b, c = (torch.randn(4, WIDTH, generator=generator) for _ in range(3))
    z = {name: codes(sae, x) for name, x in (("a", a), ("b", b), ("c", c))}
    from reference import normalized

    scale, W = normalized(sae, a)[1], sae.W_dec.detach().double().numpy()
    some = [1, 5, 9]
    for found, change in (
        (transferred(sae, a, b), (z["b"] - z["a"]) @ W),
        (transferred(sae, a, b, some), (z["b"] - z["a"])[:, some] @ W[some]),
        (transferred(sae, a, b, some, instead_of=c, share=0.3), 0.3 * (z["b"] - z["c"])[:, some] @ W[some]),
    ):
        np.testing.assert_allclose(found.numpy(), a.double().numpy() + scale * change, atol=5e-5)
    assert torch.equal(transferred(sae, a, b, share=0.0), a)
    with pytest.raises(InputError, match="and the SAE takes width 32"):
        transferred(sae, a, b[:, :3])
    with pytest.raises(InputError, match="'replace' is not a mode for embeddings"):
        turned(sae, a, {1: 1.0}, "replace")


def test_adding_reads_directions_alone(tmp_path, monkeypatch, sae):
    monkeypatch.setattr("diffusers_sae.loaders.LARGE", 0)
    sae.save_pretrained(tmp_path)
    left = load_sae(tmp_path)
    x = torch.randn(3, WIDTH)
    assert torch.equal(turned(left, x, {3: 2.0}), turned(sae, x, {3: 2.0})) and left.W_dec.is_meta
    assert torch.equal(turned(left, x, {3: 2.0}, "scale"), turned(sae, x, {3: 2.0}, "scale")) and not left.W_dec.is_meta
