"""What a format declares: the tensors it needs, the buffers it knows, and that it refuses all others."""

import numpy as np
import pytest
import torch
from kinds import of_kind
from layouts import LAYOUTS, D, K, N, openai, random, rows

from diffusers_sae import InputError, load_sae
from diffusers_sae.loaders.formats import format_of
from diffusers_sae.loaders.reading import is_weights, read_config, read_file
from diffusers_sae.loaders.weights import Weights


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_tensor_that_a_format_has_no_use_for_is_refused(name, tmp_path):
    """Whether the format is recognized or named."""
    arguments, _ = LAYOUTS[name](tmp_path, random())
    file = next(p for p in tmp_path.iterdir() if is_weights(p))
    tensors, beside = read_file(file)
    config = {**beside, **read_config(tmp_path), **arguments.get("config", {})}
    layout = format_of(Weights(tensors, config, name)).name
    assert load_sae(tensors, config=config).n_latents == N  # so that it is the tensor that is refused below
    for more in ({}, {"format": layout}):
        for unknown in ("W_out", "thresholds_of_mine", "encoder.scale"):
            with pytest.raises(InputError) as error:
                load_sae({**tensors, unknown: torch.ones(N)}, config={**config, **more})
            assert unknown in str(error.value) and str(error.value).endswith("."), error.value


OWN = {
    "TopKSAE": {"k": K}, "BatchTopKSAE": {"k": K}, "JumpReLUSAE": {}, "GatedSAE": {},
}  # fmt: skip


@pytest.mark.parametrize("kind", OWN)
def test_a_bare_state_dict_of_ours_is_of_its_class(kind):
    sae = of_kind(kind, OWN[kind], D, N)
    state = sae.state_dict()
    again = load_sae(state, config=OWN[kind])
    assert type(again) is type(sae) and torch.equal(again.encode(rows()), sae.encode(rows()))
    if kind in ("JumpReLUSAE", "GatedSAE"):
        with pytest.raises(InputError, match=f"comes with k = 4, which a {kind} has no use for"):
            load_sae(state, config={"k": 4})
    if kind != "TopKSAE":
        with pytest.raises(InputError, match="which an SAE such as this .* has no use for"):
            load_sae(state, config={"_class_name": "TopKSAE", "k": 4})


def test_the_most_specific_format_wins(tmp_path):
    """The four tensors of TransformerLens are those of several formats, and of ours if both matrices lie one way."""
    g = random()
    state = {"W_enc": g.W.T, "b_enc": g.b, "W_dec": g.V, "b_dec": g.p}
    told = {
        "sae_lens": {"d_sae": N, "architecture": "standard"}, "vit_prisma": {"hook_point_layer": 3},
        "saev": {"schema": 5, "cfg": {"activation": {"cls": "Relu"}}},
    }  # fmt: skip
    for name, config in told.items():
        assert format_of(Weights(state, config, "x")).name == name
    assert format_of(Weights({**state, "W_enc": g.W}, {"k": 3}, "x")).name == "diffusers_sae"
    with pytest.raises(InputError, match="is of no known layout"):
        format_of(Weights(state, {}, "x"))
    with pytest.raises(InputError, match="could be of sae_lens or vit_prisma"):
        format_of(Weights(state, {**told["sae_lens"], **told["vit_prisma"]}, "x"))
    with pytest.raises(InputError, match="'sparsfy' is no format; choose one of"):
        load_sae(state, config={"format": "sparsfy"})


def test_the_state_dict_of_a_class_is_read_as_its_file_is(tmp_path):
    """OpenAI's holds words and numbers among its tensors."""
    _, rule = openai(tmp_path, random())
    state = torch.load(tmp_path / "autoencoder.pt", weights_only=True)
    np.testing.assert_allclose(load_sae(state).encode(rows()).detach(), rule(rows().double().numpy())[0], atol=1e-5)


