"""Concept scores against their definition, and the edits made of them."""

import numpy as np
import pytest
import torch

from diffusers_sae import InputError
from diffusers_sae.features.concepts import ConceptScores


@pytest.fixture
def scores():
    activity = torch.rand(5, 2, 200, generator=torch.Generator().manual_seed(0))
    return ConceptScores(
        ("neon", "sepia", "flat", "cat", "dog"),
        ("style", "style", "style", "object", "object"),
        torch.tensor([900.0, 100.0]),
        activity,
        2 * torch.rand(5, 6, 200, generator=torch.Generator().manual_seed(1)),
        (2, 3),
        torch.randn(5, 2, 200),
    )


def test_importance_is_the_share_minus_the_mean_share_of_the_group(scores):
    a = scores.activity.double().numpy()
    share = a / a.sum(-1, keepdims=True)
    np.testing.assert_allclose(scores.importance("sepia"), share[1] - (share[0] + share[2]) / 2, atol=1e-7)
    np.testing.assert_allclose(scores.importance("cat"), share[3] - share[4], atol=1e-7)


@pytest.mark.parametrize("by", ["activity", "effect"])
def test_choice_takes_the_top_of_every_timestep(scores, by):
    chosen = scores.choose("neon", 95, by)
    score = scores.importance("neon") if by == "activity" else scores.effect[0] - scores.effect[1:3].mean(0)
    for t in range(2):
        assert chosen[t].sum() == 10
        assert score[t][chosen[t]].min() > score[t][~chosen[t]].max()


def test_latents_without_a_positive_score_are_never_chosen(scores):
    scores.activity[0] = scores.activity[1:3].mean(0) * 0 + 1.0
    scores.activity[1] = scores.activity[2] = 1.0
    assert not scores.choose("neon", 50).any()


def test_tables_hold_the_values_where_chosen(scores):
    chosen = torch.zeros(2, 200, dtype=torch.bool)
    chosen[0, 7] = chosen[1, 9] = chosen[0, 9] = True
    tables = scores.tables(chosen, 2 * scores.activity[0], otherwise=1.0)
    assert sorted(tables) == [7, 9]
    assert tables[7].at(950.0) == pytest.approx(2 * scores.activity[0, 0, 7].item())
    assert tables[7].at(10.0) == 1.0


def test_towards_adds_what_the_concept_has_more_of(scores):
    at = scores.activity.double()[:, :, None] * scores.places.double()[:, None]  # (C, T, P, n)
    for instead_of, rival in ((None, at[[0, 2]].mean(0)), ("flat", at[2])):
        difference = at[1] - rival  # (T, P, n)
        plan = scores.towards("sepia", 3.0, percentile=90, instead_of=instead_of)
        for t, step in enumerate((900.0, 100.0)):
            largest = difference[t].abs().mean(0).topk(20).indices.tolist()
            given = {j: strength.at(step).flatten() for j, strength in plan.items()}
            assert sorted(j for j, strength in given.items() if strength.any()) == sorted(largest)
            for j in largest:
                torch.testing.assert_close(given[j], (3 * difference[t, :, j]).float(), atol=1e-5, rtol=1e-4)


def test_away_scales_the_chosen_latents_and_leaves_the_others(scores):
    chosen = scores.choose("cat", 95, "effect")
    plan = scores.away("cat", -2.0, 95, "effect")
    assert set(plan) == set(chosen.any(0).nonzero().flatten().tolist())
    for t, step in enumerate((900.0, 100.0)):
        for j, table in plan.items():
            assert table.at(step) == (-2.0 if chosen[t, j] else 1.0)


def test_saved_and_loaded(scores, tmp_path):
    scores.save(tmp_path)
    again = ConceptScores.load(tmp_path)
    assert again.concepts == scores.concepts and again.groups == scores.groups
    torch.testing.assert_close(again.activity, scores.activity, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(again.places, scores.places, atol=0.01, rtol=0.07)
    assert again.grid == scores.grid
    torch.testing.assert_close(again.effect, scores.effect, atol=0.01, rtol=1 / 16)  # three bits of mantissa
    size = (tmp_path / "concepts.safetensors").stat().st_size
    again.save(tmp_path)
    twice = ConceptScores.load(tmp_path)
    for name in ("activity", "places", "effect"):  # what was rounded once is kept bit by bit
        assert torch.equal(getattr(twice, name), getattr(again, name))
    again.activity = torch.zeros_like(again.activity)
    again.save(tmp_path)
    assert (tmp_path / "concepts.safetensors").stat().st_size < size
    assert not ConceptScores.load(tmp_path).activity.any()


def test_bad_input(scores, tmp_path):
    with pytest.raises(InputError, match="'bear' is not among the concepts; choose one of neon, sepia"):
        scores.importance("bear")
    with pytest.raises(InputError, match="percentile=100 must be at least 0 and below 100"):
        scores.choose("neon", 100)
    with pytest.raises(InputError, match="by='luck' is not a way to choose"):
        scores.choose("neon", by="luck")
    scores.effect = None
    with pytest.raises(InputError, match="No effects lie beside this SAE"):
        scores.choose("neon", by="effect")
    (tmp_path / "concepts.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="cannot be read as concept scores"):
        ConceptScores.load(tmp_path)
    with pytest.raises(InputError, match="cannot be read as concept scores"):
        ConceptScores.load(tmp_path / "nowhere")


def test_activity_is_the_mean_code_over_images_and_places(sd):
    from conftest import SITE, random_sae

    from diffusers_sae.features.concepts import concept_activity

    saes = {SITE: random_sae(), "unet.mid_block": random_sae(16)}
    labelled = [("ab", ["x", "p"]), ("cd", ["y", "p"]), ("ef", ["x", "q"])]
    groups = {"x": "one", "y": "one", "p": "two", "q": "two"}
    call = {"num_inference_steps": 2, "guidance_scale": 5.0, "height": 16, "width": 16}
    result = concept_activity(sd.pipe, saes, labelled, groups, batch_size=2, **call)
    for site, sae in saes.items():
        codes, places = [], []
        for i, (prompt, _) in enumerate(labelled):
            with sd.pipe.capture([site]) as activations:
                sd.run(prompt=prompt, generator=torch.Generator().manual_seed(i), num_inference_steps=2)
            code = sae.encode(activations[site].rows("cond"))  # (T, P, n)
            codes.append(code.mean(1))
            places.append(code.sum(0))
        expected = {"x": (codes[0] + codes[2]) / 2, "y": codes[1], "p": (codes[0] + codes[1]) / 2, "q": codes[2]}
        for name, value in expected.items():
            torch.testing.assert_close(
                result[site].activity[result[site].index(name)], value, atol=1e-5, rtol=1e-4, msg=name
            )
        by_place = places[0] + places[2]  # of x
        wanted = torch.where(by_place.sum(0) > 0, by_place / by_place.mean(0), torch.zeros(()))
        torch.testing.assert_close(result[site].places[0], wanted, atol=1e-4, rtol=1e-3)
    assert result[SITE].grid == (8, 8) and result["unet.mid_block"].grid == (4, 4)
    assert result[SITE].others("x") == [1]
    with pytest.raises(InputError, match="No prompt shows z"):
        concept_activity(sd.pipe, saes, labelled, {**groups, "z": "one"}, **call)
