"""Stores of text encoders: the tokens that are asked for, and no denoiser."""

import json

import pytest
import torch
from conftest import SITE, Harness, Stop, random_sae

from diffusers_sae import InputError, Site
from diffusers_sae.capture import ActivationStore, StoreConfig, store_activations
from diffusers_sae.capture.text import read_prompts
from diffusers_sae.capture.text_rows import text_arguments

LAYER = "text_encoder.encoder.layers.0"
PROMPTS = ["ab", "xyz", "a", "abcab", "c"]
SITES = {
    "Stable Diffusion": [LAYER],
    "SDXL": ["text_encoder.encoder.layers.0", "text_encoder_2.text_model.encoder.layers.0"],
    "Stable Diffusion 3": ["text_encoder.text_model.encoder.layers.0", "text_encoder_3.encoder.block.0"],
    "Flux": ["text_encoder_2.encoder.block.0"],
    "PixArt-Sigma": ["text_encoder.encoder.block.1"],
}


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".safetensors", ".json")
    }


def count_calls(pipe):
    calls = []
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("tokens", ["words", "padded", "all"])
@pytest.mark.parametrize("kind", SITES)
def test_rows_are_those_of_the_tokens_that_are_asked_for(kind, tokens, tmp_path):
    pipe, paths = Harness(kind).pipe, SITES[kind]
    calls = count_calls(pipe)
    config = StoreConfig(len(PROMPTS), batch_size=2, dtype="float32", tokens=tokens)
    length = {"max_sequence_length": 12} if kind in ("Flux", "Stable Diffusion 3", "PixArt-Sigma") else {}
    stores = store_activations(pipe, paths, PROMPTS, tmp_path, config, **length)
    assert calls == [] and list(stores) == [Site.of(path) for path in paths]
    for path, store in stores.items():
        read = [read_prompts(pipe, path, [p], keep=tokens, **text_arguments(pipe, length)) for p in PROMPTS]
        shards = [store.shard(i) for i in range(len(store.shard_rows))]
        held = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
        assert len(shards) == 3 and len(store) == sum(int(each.kept.sum()) for each in read)
        torch.testing.assert_close(held["rows"], torch.cat([each.rows for each in read]), atol=1e-5, rtol=1e-4)
        assert torch.equal(held["token"], torch.cat([each.ids[each.kept] for each in read]).int())
        images = [i for i, each in enumerate(read) for _ in range(int(each.kept.sum()))]
        assert held["image"].tolist() == images
        assert held["place"].tolist() == [p for each in read for p in each.kept[0].nonzero()[:, 0].tolist()]
        assert not held["timestep"].any() and not held["branch"].any()
        manifest = store.manifest
        assert manifest["scheduler"] is None and manifest["config"]["tokens"] == tokens
        assert "timesteps" not in manifest["config"] and manifest["call"].get("max_sequence_length") == length.get(
            "max_sequence_length"
        )


def test_words_leave_out_padding_and_what_begins_the_text(sd, tmp_path):
    store = store_activations(sd.pipe, [LAYER], PROMPTS, tmp_path, StoreConfig(5, tokens="words"))[LAYER]
    words = sd.pipe.tokenizer(PROMPTS, add_special_tokens=False).input_ids
    assert store.shard(0)["token"].tolist() == [token for each in words for token in each]
    assert store.shard(0)["image"].tolist() == [i for i, each in enumerate(words) for _ in each]


def test_the_plan_rests(sd, tmp_path):
    bare = store_activations(sd.pipe, [LAYER], PROMPTS, tmp_path / "bare", StoreConfig(5))[LAYER]
    sd.pipe.load_sae(random_sae(16, site={"path": LAYER}))
    sd.pipe.steer({3: 9.0})
    steered = store_activations(sd.pipe, [LAYER], PROMPTS, tmp_path / "steered", StoreConfig(5))[LAYER]
    assert torch.equal(steered.shard(0)["rows"], bare.shard(0)["rows"])


def test_some_tokens_of_each_prompt(sd, tmp_path):
    config = StoreConfig(5, batch_size=5, places=2, tokens="words", seed=3)
    store = store_activations(sd.pipe, [LAYER], PROMPTS, tmp_path / "a", config)[LAYER]
    counts = [min(2, len(each)) for each in sd.pipe.tokenizer(PROMPTS, add_special_tokens=False).input_ids]
    assert store.shard(0)["image"].bincount().tolist() == counts
    again = store_activations(
        sd.pipe, [LAYER], PROMPTS, tmp_path / "b", StoreConfig(5, batch_size=2, places=2, tokens="words", seed=3)
    )[LAYER]
    places = torch.cat([again.shard(i)["place"] for i in range(3)])
    assert torch.equal(places, store.shard(0)["place"])  # whatever the batches


def test_a_stopped_run_goes_on_to_the_same_bytes(sd, tmp_path):
    config = StoreConfig(5, batch_size=1, tokens="words")
    store_activations(sd.pipe, [LAYER], PROMPTS, tmp_path / "whole", config)
    calls = []

    def stop_at_third(*_):
        calls.append(1)
        if len(calls) == 3:
            raise Stop

    sd.pipe.text_encoder.register_forward_pre_hook(stop_at_third)
    with pytest.raises(Stop):
        store_activations(sd.pipe, [LAYER], PROMPTS, tmp_path / "stopped", config)
    with pytest.raises(InputError, match="is not complete"):
        ActivationStore(tmp_path / "stopped" / LAYER)
    store_activations(sd.pipe, [LAYER], PROMPTS, tmp_path / "stopped", config)
    assert len(calls) == 3 + 3  # two of five were there
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")
    other = StoreConfig(5, batch_size=1, tokens="all")
    with pytest.raises(InputError, match="another run"):
        store_activations(sd.pipe, [LAYER], PROMPTS, tmp_path / "whole", other)