def test_a_file_of_openai_that_does_not_tell_its_activation(tmp_path):
    _, rule = openai(tmp_path, random())
    state = torch.load(tmp_path / "autoencoder.pt", weights_only=True)
    bare = {name: tensor for name, tensor in state.items() if torch.is_tensor(tensor)}
    with pytest.raises(InputError, match="latents_activation_frequency, latents_mean_square"):
        load_sae(bare, config={"k": K})
    again = load_sae(bare, config={"activation": "TopK", "k": K})
    np.testing.assert_allclose(again.encode(rows()).detach(), rule(rows().double().numpy())[0], atol=1e-5)


CONFIGURED = [name for name in LAYOUTS if name not in ("daujotas", "stylegan", "revelio") and "openai" not in name]


@pytest.mark.parametrize("name", CONFIGURED)
def test_null_is_a_field_that_is_missing(name, tmp_path):
    """A file whose config has a field as null is read as, or refused as, one that lacks the field."""
    LAYOUTS[name](tmp_path, random())
    tensors, beside = read_file(next(p for p in tmp_path.iterdir() if is_weights(p)))
    config = {**beside, **read_config(tmp_path)}

    def outcome(config):
        try:
            return load_sae(tensors, config=config).encode(rows())
        except InputError as error:
            return str(error)

    fields = [(config, key) for key in config]
    fields += [(inner, key) for inner in config.values() if isinstance(inner, dict) for key in inner]
    for place, key in fields:
        kept = place.pop(key)
        missing = outcome(config)
        place[key] = None
        null = outcome(config)
        place[key] = kept
        assert torch.equal(null, missing) if torch.is_tensor(null) else null == missing, key
    assert torch.is_tensor(outcome({**config, "some_field": None, "provenance": None}))


def refusal(tensors, config):
    """The sentence by which a state dict is refused, or `None`."""
    try:
        load_sae(tensors, config=config)
    except InputError as error:
        return str(error)


TYPES = {"a number": 7, "text": "x", "a list": [1], "an object": {"a": 1}, "true": True, "NaN": float("nan")}


@pytest.mark.parametrize("name", CONFIGURED)
def test_a_field_of_another_type_is_read_or_refused_in_a_sentence(name, tmp_path):
    LAYOUTS[name](tmp_path, random())
    tensors, beside = read_file(next(p for p in tmp_path.iterdir() if is_weights(p)))
    config = {**beside, **read_config(tmp_path)}
    fields = [(config, key) for key in config]
    fields += [(inner, key) for inner in config.values() if isinstance(inner, dict) for key in inner]
    for place, key in fields:
        kept = place[key]
        for value in TYPES.values():
            place[key] = value
            sentence = refusal(tensors, config)
            assert sentence is None or "\n" not in sentence
        place[key] = kept


SHAPES = [
    lambda t: t[None], lambda t: t.flatten() if t.ndim != 1 else t[:, None], lambda t: t[:0], lambda t: t[..., :-1],
    lambda t: t.int(), lambda t: t.to(torch.complex64), lambda t: t.bool(), lambda t: t * torch.nan,
]  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_tensor_of_another_shape_or_dtype_is_refused_in_a_sentence(name, tmp_path):
    arguments, _ = LAYOUTS[name](tmp_path, random())
    tensors, beside = read_file(next(p for p in tmp_path.iterdir() if is_weights(p)))
    config = {**beside, **read_config(tmp_path), **arguments.get("config", {})}
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or key.startswith(("latents_", "stats_")):
            continue
        for change in SHAPES:
            if tensor.ndim == 0 and change in SHAPES[2:4]:
                continue
            wrong = change(tensor)
            if (name, change) == ("stylegan", SHAPES[3]):
                continue  # an SAE of narrower rows
            sentence = refusal({**tensors, key: wrong}, config)
            if sentence is None:
                assert tensor.ndim == 0 and wrong.numel() == 1, (key, wrong.shape, wrong.dtype)
            else:
                assert "\n" not in sentence and sentence.endswith(".")
