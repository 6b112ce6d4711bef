"""Sites of text: layers of the text encoders, and the text stream of blocks that have two."""

import numpy as np
import pytest
import torch
from conftest import Harness, random_sae

from diffusers_sae import InputError, Rule, Site, StrengthTable

LAYERS = {
    "Stable Diffusion": ("text_encoder.encoder.layers.0", 16),
    "SDXL": ("text_encoder_2.text_model.encoder.layers.0", 16),
    "Stable Diffusion 3": ("text_encoder_3.encoder.block.0", 32),
    "PixArt-Sigma": ("text_encoder.encoder.block.1", 32),
    "Flux": ("text_encoder_2.encoder.block.0", 32),
}


def loaded(kind, **steer):
    harness = Harness(kind)
    path, width = LAYERS[kind]
    torch.manual_seed(1)
    harness.pipe.load_sae(random_sae(width, site={"path": path}), adapter_name="text")
    if steer:
        harness.pipe.steer({3: 9.0}, **steer)
    return harness, path


def read(harness, path, **kwargs):
    with harness.pipe.capture([path]) as activations:
        images = harness.run(**kwargs)
    return activations[path], images


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("branch", ["cond", "uncond", "contrast"])
def test_only_chosen_tokens_of_the_branch_change(kind, branch):
    if branch != "cond" and "uncond" not in Harness(kind).tiny.branches:
        pytest.skip("runs without guidance")
    negative = {"negative_prompt": "zz"} if kind == "SDXL" else {}  # without one, its encoders do not run for uncond
    plain, path = loaded(kind)
    before, bare = read(plain, path, **negative)
    assert torch.equal(bare, plain.run(plain.bare, **negative))
    harness, _ = loaded(kind, tokens=[1, 4], branch=branch)
    after, images = read(harness, path, **negative)
    assert not torch.equal(images, bare)
    direction = harness.pipe._steering.loaded["text"].sae.W_dec[3]
    signs = {"cond": (1, 0), "uncond": (0, 1), "contrast": (1, -1)}[branch]
    for name, sign in zip(("cond", "uncond"), signs, strict=True):
        a, b = before.rows(name), after.rows(name)
        if len(a) == 0:
            continue
        moved = (b - a)[0]
        expected = torch.zeros_like(moved)
        expected[[1, 4]] = 9.0 * sign * direction
        torch.testing.assert_close(moved, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["Stable Diffusion 3", "Flux", "Qwen-Image", "Chroma"])
def test_the_text_stream_of_a_block(kind):
    harness = Harness(kind)
    site = Site(harness.tiny.site, stream="text")
    torch.manual_seed(1)
    sae = random_sae(harness.tiny.width, site=site.as_dict())
    bare = harness.run(harness.bare)
    with harness.pipe.capture([site]) as before:
        assert torch.equal(harness.run(), bare)
    harness.pipe.load_sae(sae)
    harness.pipe.steer({3: 9.0}, tokens=[2])
    with harness.pipe.capture([site]) as after:
        assert not torch.equal(harness.run(), bare)
    a, b = before[site.path], after[site.path]
    t = a.timestep[0].item()
    moved = (b.rows("cond", t) - a.rows("cond", t))[0]
    torch.testing.assert_close(moved[2], 9.0 * sae.W_dec[3], atol=1e-4, rtol=1e-4)
    assert not moved[[0, 1, 3, 4]].any()
    assert torch.equal(a.rows("uncond", t), b.rows("uncond", t))


@pytest.mark.parametrize("tokens", [[4, 4], (4, 1, 4, 1), [4, np.int64(4)], range(4, 5)])
def test_a_position_that_is_named_twice_is_one(tokens):
    once, _ = loaded("Stable Diffusion", tokens=sorted({int(token) for token in tokens}))
    twice, _ = loaded("Stable Diffusion", tokens=tokens)
    assert torch.equal(once.run(), twice.run())


def test_images_of_a_prompt_share_its_tokens():
    harness, _ = loaded("Stable Diffusion", tokens=[1])
    prompts = ["ab", "cd"]
    assert harness.run(prompt=prompts, num_images_per_prompt=2).shape[0] == 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"start": 0.5}, "runs once, before the denoising, so that start and stop mean nothing"),
        ({"mask": torch.ones(4, 4)}, "A mask is for sites of images"),
        ({"features": {3: lambda progress: 1.0}}, "so that a strength cannot follow it"),
        ({"features": {3: StrengthTable((500.0,), (1.0,))}}, "so that a strength cannot follow it"),
        ({"tokens": [-1]}, "entries that are no positions"),
    ],
)
def test_bad_edits_of_text_get_a_sentence(arguments, sentence):
    harness, _ = loaded("Stable Diffusion")
    bare = harness.run(harness.bare)
    with pytest.raises(InputError, match=sentence):
        harness.pipe.steer(**{"features": {3: 1.0}, **arguments})
    assert torch.equal(harness.run(), bare)


