"""How a recipe knows its SAEs: the same ones are taken, whatever they are kept in, and others are refused."""

import json
import warnings
from functools import partial

import pytest
import torch
from conftest import SITE, Harness, with_saes

from diffusers_sae import (
    BatchTopKSAE,
    Directions,
    GatedSAE,
    InputError,
    JumpReLUSAE,
    LatentStatistics,
    MatryoshkaSAE,
    ReLUSAE,
    Rule,
    TopKSAE,
    load_sae,
)

STEERED = {"mode": "scale"}
"""An edit that depends on codes."""


def of_kind(make, seed=1):
    """A harness with one SAE `make(provenance=...)` with random weights, all of whose tensors are drawn anew."""
    harness = Harness()
    torch.manual_seed(seed)
    sae = make(provenance={"site": {"path": SITE}})
    with torch.no_grad():
        for tensor in sae.state_dict().values():
            tensor.add_(0.1 * torch.rand_like(tensor))
    harness.pipe.load_sae(sae.eval(), adapter_name="hand")
    return harness


SAES = {
    "TopK": partial(TopKSAE, 8, 32, 4),
    "TopK, signed": partial(TopKSAE, 8, 32, 4, relu=False),
    "TopK, normalized": partial(TopKSAE, 8, 32, 4, input_norm="layer_norm"),
    "BatchTopK": partial(BatchTopKSAE, 8, 32, 4),
    "Matryoshka": partial(MatryoshkaSAE, 8, 32, 4, prefixes=[8, 32]),
    "JumpReLU": partial(JumpReLUSAE, 8, 32),
    "gated": partial(GatedSAE, 8, 32),
    "ReLU": partial(ReLUSAE, 8, 32),
    "ReLU, tied": partial(ReLUSAE, 8, 32, tied=True),
    "Directions": partial(Directions, 8, 32),
}


@pytest.mark.parametrize("kind", SAES)
def test_a_recipe_knows_its_sae_again(kind, tmp_path):
    """Of every architecture, saved and loaded as well, and in half precision if that rounds nothing."""
    harness = of_kind(SAES[kind])
    sae = harness.pipe._steering.loaded["hand"].sae
    sae.half().float()
    harness.pipe.steer({3: 0.5}, **STEERED)
    harness.pipe.save_recipe(tmp_path / "plan.json")
    images = harness.run()
    sae.save_pretrained(tmp_path / "sae")
    for again in (load_sae(tmp_path / "sae"), load_sae(tmp_path / "sae").half()):
        fresh = Harness()
        fresh.pipe.load_sae(again, adapter_name="hand")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fresh.pipe.load_recipe(tmp_path / "plan.json")
        assert torch.equal(fresh.run(), images)