def test_denoiser_and_text_encoder_in_one_command(sd, tmp_path):
    call = {"num_inference_steps": 3, "guidance_scale": 5.0, "height": 16, "width": 16}
    config = StoreConfig(3, batch_size=2, timesteps=2, tokens="words")
    both = store_activations(sd.pipe, [SITE, LAYER], PROMPTS, tmp_path / "both", config, **call)
    store_activations(sd.pipe, [LAYER], PROMPTS, tmp_path / "text", StoreConfig(3, batch_size=2, tokens="words"))
    apart = StoreConfig(3, batch_size=2, timesteps=2)
    store_activations(sd.pipe, [SITE], PROMPTS, tmp_path / "image", apart, **call)
    assert list(both) == [Site(SITE), Site(LAYER)]
    assert files_of(tmp_path / "both") == {**files_of(tmp_path / "text"), **files_of(tmp_path / "image")}
    assert len(both[SITE].shard(0)["timestep"].unique()) == 2


def test_defaults_are_those_of_images():
    assert text_arguments(Harness("PixArt-Sigma").pipe, {})["clean_caption"] is True
    assert text_arguments(Harness("Qwen-Image").pipe, {})["max_sequence_length"] == 512
    assert text_arguments(Harness().pipe, {"clip_skip": 1, "guidance_scale": 3}) == {"clip_skip": 1}


@pytest.mark.parametrize(
    ("sites", "config", "call", "sentence"),
    [
        ([SITE], {"tokens": "words"}, {}, "tokens='words' is of text encoders, and no site lies in one"),
        ([LAYER], {"tokens": "nouns"}, {}, "tokens='nouns' is no choice of tokens; choose one of words, padded, all"),
        ([LAYER], {"branches": ("cond", "uncond")}, {}, "which are the branch cond, and not for cond, uncond"),
        ([LAYER, SITE], {"branches": ("uncond",)}, {}, "which are the branch cond"),
        ([LAYER], {"timesteps": 2}, {}, "timesteps would do nothing: the denoiser does not run"),
        ([LAYER], {}, {"guidance_scale": 3.0}, "guidance_scale would do nothing"),
        ([LAYER], {}, {"negative_prompt": "x"}, "negative_prompt would do nothing"),
        (["text_encoder.encoder.layers.9"], {}, {}, "does not exist"),
        (["text_encoder_2.encoder.layers.0"], {}, {}, "lies in no text encoder with a tokenizer"),
    ],
)
def test_what_makes_no_sense_is_refused(sd, tmp_path, sites, config, call, sentence):
    with pytest.raises(InputError, match=sentence):
        store_activations(sd.pipe, sites, PROMPTS, tmp_path / "store", StoreConfig(2, **config), **call)
    assert not (tmp_path / "store").exists()


def test_prompts_without_words(sd, tmp_path):
    config = StoreConfig(3, batch_size=1, tokens="words")
    store = store_activations(sd.pipe, [LAYER], ["", "ab", ""], tmp_path / "some", config)[LAYER]
    assert store.shard_rows[0] == store.shard_rows[2] == 0 and len(store) == store.shard_rows[1]
    assert sum(len(batch) for batch in store.batches(1)) == len(store)
    with pytest.raises(InputError, match="No prompt has a token that is kept at .*; pass other prompts"):
        store_activations(sd.pipe, [LAYER], [""] * 3, tmp_path / "none", config)
    assert not (tmp_path / "none").exists()


def test_a_store_goes_on_with_another_plan_since_it_rests(sd, tmp_path):
    config = StoreConfig(2, tokens="words")
    first = store_activations(sd.pipe, [LAYER], PROMPTS, tmp_path, config)[LAYER]
    sd.pipe.load_sae(random_sae(16), LAYER, adapter_name="words")
    with sd.pipe.steering({3: 2.0}):
        assert store_activations(sd.pipe, [LAYER], PROMPTS, tmp_path, config)[LAYER].manifest == first.manifest


def test_the_manifest_says_what_the_text_encoder_was_given(tmp_path):
    pipe, path = Harness("PixArt-Sigma").pipe, SITES["PixArt-Sigma"][0]
    store_activations(pipe, [path], PROMPTS, tmp_path, StoreConfig(2, tokens="words"), max_sequence_length=9)
    manifest = json.loads((tmp_path / path / "manifest.json").read_text())
    assert manifest["call"] == {"clean_caption": True, "max_sequence_length": 9}
    assert manifest["config"]["branches"] == ["cond"]


def test_stores_do_not_depend_on_the_plan(sd, tmp_path):
    def stored(folder):
        return store_activations(sd.pipe, [LAYER], PROMPTS, folder, StoreConfig(5, dtype="float32"))[LAYER].shard(0)

    bare = stored(tmp_path / "bare")["rows"]
    torch.manual_seed(1)
    sd.pipe.load_sae(random_sae(16, site={"path": LAYER}))
    sd.pipe.steer({3: 9.0})
    steered = sd.run()
    assert torch.equal(stored(tmp_path / "steered")["rows"], bare)
    assert torch.equal(sd.run(), steered)
