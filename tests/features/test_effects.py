"""Attribution by gradient against what small ablations really do."""

import pytest
import torch
from conftest import SITE, Harness, random_sae

from diffusers_sae import InputError, Site, TopKSAE
from diffusers_sae.features.effects import concept_effect
from diffusers_sae.hooks import current_run
from diffusers_sae.saes import ChannelAwareSAE

CALL = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 16, "width": 16}
FLUX = {
    "num_inference_steps": 2,
    "guidance_scale": 5.0,
    "true_cfg_scale": 3.0,
    "height": 16,
    "width": 16,
    "max_sequence_length": 12,
}


def predictions(pipe, call):
    """The denoiser's first outputs by branch, `{"uncond", "cond"}`."""
    outputs = []
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    handle = denoiser.register_forward_hook(lambda m, a, o: outputs.append(o[0].float().clone()))
    pipe("ab", negative_prompt="cd", generator=torch.Generator().manual_seed(0), output_type="latent", **call)
    handle.remove()
    if len(outputs[0]) == 1:  # a call for each branch
        return {"cond": outputs[0], "uncond": outputs[1]}
    return dict(zip(("uncond", "cond"), outputs[0].chunk(2), strict=True))


def measured(pipe, sae, site, call, step=0.02):
    """What ablating each latent a little really does, as a share of the way from neutral to concept, `(n,)`."""
    bare = predictions(pipe, call)
    towards = bare["cond"] - bare["uncond"]
    pipe.load_sae(sae, site)
    found = []
    for j in range(sae.n_latents):
        with pipe.steering({j: step}, mode="ablate"):
            moved = bare["cond"] - predictions(pipe, call)["cond"]
        found.append(((moved * towards).sum() / towards.square().sum() / step).item())
    pipe.unload_sae()
    return torch.tensor(found)


def assert_same_effects(told, true):
    assert true.abs().max() > 1e-3
    torch.testing.assert_close(told, true, atol=0.05 * true.abs().max().item(), rtol=0.05)


@pytest.mark.parametrize("input_norm", [None, "layer_norm", "constant_norm"])
def test_effect_is_the_derivative_of_the_share_by_the_latent(input_norm):
    harness = Harness()
    sae = TopKSAE(8, 32, 4, input_norm=input_norm, provenance={"site": {"path": SITE}}).eval()
    sae.load_state_dict(random_sae().state_dict())
    effects, timesteps = concept_effect(harness.pipe, {SITE: sae}, ["ab"], ["cd"], **CALL)
    assert timesteps.tolist() == harness.pipe.scheduler.timesteps.tolist()
    assert_same_effects(effects[SITE][0], measured(harness.pipe, sae, SITE, CALL))


@pytest.mark.parametrize(
    ("kind", "site", "width", "call"),
    [
        ("Stable Diffusion", Site("unet.up_blocks.1.attentions.1", kind="update"), 8, CALL),
        ("Stable Diffusion", Site("unet.up_blocks.1.attentions.1", kind="input"), 8, CALL),
        ("Stable Diffusion", Site("unet.up_blocks.1.attentions.1", layout="channels"), 64, CALL),
        ("Stable Diffusion", Site("unet.mid_block", layout="vector"), 256, CALL),
        ("Stable Diffusion 3", Site("transformer.transformer_blocks.0", stream="text"), 16, CALL),
        ("Stable Diffusion 3", Site("transformer.transformer_blocks.0"), 16, CALL),
        ("Flux, true guidance", Site("transformer.transformer_blocks.0"), 32, FLUX),
        ("PixArt-Sigma", Site("transformer.transformer_blocks.0"), 16, {**CALL, "use_resolution_binning": False}),
    ],
    ids=str,
)
def test_kinds_streams_layouts_and_families(kind, site, width, call):
    harness = Harness(kind)
    torch.manual_seed(1)
    sae = random_sae(width, n_latents=16, k=8, site=site.as_dict())
    if kind == "PixArt-Sigma":
        call = {**call, "clean_caption": False, "max_sequence_length": 12}
    told = concept_effect(harness.pipe, {site.path: sae}, ["ab"], ["cd"], **call)[0][site.path]
    assert_same_effects(told[0], measured(harness.pipe, sae, site, call))


def test_an_sae_whose_rows_belong_together():
    site = Site(SITE, layout="channels")
    torch.manual_seed(0)
    sae = ChannelAwareSAE(64, 24, channels=8, provenance={"site": site.as_dict()}).eval()
    harness = Harness()
    told = concept_effect(harness.pipe, {SITE: sae}, ["ab"], ["cd"], **CALL)[0][SITE]
    assert_same_effects(told[0], measured(harness.pipe, sae, site, CALL))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pipelines_in_half_precision(dtype):
    torch.manual_seed(1)
    sae, harness = random_sae(), Harness()
    exact = concept_effect(harness.pipe, {SITE: sae}, ["ab"], ["cd"], **CALL)[0][SITE]
    harness.pipe.to(dtype)
    half = concept_effect(harness.pipe, {SITE: sae}, ["ab"], ["cd"], **CALL)[0][SITE]
    assert half.dtype == torch.float32 and torch.isfinite(half).all()
    assert torch.cosine_similarity(half.flatten(), exact.flatten(), dim=0) > 0.98
    assert half.norm() / exact.norm() == pytest.approx(1, abs=0.1)


