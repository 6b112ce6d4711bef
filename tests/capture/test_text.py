"""Prompts read by a text encoder alone: the same rows as in a whole run, the denoiser untouched."""

import warnings

import pytest
import torch
from conftest import Harness, random_sae

from diffusers_sae import InputError, Site
from diffusers_sae.capture.text import read_prompts, stream_prompts, stream_prompts_at
from diffusers_sae.hooks import current_run

LAYER = "text_encoder.encoder.layers.0"
PATHS = {
    "Stable Diffusion": LAYER,
    "SDXL": "text_encoder_2.text_model.encoder.layers.0",
    "Stable Diffusion 3": "text_encoder_3.encoder.block.0",
    "PixArt-Sigma": "text_encoder.encoder.block.1",
    "Flux": "text_encoder_2.encoder.block.0",
}
PROMPTS = ["ab", "xyz", "a"]


@pytest.mark.parametrize("kind", PATHS)
def test_every_prompt_has_the_rows_that_a_run_of_its_own_has(kind):
    harness = Harness(kind)
    told = {k: v for k, v in harness.tiny.arguments.items() if k == "max_sequence_length"}
    read = read_prompts(harness.pipe, PATHS[kind], PROMPTS, batch_size=2, keep="all", **told)
    assert read.prompts == PROMPTS and read.kept.all()
    for i, prompt in enumerate(PROMPTS):
        with harness.pipe.capture([PATHS[kind]]) as activations:
            harness.run(prompt=prompt)
        held = activations[PATHS[kind]].rows("cond")[0]
        torch.testing.assert_close(read.tensor[i], held, atol=1e-5, rtol=1e-4)


def test_sites_of_one_path_are_read_apart(sd):
    texts = [LAYER, f"{LAYER}@input", f"{LAYER}@update", "text_encoder.encoder.layers.1"]
    (together,) = stream_prompts_at(sd.pipe, texts, PROMPTS)
    assert list(together) == [Site.of(text) for text in texts]
    for text in texts:
        alone = read_prompts(sd.pipe, text, PROMPTS)
        assert alone.site == together[text].site == Site.of(text)
        assert torch.equal(together[text].tensor, alone.tensor) and torch.equal(together[text].kept, alone.kept)
    output, given, update = (together[text].tensor for text in texts[:3])
    assert torch.equal(output - given, update) and torch.equal(output, together[LAYER].tensor)
    with pytest.raises(InputError, match="is named twice"):
        next(stream_prompts_at(sd.pipe, [LAYER, LAYER.replace("encoder.", "encoder.text_model.", 1)], PROMPTS))
    with pytest.raises(InputError, match="fc2@update does not exist"):
        next(stream_prompts_at(sd.pipe, [f"{LAYER}.mlp.fc2@update"], PROMPTS))


def test_the_denoiser_does_not_run_and_its_edits_are_not_missed(sd):
    sd.pipe.load_sae(sd.sae())
    sd.pipe.steer({3: 9.0})
    before, calls = sd.run(), []
    handle = sd.pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_prompts(sd.pipe, LAYER, PROMPTS)
    handle.remove()
    assert calls == [] and current_run() is None
    assert torch.equal(sd.run(), before)


def test_which_tokens_are_kept(sd):
    tokenizer = sd.pipe.tokenizer
    words, padded = (read_prompts(sd.pipe, LAYER, PROMPTS, keep=keep) for keep in ("words", "padded"))
    for i, prompt in enumerate(PROMPTS):
        plain = tokenizer(prompt, add_special_tokens=False).input_ids
        assert words.ids[i][words.kept[i]].tolist() == plain
    assert padded.kept.sum(1).tolist() == [padded.ids.shape[1] - 1] * 3 and not padded.kept[:, 0].any()
    assert torch.equal(words.rows, torch.cat([words.tensor[i][words.kept[i]] for i in range(3)]))


def test_edits_at_text_encoders_act(sd):
    bare = read_prompts(sd.pipe, LAYER, PROMPTS, keep="all").tensor
    torch.manual_seed(1)
    sd.pipe.load_sae(random_sae(16, site={"path": LAYER}), adapter_name="text")
    assert torch.equal(read_prompts(sd.pipe, LAYER, PROMPTS, keep="all").tensor, bare)
    sd.pipe.steer({3: 9.0}, tokens=[1])
    moved = read_prompts(sd.pipe, LAYER, PROMPTS, keep="all").tensor - bare
    direction = sd.pipe._steering.loaded["text"].sae.W_dec[3]
    torch.testing.assert_close(moved[:, 1], 9.0 * direction.expand(3, -1), atol=1e-5, rtol=1e-4)
    assert not moved[:, 2:].any()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"site": "unet.mid_block"}, "lies in no text encoder"),
        ({"site": "text_encoder_2.encoder.layers.0"}, "lies in no text encoder with a tokenizer"),
        ({"site": "text_encoder.encoder.layers.9"}, "does not exist"),
        ({"keep": "nouns"}, "'nouns' is no choice of tokens"),
        ({"prompts": "ab"}, "takes a list of prompts"),
        ({"prompts": [3]}, "A prompt is no string"),
        ({"prompts": []}, "no prompts to read"),
        ({"max_length": 5}, "encode_prompt takes no max_length"),
    ],
)
def test_bad_input_gets_a_sentence(sd, arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        read_prompts(sd.pipe, **{"site": LAYER, "prompts": PROMPTS, **arguments})
    assert current_run() is None


def test_a_stream_reads_no_more_than_it_must(sd):
    read = []

    def prompts():
        for prompt in PROMPTS:
            read.append(prompt)
            yield prompt

    next(stream_prompts(sd.pipe, LAYER, prompts(), batch_size=1))
    assert read == PROMPTS[:1]
