"""SAEs at StyleGAN2's w: the layers of W+ are the rows, and the synthesis gets what the formula says."""

import pytest
import torch
from conftest import random_sae
from nvlabs import small

from diffusers_sae import InputError, SAESteeringPipeline, Site, StrengthTable, TopKSAE
from diffusers_sae.adapters.stylegan2_pipeline import StyleGAN2Pipeline
from diffusers_sae.saes.statistics import StatisticsAccumulator

CALL = {"seeds": [1, 2, 3], "output_type": "pt"}


def loaded(site="w", d_in=16):
    bare = StyleGAN2Pipeline(small())
    pipe = SAESteeringPipeline.from_pipe(bare)
    torch.manual_seed(1)
    sae = random_sae(d_in, site={"path": site})
    pipe.load_sae(sae, adapter_name="w")
    return bare, pipe, sae


def w_of(pipe, **call):
    with pipe.capture(["w"]) as activations:
        images = pipe(**{**CALL, **call}).images
    return activations["w"].rows(), images


def test_a_plan_that_changes_nothing_changes_no_bit():
    bare, pipe, _ = loaded()
    plain = bare(**CALL).images
    assert torch.equal(pipe(**CALL).images, plain)
    pipe.steer({3: 0.0, 4: 0.0})
    assert torch.equal(pipe(**CALL).images, plain)
    pipe.reset_steering()
    pipe.steer({3: 1.0}, mode="scale")
    assert torch.equal(pipe(**CALL).images, plain)
    pipe.reset_steering()
    pipe.steer({3: 9.0})
    assert not torch.equal(pipe(**CALL).images, plain)
    assert torch.equal(bare(**CALL).images, plain)
    pipe.disable_sae()
    assert torch.equal(pipe(**CALL).images, plain)
    pipe.unload_sae()
    assert torch.equal(pipe(**CALL).images, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype):
    bare, pipe, sae = loaded()
    bare.to(dtype)
    plain, _ = w_of(pipe)
    assert torch.equal(pipe(**CALL).images, bare(**CALL).images)
    pipe.steer({3: 9.0})
    steered, images = w_of(pipe)
    assert steered.dtype == images.dtype == dtype
    torch.testing.assert_close(steered, (plain.float() + 9.0 * sae.W_dec[3]).to(dtype))


def test_a_compiled_generator():
    bare, pipe, _ = loaded()
    pipe.steer({3: 9.0}, tokens=[1])
    expected = pipe(**CALL).images
    compiled = SAESteeringPipeline.from_pipe(bare)
    compiled.generator = torch.compile(bare.generator, backend="eager")
    torch.manual_seed(1)
    compiled.load_sae(random_sae(16, site={"path": "w"}))
    assert torch.equal(compiled(**CALL).images, bare(**CALL).images)
    compiled.steer({3: 9.0}, tokens=[1])
    torch.testing.assert_close(compiled(**CALL).images, expected)