OTHERS = {
    "k": ("TopK", partial(TopKSAE, 8, 32, 1), "k = 4 of the SAE 'hand', and the one loaded has 1"),
    "relu": ("TopK", partial(TopKSAE, 8, 32, 4, relu=False), "relu = True of the SAE 'hand'"),
    "relu the other way": ("TopK, signed", partial(TopKSAE, 8, 32, 4), "relu = False of the SAE 'hand'"),
    "another norm": ("TopK, normalized", partial(TopKSAE, 8, 32, 4, input_norm="constant_norm"), "'layer_norm' of"),
    "no norm": ("TopK, normalized", partial(TopKSAE, 8, 32, 4), "'layer_norm' of the SAE 'hand', and the one loaded"),
    "a norm of BatchTopK": ("BatchTopK", partial(BatchTopKSAE, 8, 32, 4, input_norm="layer_norm"), "input_norm = None"),
    "a norm of JumpReLU": ("JumpReLU", partial(JumpReLUSAE, 8, 32, input_norm="layer_norm"), "input_norm = None"),
    "a norm of ReLU": ("ReLU", partial(ReLUSAE, 8, 32, input_norm="layer_norm"), "input_norm = None"),
    "a norm of gated": ("gated", partial(GatedSAE, 8, 32, input_norm="layer_norm"), "input_norm = None"),
    "ReLU for TopK": ("TopK", partial(ReLUSAE, 8, 32), "architecture = 'TopKSAE' of the SAE 'hand'"),
    "Matryoshka for BatchTopK": ("BatchTopK", partial(MatryoshkaSAE, 8, 32, 4), "architecture = 'BatchTopKSAE' of"),
    "other weights": ("Directions", partial(Directions, 8, 32), "their weights differ"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_an_sae_with_other_codes_is_refused(what, tmp_path):
    """Whatever its tensors are."""
    kind, make, sentence = OTHERS[what]
    harness = of_kind(SAES[kind])
    harness.pipe.steer({3: 0.5}, **STEERED)
    harness.pipe.save_recipe(tmp_path / "plan.json")
    other = of_kind(make, seed=2 if what == "other weights" else 1)
    other.pipe.steer({1: 2.0})
    before = other.run()
    with pytest.raises(InputError) as error:
        other.pipe.load_recipe(tmp_path / "plan.json")
    assert sentence in str(error.value)
    assert torch.equal(other.run(), before)


@pytest.mark.parametrize("name", ["threshold", "b_mag", "r_mag", "b_enc", "b_dec", "W_enc", "W_dec"])
def test_every_tensor_counts(name, tmp_path):
    kind = {"threshold": "BatchTopK", "b_mag": "gated", "r_mag": "gated"}.get(name, "TopK")
    harness = of_kind(SAES[kind])
    harness.pipe.steer({3: 0.5}, **STEERED)
    harness.pipe.save_recipe(tmp_path / "plan.json")
    harness.pipe.reset_steering()
    with torch.no_grad():
        getattr(harness.pipe._steering.loaded["hand"].sae, name).view(-1)[:1] += 1e-3
    with pytest.raises(InputError, match="since their weights differ"):
        harness.pipe.load_recipe(tmp_path / "plan.json")


def test_what_shapes_no_code_does_not_count(tmp_path):
    """BatchTopK's k and Matryoshka's prefixes are for training, and JumpReLU's first threshold was for its start."""
    for kind, make in {
        "BatchTopK": partial(BatchTopKSAE, 8, 32, 9),
        "Matryoshka": partial(MatryoshkaSAE, 8, 32, 9, prefixes=[4, 16, 32]),
    }.items():
        harness = of_kind(SAES[kind])
        harness.pipe.steer({3: 0.5}, **STEERED)
        harness.pipe.save_recipe(tmp_path / "plan.json")
        other = of_kind(make)
        other.pipe.load_recipe(tmp_path / "plan.json")
        assert torch.equal(other.run(), harness.run())


def test_settings_count_as_they_are_now(tmp_path):
    """`sae.k` can be set after an SAE was made."""
    harness = of_kind(SAES["TopK"])
    harness.pipe._steering.loaded["hand"].sae.k = 1
    harness.pipe.steer({3: 0.5}, **STEERED)
    harness.pipe.save_recipe(tmp_path / "plan.json")
    with pytest.raises(InputError, match="k = 1 of the SAE 'hand', and the one loaded has 4"):
        of_kind(SAES["TopK"]).pipe.load_recipe(tmp_path / "plan.json")
    of_kind(partial(TopKSAE, 8, 32, 1)).pipe.load_recipe(tmp_path / "plan.json")


def test_the_sae_of_a_rule_counts_too(tmp_path):
    harness = with_saes()
    harness.pipe.steer({3: 5.0}, "hand", when=Rule({1: 1.0}, 0.05, "other"))
    harness.pipe.save_recipe(tmp_path / "plan.json")
    fresh = with_saes()
    fresh.pipe._steering.loaded["other"].sae.k = 2
    with pytest.raises(InputError, match="k = 4 of the SAE 'other', and the one loaded has 2"):
        fresh.pipe.load_recipe(tmp_path / "plan.json")
    recipe = json.loads((tmp_path / "plan.json").read_text())
    del recipe["saes"]["other"]
    (tmp_path / "plan.json").write_text(json.dumps(recipe))
    with pytest.raises(InputError, match="looks at the SAE 'other', which the recipe's saes do not list"):
        with_saes().pipe.load_recipe(tmp_path / "plan.json")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_copies_that_were_rounded_are_taken_with_a_warning(dtype, tmp_path):
    name = str(dtype).removeprefix("torch.")
    for written, loaded in (("float32", name), (name, "float32")):
        harness, fresh = with_saes("hand"), with_saes("hand")
        harness.pipe._steering.loaded["hand"].sae.to(getattr(torch, written))
        harness.pipe.steer({3: 5.0}, mode="set")
        harness.pipe.save_recipe(tmp_path / "plan.json")
        fresh.pipe._steering.loaded["hand"].sae.to(getattr(torch, loaded))
        with pytest.warns(UserWarning, match=f"is the recipe's in {loaded} and was in {written}; images") as caught:
            fresh.pipe.load_recipe(tmp_path / "plan.json")
        assert caught[0].filename == __file__
        torch.testing.assert_close(fresh.run(), harness.run(), atol=0.05, rtol=0)


def test_an_sae_of_other_weights_in_half_precision_is_refused(tmp_path):
    for written, loaded in ((torch.float16, torch.bfloat16), (torch.float32, torch.float16)):
        harness, other = with_saes("hand"), with_saes("hand")
        harness.pipe._steering.loaded["hand"].sae.to(written)
        harness.pipe.steer({3: 5.0})
        harness.pipe.save_recipe(tmp_path / "plan.json")
        sae = other.pipe._steering.loaded["hand"].sae
        if written == torch.float32:
            sae.W_enc[5, 5] += 0.1
        sae.to(loaded)
        with pytest.raises(InputError, match="since their weights differ"):
            other.pipe.load_recipe(tmp_path / "plan.json")


def statistics_of(seed):
    draw = partial(torch.rand, 2, 32, generator=torch.Generator().manual_seed(seed))
    return LatentStatistics(torch.tensor([999.0, 0.0]), draw(), 1 + 10 * draw(), 0.1 + 0.8 * draw())


@pytest.mark.parametrize("unit", ["raw", "mean", "max"])
@pytest.mark.parametrize("changed", ["timesteps", "mean", "max", "rate", None])
def test_statistics_count_where_a_strength_is_in_their_units(unit, changed, tmp_path):
    harness, fresh = with_saes("hand"), with_saes("hand")
    for each in (harness, fresh):
        each.pipe._steering.loaded["hand"].sae.statistics = statistics_of(0)
    harness.pipe.steer({3: 1.0}, unit=unit)
    harness.pipe.save_recipe(tmp_path / "plan.json")
    bare = fresh.run()
    if changed is not None:
        getattr(fresh.pipe._steering.loaded["hand"].sae.statistics, changed)[0] -= 0.05
    if changed in {"raw": (), "mean": ("timesteps", "mean", "rate"), "max": ("timesteps", "max")}[unit]:
        with pytest.raises(InputError, match=f"other statistics than the recipe's, .* in units of their {unit}; load"):
            fresh.pipe.load_recipe(tmp_path / "plan.json")
        assert torch.equal(fresh.run(), bare)
    else:
        fresh.pipe.load_recipe(tmp_path / "plan.json")
        assert torch.equal(fresh.run(), harness.run())


def test_statistics_that_are_missing_are_asked_for(tmp_path):
    harness = with_saes("hand")
    harness.pipe._steering.loaded["hand"].sae.statistics = statistics_of(0)
    harness.pipe.steer({3: 1.0}, unit="mean")
    harness.pipe.save_recipe(tmp_path / "plan.json")
    with pytest.raises(InputError, match="unit='mean' needs the SAE's statistics"):
        with_saes("hand").pipe.load_recipe(tmp_path / "plan.json")
