"""Arguments of a pipeline's call, checked before any work."""

import pytest
from conftest import SITE, Harness

from diffusers_sae import InputError
from diffusers_sae.capture import StoreConfig, store_activations, stream_activations
from diffusers_sae.capture.calls import check_call
from diffusers_sae.hooks import current_run


def test_what_a_pipeline_takes(every):
    check_call(every.pipe, {"num_inference_steps": 4, **every.tiny.arguments}, taken=())


def test_values_that_pipelines_take(sd):
    check_call(sd.pipe, {"guidance_scale": 4, "height": None, "num_inference_steps": 1, "negative_prompt": ["a", "b"]})


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ({"num_inference_step": 4}, "takes no argument 'num_inference_step'; the nearest is 'num_inference_steps'"),
        ({"guidence": 4}, "takes no argument 'guidence'; the nearest is 'guidance_scale'"),
        ({"images": 4}, "takes no argument 'images'"),
        ({"batch_size": 4}, "takes no argument 'batch_size'"),
        ({"num_images_per_prompt": 2}, "'num_images_per_prompt' is set by the capture itself"),
        ({"prompt": "a"}, "'prompt' is set by the capture itself"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be at least 1"),
        ({"num_inference_steps": -3}, "must be at least 1"),
        ({"height": -8}, "height=-8 must be at least 1"),
        ({"width": 0}, "width=0 must be at least 1"),
        ({"num_inference_steps": 2.5}, "num_inference_steps=2.5 is float; pass int"),
        ({"num_inference_steps": "4"}, "num_inference_steps='4' is str; pass int"),
        ({"num_inference_steps": True}, "is bool; pass int"),
        ({"guidance_scale": "high"}, "guidance_scale='high' is str; pass float"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan must be finite"),
        ({"guidance_scale": float("inf")}, "guidance_scale=inf must be finite"),
        ({"height": "64"}, "height='64' is str; pass int or None"),
    ],
)
def test_all_else_is_refused(sd, tmp_path, call, sentence):
    with pytest.raises(InputError, match=sentence):
        check_call(sd.pipe, call)
    if "images" not in call and "batch_size" not in call:  # which are store_activations' own
        with pytest.raises(InputError, match=sentence):
            store_activations(sd.pipe, [SITE], ["ab"], tmp_path / "store", StoreConfig(1), **call)


def test_what_only_the_pipeline_can_judge_is_a_sentence_too(sd):
    with pytest.raises(InputError, match="StableDiffusionPipeline cannot be called like this: .*divisible by 8"):
        next(stream_activations(sd.pipe, [SITE], ["ab"], height=13, width=16))
    assert current_run() is None


def test_what_is_of_no_use_to_the_pipeline(sd):
    with pytest.raises(InputError, match="cannot be called like this: 'list' object has no attribute 'to'"):
        next(stream_activations(sd.pipe, [SITE], ["ab"], latents=[1]))


def test_a_check_of_an_sae_says_it_too(sd):
    sd.pipe.load_sae(sd.sae())
    for call, sentence in (
        ({"num_inference_steps": 5000}, "cannot be called like this: .*5000 cannot be larger"),
        ({"guidance": 3}, "takes no argument 'guidance'; the nearest is 'guidance_scale'"),
    ):
        with pytest.raises(InputError, match=sentence):
            sd.pipe.check_sae("ab", **call)
        assert current_run() is None


@pytest.mark.parametrize(
    ("site", "sentence"),
    [
        ("unet.up_blocks", "unet.up_blocks did not run, so that it held nothing"),
        ("unet.time_embedding", r"unet.time_embedding holds a tensor of shape \(\d+, \d+\), neither maps nor tokens"),
    ],
)
def test_sites_without_rows(sd, tmp_path, site, sentence):
    call = {"num_inference_steps": 2, "height": 16, "width": 16}
    with pytest.raises(InputError, match=sentence):
        store_activations(sd.pipe, [site], ["ab"], tmp_path / "store", StoreConfig(1), **call)


def test_a_pipeline_of_ones_own_takes_what_it_takes():
    harness = Harness()

    class Own(type(harness.bare)):
        def __call__(self, prompt, num_inference_steps=4, **further):
            return super().__call__(prompt, num_inference_steps=num_inference_steps, **further)

    harness.bare.__class__ = Own
    check_call(harness.bare, {"guidance_scale": 3.0, "anything": 1})