def test_tokens_that_the_prompt_does_not_have():
    harness, _ = loaded("Stable Diffusion", tokens=[99])
    with pytest.raises(InputError, match="Token 99 is out of range; the site has the tokens 0 to 11"):
        harness.run()


def test_blocks_without_a_text_stream_say_so():
    harness = Harness()
    with (
        pytest.raises(InputError, match="returns no text stream"),
        harness.pipe.capture([Site("unet.mid_block.attentions.0", stream="text")]),
    ):
        harness.run()


def test_a_rule_about_the_prompt_decides_for_each_of_its_images():
    """The text encoder runs before the edits of the denoiser are prepared, once for all images of a prompt."""
    harness, path = loaded("Stable Diffusion")
    pipe, call = harness.pipe, {"prompt": ["ab", "xyz"], "num_images_per_prompt": 2}
    seen, bare = read(harness, path, **call)
    code = pipe._steering.loaded["text"].sae.encode(seen.rows("cond")).mean(1)  # (prompts, n)
    feature = int((code[1] - code[0]).argmax())
    bound = code[:, feature].mean().item()
    pipe.load_sae(harness.sae(), adapter_name="hand")
    pipe.steer({3: 9.0}, "hand", when=Rule({feature: 1.0}, bound, "text"))
    images = harness.run(**call)
    assert torch.equal(images[:2], bare[:2])
    assert all(not torch.equal(a, b) for a, b in zip(images[2:], bare[2:], strict=True))


def test_images_count_on_where_only_text_is_captured():
    harness, path = loaded("Stable Diffusion")
    with harness.pipe.capture([path]) as activations:
        harness.run(prompt=["ab", "cd"])
        harness.run(prompt="ef")
    assert activations[path].image.unique().tolist() == [0, 1, 2]


OTHER_VERSIONS = {
    "Stable Diffusion": "text_encoder.text_model.encoder.layers.0",
    "SDXL": "text_encoder_2.encoder.layers.0",
    "PixArt-Sigma": "text_encoder.model.encoder.block.1",
}
"""The same layers, as other versions of transformers call them."""


@pytest.mark.parametrize("kind", OTHER_VERSIONS)
def test_a_layer_is_found_as_another_version_of_transformers_calls_it(kind, recwarn, tmp_path):
    images = []
    path, width = LAYERS[kind]
    for trained, loaded_at in ((path, None), (OTHER_VERSIONS[kind], None), (path, OTHER_VERSIONS[kind])):
        harness = Harness(kind)
        torch.manual_seed(1)
        harness.pipe.load_sae(random_sae(width, site={"path": trained}), loaded_at, adapter_name="text")
        if images:
            harness.pipe.load_recipe(tmp_path / "plan.json")
        else:
            harness.pipe.steer({3: 9.0})
            harness.pipe.save_recipe(tmp_path / "plan.json")
        _, image = read(harness, loaded_at or trained)
        images.append(image)
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    assert not any("was trained at" in str(warning.message) for warning in recwarn)


def test_the_identity_of_a_site_is_that_of_every_version():
    for kind, path in OTHER_VERSIONS.items():
        here, there = Site(LAYERS[kind][0]), Site(path)
        assert here == there and hash(here) == hash(there) and {here: 1}[there] == 1
        assert there.path == path and there.as_dict()["path"] == path  # as it was given
        assert here != Site(path, kind="update") and here != path
    assert Site("unet.model.a") != Site("unet.a") and Site("text_encoder.encoder.layers.1") != here


def test_a_check_of_a_layer_that_another_version_calls_otherwise(sd):
    torch.manual_seed(1)
    sd.pipe.load_sae(random_sae(16, site={"path": OTHER_VERSIONS["Stable Diffusion"]}))
    found = sd.pipe.check_sae("ab", num_inference_steps=2)
    assert found.site in found.candidates and len({site.path for site in found.candidates}) == 2


@pytest.mark.parametrize("kind", ["Stable Diffusion", "Stable Diffusion 3"])
def test_of_embedded_prompts_the_encoders_read_the_negative_ones_alone(kind):
    harness, path = loaded(kind, branch="cond")
    call = {"num_inference_steps": 2, "output_type": "pt", **harness.tiny.arguments}
    if kind == "Stable Diffusion":
        embeds = {"prompt_embeds": harness.bare.encode_prompt("ab", "cpu", 1, False)[0]}
    else:
        encoded = harness.bare.encode_prompt("ab", None, None, do_classifier_free_guidance=False)
        embeds = {"prompt_embeds": encoded[0], "pooled_prompt_embeds": encoded[2]}

    def images(pipe):
        return pipe(**embeds, negative_prompt="zz", generator=torch.Generator().manual_seed(0), **call).images

    bare = images(harness.bare)
    with harness.pipe.capture([path]) as seen, pytest.warns(UserWarning, match="the run had no branch cond"):
        assert torch.equal(images(harness.pipe), bare)
    assert set(seen[path].branch) == {"uncond"}
    harness.pipe.reset_steering()
    harness.pipe.steer({3: 9.0}, branch="uncond")
    assert not torch.equal(images(harness.pipe), bare)
