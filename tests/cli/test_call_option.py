"""The argument `--call`."""

import pytest

from diffusers_sae import InputError
from diffusers_sae.cli.call_option import check_seed, read_call


def test_an_object_of_json():
    assert read_call('{"num_inference_steps": 4, "sigmas": [1, 0.5]}') == {"num_inference_steps": 4, "sigmas": [1, 0.5]}
    assert read_call("{}") == {}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[1]", r"call='\[1\]' is no JSON object of arguments; pass such as '{\"num_inference_steps\": 20}'"),
        ("3", "is no JSON object"),
        ("null", "is no JSON object"),
        ("", "is no JSON "),
        ("{'a': 1}", "is no JSON "),
        ('{"a": 1, "a": 2}', "call has 'a' twice"),
        ('{"guidance_scale": NaN}', "the value NaN"),
        ('{"guidance_scale": -Infinity}', "the value -Infinity"),
    ],
)
def test_all_else_is_refused(text, sentence):
    with pytest.raises(InputError, match=sentence):
        read_call(text)


def test_seeds():
    for seed in (0, -5, 2**62):
        check_seed(seed)
    for seed in (2**64, -(2**63)):
        with pytest.raises(InputError, match="must lie between"):
            check_seed(seed)