@pytest.mark.parametrize("tokens", [[0], [3, 4], None])
@pytest.mark.parametrize("psi", [1.0, 0.5, 0.0])
def test_chosen_layers_of_the_truncated_w_move_by_the_formula(tokens, psi):
    bare, pipe, sae = loaded()
    plain, _ = w_of(pipe, truncation_psi=psi)
    assert plain.shape == (3, 6, 16)
    pipe.steer({3: 9.0, 5: -2.0}, tokens=tokens)
    steered, images = w_of(pipe, truncation_psi=psi)
    expected = plain.clone()
    layers = list(range(6)) if tokens is None else tokens
    expected[:, layers] += 9.0 * sae.W_dec[3] - 2.0 * sae.W_dec[5]
    torch.testing.assert_close(steered, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(images, bare(w=steered, output_type="pt").images)
    others = [i for i in range(6) if i not in layers]
    assert torch.equal(steered[:, others], plain[:, others])


@pytest.mark.parametrize(("mode", "strength"), [("set", 2.0), ("scale", 3.0), ("ablate", 1.0), ("cap", 0.1)])
def test_modes_that_read_the_code(mode, strength):
    _, pipe, sae = loaded()
    plain, _ = w_of(pipe)
    z = sae.encode(plain)
    feature = int(z[:, 0].mean(0).argmax())
    edited = z.clone()
    at = z[..., feature]
    changed = {
        "set": torch.full_like(at, strength),
        "scale": strength * at,
        "ablate": 0 * at,
        "cap": at.clamp(max=strength),
    }
    edited[..., feature] = changed[mode]
    pipe.steer({feature: strength}, mode=mode, tokens=[1, 2])
    steered, _ = w_of(pipe)
    expected = plain.clone()
    expected[:, 1:3] += (sae.decode(edited) - sae.decode(z))[:, 1:3]
    torch.testing.assert_close(steered, expected, atol=1e-4, rtol=1e-4)


def test_a_strength_for_each_image_and_w_given():
    bare, pipe, sae = loaded()
    average = bare.generator.w_avg.expand(3, -1)
    pipe.steer({3: [0.0, 4.0, -4.0]})
    images = pipe(w=average, output_type="pt").images
    plain = bare(w=average, output_type="pt").images
    assert torch.equal(images[0], plain[0])
    moved = average + torch.tensor([0.0, 4.0, -4.0])[:, None] * sae.W_dec[3]
    torch.testing.assert_close(images, bare(w=moved, output_type="pt").images, atol=1e-5, rtol=1e-4)


def test_the_average_image_is_steered_at_psi_0():
    bare, pipe, sae = loaded()
    pipe.steer({3: 4.0})
    expected = bare(w=bare.generator.w_avg + 4.0 * sae.W_dec[3], output_type="pt").images
    found = pipe(seeds=[9], truncation_psi=0, output_type="pt").images
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_units_need_one_timestep_of_statistics(tmp_path):
    bare, pipe, sae = loaded()
    gathered = StatisticsAccumulator(sae.n_latents)
    gathered.add(0.0, sae.encode_sparse(bare.generator.mapping(torch.randn(64, 12))[:, 0].detach()))
    sae.save_pretrained(tmp_path)
    statistics = gathered.finish()
    statistics.save(tmp_path)
    pipe.unload_sae()
    pipe.load_sae(tmp_path)
    feature = int(statistics.rate[0].argmax())
    plain, _ = w_of(pipe)
    pipe.steer({feature: 2.0}, unit="max")
    steered, _ = w_of(pipe)
    step = 2.0 * statistics.max[0, feature] * sae.W_dec[feature]
    torch.testing.assert_close(steered - plain, step.expand_as(plain), atol=1e-5, rtol=1e-4)


def test_recipes(tmp_path):
    _, pipe, _ = loaded()
    pipe.steer({3: 9.0}, tokens=[2, 3])
    expected = pipe(**CALL).images
    pipe.save_recipe(tmp_path / "recipe.json")
    _, other, _ = loaded()
    other.load_recipe(tmp_path / "recipe.json")
    assert torch.equal(other(**CALL).images, expected)


def test_saved_and_loaded(tmp_path):
    _, pipe, sae = loaded()
    pipe.save_pretrained(tmp_path / "pipe")
    sae.save_pretrained(tmp_path / "sae")
    found = SAESteeringPipeline.from_pretrained(tmp_path / "pipe")
    assert isinstance(found, StyleGAN2Pipeline) and isinstance(found, SAESteeringPipeline)
    assert type(StyleGAN2Pipeline.from_pretrained(tmp_path / "pipe")) is StyleGAN2Pipeline
    found.load_sae(tmp_path / "sae")
    pipe.steer({3: 9.0}, tokens=[2])
    found.steer({3: 9.0}, tokens=[2])
    assert torch.equal(found(**CALL).images, pipe(**CALL).images)


def test_maps_of_the_synthesis_are_sites_with_places():
    _, pipe, sae = loaded("generator.synthesis.b8.conv1", 8)
    path = "generator.synthesis.b8.conv1"
    mask = torch.zeros(16, 16)
    mask[:8] = 1

    def captured():
        with pipe.capture([path]) as activations:
            pipe(**CALL)
        return activations[path].tensor

    plain = captured()
    pipe.steer({3: 5.0}, mask=mask)
    moved = captured() - plain
    torch.testing.assert_close(
        moved[:, :, :4], 5.0 * sae.W_dec[3][None, :, None, None].expand(3, 8, 4, 8), atol=1e-4, rtol=1e-4
    )
    assert not moved[:, :, 4:].any()


def test_w_is_short_for_its_path():
    assert Site("w") == Site("generator.w") and Site("w").as_dict()["path"] == "generator.w"
    _, pipe, _ = loaded()
    with pipe.capture(["w"]) as activations:
        pipe(**CALL)
        pipe(**CALL)
    assert activations["w"] is activations["generator.w"]
    assert len(set(activations["w"].image.tolist())) == 6 and set(activations["w"].branch) == {"cond"}
    with pytest.raises(KeyError):
        activations["v"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"start": 0.5}, "generator.w runs once, as nothing is denoised, so that start and stop mean nothing"),
        ({"features": {3: lambda progress: 1.0}}, "so that a strength cannot follow it"),
        ({"features": {3: StrengthTable((500.0,), (1.0,))}}, "so that a strength cannot follow it"),
        ({"mask": torch.ones(4, 4)}, "A mask is for sites of images"),
        ({"tokens": [-1]}, "no positions"),
    ],
)
def test_bad_edits_get_a_sentence(arguments, sentence):
    bare, pipe, _ = loaded()
    with pytest.raises(InputError, match=sentence):
        pipe.steer(**{"features": {3: 1.0}, **arguments})
    assert torch.equal(pipe(**CALL).images, bare(**CALL).images)


def test_layers_that_are_not_there():
    _, pipe, _ = loaded()
    pipe.steer({3: 1.0}, tokens=[6])
    with pytest.raises(InputError, match="Token 6 is out of range; the site has the tokens 0 to 5"):
        pipe(**CALL)


def test_sites_and_widths_that_are_not_there():
    _, pipe, _ = loaded()
    with pytest.raises(InputError, match="a path starts with generator"):
        pipe.load_sae(TopKSAE(16, 32, 4), site="unet.mid_block")
    with pytest.raises(InputError, match="'generator.synthesis.b32' does not exist in StyleGAN2Generator"):
        pipe.load_sae(TopKSAE(16, 32, 4), site="generator.synthesis.b32")
    with pytest.raises(InputError, match="width 12 and generator.w has 16"):
        pipe.load_sae(TopKSAE(12, 32, 4), site="w")
    with pytest.raises(InputError, match="choose one of generator.synthesis, generator.mapping, generator.w"):
        pipe.load_sae(TopKSAE(16, 32, 4), site="generator")
    pipe.load_sae(TopKSAE(8, 32, 4), site="generator.synthesis.b8.conv1", adapter_name="map")
    with pytest.raises(InputError, match="tokens are for sites of text, for w and for channels"):
        pipe.steer({1: 1.0}, "map", tokens=[1])


def test_a_given_w_does_not_pass_the_mapping_and_that_is_told():
    _, pipe, _ = loaded("generator.mapping")
    pipe.steer({3: 1.0})
    with pytest.warns(UserWarning, match="never acted, since the site did not run"):
        pipe(w=torch.zeros(16))
