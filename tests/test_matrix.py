"""What must hold for every family of pipelines, on tiny real ones. The README's table is made from these names."""

import warnings

import numpy as np
import pytest
import torch
from conftest import random_sae
from reference import edited

from diffusers_sae import Site
from diffusers_sae.sites import BLOCK_STREAMS, resolve

NAMED = ("cond", "uncond")


def first_step(harness, site=None, **kwargs):
    """`{branch: rows (images, P, d)}` of a site at the first step, where no edit has come round by the latents."""
    site = Site.of(site or harness.tiny.site)
    with harness.pipe.capture([site]) as activations:
        images = harness.run(**kwargs)
    seen = activations[site.path]
    t = seen.timestep[0].item()
    return {branch: seen.rows(branch, t) for branch in dict.fromkeys(seen.branch)}, images


def test_wrapping_and_loading_change_no_bit(every):
    bare = every.run(every.bare)
    assert torch.equal(bare, every.run())
    every.pipe.load_sae(every.sae())
    assert torch.equal(bare, every.run())


@pytest.mark.parametrize(
    ("mode", "strength"), [("add", 0.0), ("add", [0.0]), ("add", lambda p: 0.0), ("scale", 1.0), ("ablate", 0.0)]
)
def test_identity_strength_changes_no_bit(every, mode, strength):
    every.pipe.load_sae(every.sae())
    every.pipe.steer({3: strength, 5: strength}, mode=mode, branch="both")
    assert torch.equal(every.run(every.bare), every.run())


def test_reset_and_unload_change_no_bit(every):
    bare = every.run(every.bare)
    every.pipe.load_sae(every.sae())
    every.pipe.steer({3: 9.0})
    assert not torch.equal(bare, every.run())
    every.pipe.reset_steering()
    assert torch.equal(bare, every.run())
    every.pipe.steer({3: 9.0})
    every.pipe.unload_sae()
    assert torch.equal(bare, every.run())
    assert every.pipe.get_list_saes() == {}
    denoiser = getattr(every.pipe, every.tiny.site.partition(".")[0])
    assert not denoiser._forward_pre_hooks


def test_branches_are_what_the_pipeline_says(every):
    seen, _ = first_step(every)
    assert tuple(seen) == every.tiny.branches


def attentions(harness):
    """Attention sites in the block that is the family's site, with every stream that they give back."""
    path = harness.tiny.site
    for name, module in resolve(harness.pipe, Site(path)).module.named_modules():
        kind = type(module).__name__
        if kind.endswith("Attention"):
            joint = name == "attn" and BLOCK_STREAMS[kind][1] is not None  # of image and text together
            for stream in ("image", "text") if joint else ("image",):
                yield Site(f"{path}.{name}".rstrip("."), stream=stream)


def test_attention_sites(every):
    """The module is hooked and its processor left alone: by the formula, on the cond rows of that stream only."""
    sites = list(attentions(every))
    assert sites
    bare = every.run()
    for site in sites:
        before, _ = first_step(every, site)
        sae = random_sae(before["cond"].shape[-1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the SAE was trained elsewhere
            every.pipe.load_sae(sae, site)
        assert torch.equal(every.run(), bare)
        every.pipe.steer({3: 2.0, 7: 4.0}, mode="set")
        after, steered = first_step(every, site)
        expected = edited(sae, before["cond"], [3, 7], [[2.0, 4.0]], "set")
        np.testing.assert_allclose(after["cond"].numpy(), expected, atol=5e-5)
        assert all(torch.equal(x, after[branch]) for branch, x in before.items() if branch != "cond")
        assert not torch.equal(steered, bare), site
        every.pipe.unload_sae()
    assert torch.equal(every.run(), bare)


@pytest.mark.parametrize("branch", ["cond", "uncond", "both", "contrast"])
def test_only_rows_of_the_branch_change_and_by_the_formula(every, branch):
    """Both images of a batch, each with strengths of its own, against dense codes in float64."""
    if branch != "cond" and "uncond" not in every.tiny.branches:
        pytest.skip("runs without guidance")
    sae = every.sae()
    prompts = ["ab", "cd"]
    before, bare = first_step(every, prompt=prompts)
    every.pipe.load_sae(sae)
    features, strengths = [3, 7, 11, 20], np.array([[2.0, -1.0, 0.5, 3.0], [0.0, 1.5, -2.0, 1.0]])
    every.pipe.steer({f: list(strengths[:, i]) for i, f in enumerate(features)}, mode="set", branch=branch)
    after, steered = first_step(every, prompt=prompts)
    signs = {"both": (1, 1), "contrast": (1, -1)}.get(branch, (branch == "cond", branch == "uncond"))
    for name, x in before.items():
        sign = dict(zip(NAMED, signs, strict=True)).get(name, 0)
        if not sign:
            assert torch.equal(x, after[name])
            continue
        expected = edited(sae, x, features, strengths, "set", float(sign))
        np.testing.assert_allclose(after[name].numpy(), expected, atol=5e-5)
        assert not torch.equal(x, after[name])
    assert not torch.equal(bare[0], steered[0]) and not torch.equal(bare[1], steered[1])


def test_only_chosen_images_and_steps_change(every):
    every.pipe.load_sae(every.sae())
    prompts = ["ab", "cd"]
    site = every.tiny.site
    with every.pipe.capture([site]) as bare:
        bare_images = every.run(prompt=prompts)
    steps = sorted(set(bare[site].timestep.tolist()), reverse=True)
    every.pipe.steer({3: [9.0, 0.0]}, start=1 / len(steps))
    with every.pipe.capture([site]) as steered:
        images = every.run(prompt=prompts)
    early = steered[site].timestep == steps[0]
    assert torch.equal(steered[site].tensor[early], bare[site].tensor[early])
    assert not torch.equal(steered[site].select("cond", steps[1]), bare[site].select("cond", steps[1]))
    assert torch.equal(images[1], bare_images[1]) and not torch.equal(images[0], bare_images[0])


def test_a_mask_keeps_the_other_places(every):
    before, _ = first_step(every)
    every.pipe.load_sae(every.sae())
    mask = torch.zeros(16, 16)
    mask[:, :8] = 1
    every.pipe.steer({3: 8.0}, mask=mask)
    after, _ = first_step(every)
    side = int(before["cond"].shape[1] ** 0.5)
    a, b = (x["cond"].unflatten(1, (side, side)) for x in (before, after))
    assert torch.equal(a[:, :, side // 2 :], b[:, :, side // 2 :])
    assert (a[:, :, : side // 2] != b[:, :, : side // 2]).any(-1).all()


def test_a_batch_equals_single_runs(every):
    """At the first step; later, random weights blow the rounding up."""
    every.pipe.load_sae(every.sae())
    strengths = [3.0, -2.0]
    lists = {"image": [every.tiny.arguments["image"]] * 2} if every.kind == "Stable Diffusion 3 img2img" else {}

    def noise():
        return [torch.Generator().manual_seed(i) for i in range(2)]

    every.pipe.steer({3: strengths, 5: strengths})
    batch, _ = first_step(every, prompt=["ab", "ab"], generator=noise(), **lists)
    every.pipe.reset_steering()
    every.pipe.steer({3: strengths[0], 5: strengths[0]})
    single, _ = first_step(every, prompt="ab", generator=noise()[0])
    for branch, rows in single.items():
        torch.testing.assert_close(batch[branch][:1], rows, atol=1e-4, rtol=1e-4)