def test_effects_of_a_batch_are_averaged_and_the_pipeline_is_left_alone():
    harness, sae = Harness(), random_sae()
    bare = harness.run()
    saes = {SITE: sae}
    both = concept_effect(harness.pipe, saes, ["ab", "ef"], ["cd", "gh"], **CALL)[0][SITE]
    one = concept_effect(harness.pipe, saes, ["ab"], ["cd"], **CALL)[0][SITE]
    two = concept_effect(harness.pipe, saes, ["ef"], ["gh"], seed=1, **CALL)[0][SITE]
    torch.testing.assert_close(both, (one + two) / 2, atol=1e-5, rtol=1e-3)
    assert torch.equal(bare, harness.run())
    assert not harness.pipe.unet._forward_pre_hooks
    assert all(p.grad is None for p in harness.pipe.unet.parameters())


def test_sites_measured_together_are_as_measured_alone():
    harness = Harness()
    saes = {"unet.mid_block": random_sae(16, site={"path": "unet.mid_block"}), SITE: random_sae()}
    both, timesteps = concept_effect(harness.pipe, saes, ["ab"], ["cd"], **CALL)
    for site, sae in saes.items():
        alone, _ = concept_effect(harness.pipe, {site: sae}, ["ab"], ["cd"], **CALL)
        assert both[site].shape == (len(timesteps), 32)
        torch.testing.assert_close(both[site], alone[site], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "texts", "call"),
    [
        ("Stable Diffusion", [SITE, f"{SITE}@input", f"{SITE}@update"], CALL),
        ("Stable Diffusion 3", [f"transformer.transformer_blocks.0{end}" for end in ("", "@text", "@update")], CALL),
    ],
)
def test_sites_of_one_path_measured_together_are_as_measured_alone(kind, texts, call):
    harness = Harness(kind)
    torch.manual_seed(1)
    saes = {Site.of(text): random_sae(harness.tiny.width, site=text) for text in texts}
    together, _ = concept_effect(harness.pipe, saes, ["ab"], ["cd"], **call)
    assert list(together) == list(saes)
    for site, sae in saes.items():
        alone, _ = concept_effect(harness.pipe, {site.path: sae}, ["ab"], ["cd"], **call)
        assert alone[site].abs().max() > 1e-4
        torch.testing.assert_close(together[site], alone[site], atol=1e-6, rtol=1e-4)
    with pytest.raises(InputError, match="is named twice"):
        concept_effect(harness.pipe, {site.path: sae, site: sae}, ["ab"], ["cd"], **call)


def test_an_update_that_only_the_run_shows_to_be_none(sd):
    path = "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.0"  # a GEGLU, which does not tell its widths
    with pytest.raises(InputError, match=f"{path}@update does not exist: the block returns .* for an input of"):
        concept_effect(sd.pipe, {f"{path}@update": random_sae(64)}, ["ab"], ["cd"], **CALL)


def test_effects_do_not_depend_on_the_plan(sd, sae):
    bare = concept_effect(sd.pipe, {SITE: sae}, ["ab"], ["cd"], **CALL)[0][SITE]
    sd.pipe.load_sae(sae)
    sd.pipe.steer({3: 9.0}, branch="both")
    steered = sd.run()
    assert torch.equal(concept_effect(sd.pipe, {SITE: sae}, ["ab"], ["cd"], **CALL)[0][SITE], bare)
    assert torch.equal(sd.run(), steered)
    with pytest.raises(ValueError, match="divisible by 8"):
        concept_effect(sd.pipe, {SITE: sae}, ["ab"], ["cd"], **{**CALL, "height": 15})
    assert torch.equal(sd.run(), steered)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"guidance_scale": 1.0}, "Guidance is off at timestep"),
        ({"prompts": ["ab", "ef"]}, "a list of as many prompts without it"),
        ({"prompts": [], "neutral": []}, "Pass a list of prompts with the concept"),
        ({"prompts": "ab", "neutral": "cd"}, "Pass a list of prompts with the concept"),
        ({"neutral": ["ab"]}, "'ab' is the prompt with and without the concept"),
        ({"negative_prompt": "x"}, "negative_prompt is set by concept_effect itself"),
        ({"path": "unet.nowhere"}, "does not exist"),
        ({"path": "unet.mid_block"}, "takes activations of width 8 and unet.mid_block has 16"),
    ],
)
def test_bad_input_gets_a_sentence_and_changes_nothing(sd, sae, change, sentence):
    arguments = {"prompts": ["ab"], "neutral": ["cd"], **CALL, **change}
    prompts, neutral = arguments.pop("prompts"), arguments.pop("neutral")
    with pytest.raises(InputError, match=sentence):
        concept_effect(sd.pipe, {arguments.pop("path", SITE): sae}, prompts, neutral, **arguments)
    assert not sd.pipe.unet._forward_pre_hooks and current_run() is None


def test_text_encoders_have_no_effect_at_each_step(sd):
    layer = next(name for name, _ in sd.pipe.text_encoder.named_modules() if name.endswith("layers.0"))
    with pytest.raises(InputError, match="is no block of the denoiser"):
        concept_effect(sd.pipe, {f"text_encoder.{layer}": random_sae(16)}, ["ab"], ["cd"], **CALL)


@pytest.mark.parametrize(("kind", "call"), [("Flux", {**FLUX, "true_cfg_scale": 1.0}), ("Kandinsky 2.2", {})])
def test_pipelines_without_a_branch_for_neutral_prompts(kind, call):
    harness = Harness(kind)
    with pytest.raises(InputError, match="Guidance is off at timestep|takes no prompts and negative prompts"):
        concept_effect(harness.pipe, {harness.tiny.site: harness.sae()}, ["ab", "ef"], ["cd", "gh"], **call)
