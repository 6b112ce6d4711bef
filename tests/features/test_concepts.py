"""Concept scores against their definition, and the edits made of them."""

import json

import numpy as np
import pytest
import torch
from conftest import SITE, random_sae
from safetensors import safe_open
from safetensors.torch import save_file

from diffusers_sae import Directions, InputError, Site, TopKSAE
from diffusers_sae.demo.shipped import MODELS, SITES
from diffusers_sae.features.concepts import ConceptScores, concept_activity
from diffusers_sae.features.packing import pack, unpack
from diffusers_sae.sites import KINDS

CALL = {"num_inference_steps": 2, "guidance_scale": 5.0, "height": 16, "width": 16}


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
    assert again.grid == scores.grid and not again.signed
    for name in ("activity", "places", "effect"):
        torch.testing.assert_close(getattr(again, name), getattr(scores, name), atol=0, rtol=2**-11)
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
    effect, scores.effect = scores.effect, None
    with pytest.raises(InputError, match="No effects lie beside this SAE"):
        scores.choose("neon", by="effect")
    scores.effect = effect.clone()
    scores.effect[0, 0, 0] = torch.inf
    with pytest.raises(InputError, match="The effect of the concepts has numbers that are not finite"):
        scores.save(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "concepts.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="cannot be read as concept scores"):
        ConceptScores.load(tmp_path)
    with pytest.raises(InputError, match="cannot be read as concept scores"):
        ConceptScores.load(tmp_path / "nowhere")


def test_activity_is_the_mean_code_over_images_and_places(sd):
    saes = {SITE: random_sae(), "unet.mid_block": random_sae(16)}
    labelled = [("ab", ["x", "p"]), ("cd", ["y", "p"]), ("ef", ["x", "q"])]
    groups = {"x": "one", "y": "one", "p": "two", "q": "two"}
    result = concept_activity(sd.pipe, saes, labelled, groups, batch_size=2, **CALL)
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
        concept_activity(sd.pipe, saes, labelled, {**groups, "z": "one"}, **CALL)


SIGNED = {
    "directions": lambda: Directions.of(torch.randn(6, 8, generator=torch.Generator().manual_seed(2))),
    "topk": lambda: lowered(TopKSAE(8, 32, 4, relu=False)),
}
LABELLED = [("ab", ["x"]), ("cd", ["y"]), ("ef", ["x"]), ("gh", ["y"])]


@torch.no_grad()
def lowered(sae):
    sae.b_enc.sub_(3.0)
    return sae.eval()


@pytest.mark.parametrize("kind", SIGNED)
def test_scores_of_codes_below_zero(sd, kind, tmp_path):
    torch.manual_seed(0)
    sae = SIGNED[kind]()
    scores = concept_activity(sd.pipe, {SITE: sae}, LABELLED, {"x": "g", "y": "g"}, batch_size=2, **CALL)[SITE]
    codes = {"x": [], "y": []}
    for i, (prompt, (concept,)) in enumerate(LABELLED):
        with sd.pipe.capture([SITE]) as activations:
            sd.run(prompt=prompt, generator=torch.Generator().manual_seed(i), num_inference_steps=2)
        codes[concept].append(sae.encode(activations[SITE].rows("cond")).detach())  # (T, P, n)
    mean = {concept: torch.stack(each).mean(0) for concept, each in codes.items()}
    assert scores.signed and min(float(each.min()) for each in mean.values()) < -0.1
    for concept, z in mean.items():
        activity = z.mean(1, keepdim=True)
        torch.testing.assert_close(scores.activity[scores.index(concept)], activity[:, 0], atol=1e-5, rtol=1e-4)
        by_place = activity + z.mean(0) - z.mean((0, 1))  # timestep plus place
        torch.testing.assert_close(scores.activity_by_place(concept), by_place, atol=1e-5, rtol=1e-4)
    gap = scores.activity_by_place("x") - scores.activity_by_place("y")
    for j, strength in scores.towards("x", 1.0, 50).items():
        given = strength.values.flatten(1)
        torch.testing.assert_close(given, torch.where(given != 0, gap[..., j], 0.0), atol=1e-6, rtol=1e-5)
    share = {concept: z.mean(1) / z.mean(1).abs().sum(-1, keepdim=True) for concept, z in mean.items()}
    further = (share["x"] - share["y"]) * torch.where(share["x"] < 0, -1.0, 1.0)
    torch.testing.assert_close(scores.importance("x"), further, atol=1e-6, rtol=1e-4)
    assert set(scores.away("x", -1.0, 50)) <= set((further > 0).any(0).nonzero().flatten().tolist())
    scores.save(tmp_path)
    again = ConceptScores.load(tmp_path)
    assert again.signed
    torch.testing.assert_close(again.activity_by_place("x"), scores.activity_by_place("x"), atol=1e-3, rtol=1e-3)


def test_scores_do_not_depend_on_the_plan(sd, sae):
    def scored():
        return concept_activity(sd.pipe, {SITE: random_sae(k=3)}, LABELLED, {"x": "g", "y": "g"}, **CALL)[SITE]

    torch.manual_seed(5)
    bare = scored()
    sd.pipe.load_sae(sae)
    sd.pipe.steer({3: 9.0})
    steered = sd.run()
    torch.manual_seed(5)
    assert torch.equal(scored().activity, bare.activity)
    assert torch.equal(sd.run(), steered)


@pytest.mark.parametrize(
    "values",
    [
        torch.linspace(0, 4096, 4096).view(1, 4096, 1),  # a map of 64 x 64 whose latent fires at one end of it
        torch.tensor([[[1e5, 3e38, -1e30, 1e-30]]]),
        torch.tensor([[[70000.0]], [[1.0]], [[0.001]], [[0.0]]]),
        torch.tensor([[[1.2e-38, 0.0]]]),
    ],
)
def test_packed_values_keep_eleven_bits_at_extremes(values):
    again = unpack("x", pack("x", values), values.shape[-1])
    torch.testing.assert_close(again, values, atol=0, rtol=2**-11)
    assert torch.equal(unpack("x", pack("x", again), values.shape[-1]), again)


@pytest.mark.parametrize("side", [32, 64, 128])
def test_maps_of_any_size_survive_saving(side, tmp_path):
    """A latent that is active at one place has there as many times its mean as there are places."""
    places = torch.zeros(2, side * side, 8)
    places[0, 5, 3] = places[1, 7, 3] = side * side
    activity = torch.full((2, 1, 8), 1e5)
    activity[1] = 1e-3
    scores = ConceptScores(("x", "y"), ("g", "g"), torch.tensor([9.0]), activity, places, (side, side))
    scores.save(tmp_path)
    again = ConceptScores.load(tmp_path)
    assert torch.equal(again.places, places)
    torch.testing.assert_close(again.activity, activity, atol=0, rtol=2**-11)
    assert list(again.towards("x", percentile=0)) == [3]
    assert (tmp_path / "concepts.safetensors").stat().st_size < 2.5 * side * side + 2000  # bits, a few values


@pytest.mark.parametrize("site", SITES)
def test_files_of_earlier_versions_give_the_same_scores(site, tmp_path):
    with safe_open(MODELS / "saes" / site / "concepts.safetensors", "pt") as file:
        n = json.loads(file.metadata()["n_latents"])
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    scores = ConceptScores.load(MODELS / "saes" / site)
    for name, unit in (("activity", 1.0), ("places", 1.0), ("effect", stored["effect_unit"].numpy())):
        there = np.unpackbits(stored[f"{name}.there"].numpy(), axis=-1, count=n).astype(bool)
        expected = np.zeros(there.shape, np.float32)
        expected[there] = stored[f"{name}.values"].float().numpy()
        np.testing.assert_array_equal(getattr(scores, name).numpy(), expected * unit)
    scores.save(tmp_path)
    again = ConceptScores.load(tmp_path)
    assert torch.equal(again.activity, scores.activity) and torch.equal(again.places, scores.places)
    torch.testing.assert_close(again.effect, scores.effect, atol=0, rtol=2**-11)


def test_a_file_whose_places_were_cut_is_refused(scores, tmp_path):
    scores.save(tmp_path)
    path = tmp_path / "concepts.safetensors"
    with safe_open(path, "pt") as file:
        metadata, stored = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    stored["places.values"] = torch.full_like(stored["places.values"], 448).to(torch.float8_e4m3fn)
    save_file(stored, path, metadata=metadata)
    with pytest.raises(InputError, match="an earlier version cut its places at 448 times their mean"):
        ConceptScores.load(tmp_path)


def test_one_prompt_a_concept_is_enough(sd, sae):
    scores = concept_activity(sd.pipe, {SITE: sae}, LABELLED[:2], {"x": "g", "y": "g"}, **CALL)[SITE]
    assert scores.towards("x") and scores.away("x") and torch.isfinite(scores.importance("x")).all()


def test_scores_without_an_answer_get_a_sentence(scores):
    scores.activity[:] = 1.0
    scores.places[:] = 1.0
    with pytest.raises(InputError, match="No latent differs between images of 'neon' and of sepia, flat"):
        scores.towards("neon")
    with pytest.raises(InputError, match="No latent differs between images of 'cat' and of cat"):
        scores.towards("cat", instead_of="cat")
    with pytest.raises(InputError, match="No latent is more of 'neon' than of the others of its group"):
        scores.away("neon")
    scores.groups = ("style", "style", "style", "object", "background")
    for method in (scores.importance, scores.choose, scores.towards, scores.away, scores.measured_effect):
        with pytest.raises(InputError, match="'dog' is the only 'background', so that nothing tells it apart"):
            method("dog")
    scores.activity[:] = 0.0
    assert not scores.importance("neon").any()


def test_scores_that_do_not_fit_or_are_not_finite_are_refused(scores):
    arguments = {name: getattr(scores, name) for name in scores.__dataclass_fields__}
    for name, value, sentence in (
        (
            "activity",
            torch.full((5, 2, 200), torch.nan),
            "The activity of the concepts has numbers that are not finite",
        ),
        ("places", torch.ones(5, 4, 200), r"The places of the concepts has the shape \(5, 4, 200\), and not"),
        ("effect", torch.ones(4, 2, 200), r"The effect of the concepts has the shape \(4, 2, 200\), and not"),
    ):
        with pytest.raises(InputError, match=sentence):
            ConceptScores(**{**arguments, name: value})


def test_kinds_of_one_path_are_scored_apart(sd):
    """An SAE by its path alone is scored at the kind that it was trained at."""
    sites = [Site(SITE, kind=kind) for kind in KINDS]
    sae, trained = random_sae(), random_sae(site=f"{SITE}@update")
    groups = {"x": "g", "y": "g"}
    together = concept_activity(sd.pipe, dict.fromkeys(sites, sae), LABELLED[:2], groups, **CALL)
    assert list(together) == sites
    for site in sites:
        for c, (prompt, _) in enumerate(LABELLED[:2]):
            with sd.pipe.capture([site]) as held:
                sd.run(prompt=prompt, generator=torch.Generator().manual_seed(c), num_inference_steps=2)
            expected = sae.encode(held[site].rows("cond")).mean(1)  # (T, n)
            torch.testing.assert_close(together[site].activity[c], expected, atol=1e-5, rtol=1e-4)
    for key, site in ((SITE, f"{SITE}@update"), (Site(SITE), SITE), (f"{SITE}@input", f"{SITE}@input")):
        assert list(concept_activity(sd.pipe, {key: trained}, LABELLED[:2], groups, **CALL)) == [Site.of(site)]
    with pytest.raises(InputError, match=f"The site {SITE}@update is named twice"):
        concept_activity(sd.pipe, {SITE: trained, f"{SITE}@update": sae}, LABELLED[:2], groups, **CALL)


def test_what_concept_activity_cannot_score(sd, sae):
    calls = []
    sd.pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    groups = {"x": "g", "y": "g"}
    text = "text_encoder.text_model.encoder.layers.0"
    for site in (f"{SITE}@channels", f"{SITE}@input,vector", text, f"{SITE}@text"):
        for key in (site, Site.of(site), site.partition("@")[0]):
            with pytest.raises(InputError, match=f"The rows of {Site.of(site)} are no places of an image"):
                concept_activity(sd.pipe, {key: random_sae(site=site)}, LABELLED, groups, **CALL)
    with pytest.raises(InputError, match="No prompt shows z"):
        concept_activity(sd.pipe, {SITE: sae}, LABELLED, {**groups, "z": "g"}, **CALL)
    assert calls == []


def stored_scores(folder):
    with safe_open(folder / "concepts.safetensors", "pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("groups", [], "5 concepts have 0 groups"),
        ("groups", ["style"], "5 concepts have 1 groups"),
        ("groups", "style", "its groups is 'style' and no list"),
        ("groups", [1, 2, 3, 4, 5], "pass distinct names"),
        ("concepts", [], "0 concepts have 5 groups"),
        ("concepts", ["cat"] * 5, "pass distinct names"),
        ("concepts", [["cat"], "a", "b", "c", "d"], "pass distinct names"),
        ("grid", [], r"The grid of the concepts is \(\)"),
        ("grid", [6], r"The grid of the concepts is \(6,\)"),
        ("grid", [2.0, 3.0], "The grid of the concepts is"),
        ("grid", [-2, -3], "The grid of the concepts is"),
        ("grid", {"2": 3}, "and no list"),
        ("signed", "no", "its signed is 'no'"),
        ("n_latents", 199, "its activity has"),
        ("n_latents", 100, "its activity has"),
        ("n_latents", 300, "its activity has"),
        ("n_latents", -1, "cannot be read as concept scores"),
        ("n_latents", "200", "cannot be read as concept scores"),
        ("n_latents", None, "cannot be read as concept scores"),
    ],
)
def test_metadata_that_make_no_sense_are_refused(scores, name, value, sentence, tmp_path):
    scores.save(tmp_path)
    metadata, stored = stored_scores(tmp_path)
    save_file(stored, tmp_path / "concepts.safetensors", metadata={**metadata, name: json.dumps(value)})
    with pytest.raises(InputError, match=sentence):
        ConceptScores.load(tmp_path)


def test_metadata_that_are_nested_without_end_are_refused(scores, tmp_path):
    scores.save(tmp_path)
    metadata, stored = stored_scores(tmp_path)
    save_file(stored, tmp_path / "concepts.safetensors", metadata={**metadata, "grid": "[" * 100_000})
    with pytest.raises(InputError, match="cannot be read as concept scores"):
        ConceptScores.load(tmp_path)


@pytest.mark.parametrize(
    ("timesteps", "sentence"),
    [
        ([torch.nan, 100.0], "pass finite ones"),
        ([900.0, 900.0], "hold one twice"),
        ([[900.0, 100.0]], "pass finite ones"),
        ([], "pass finite ones"),
        (900.0, "pass finite ones"),
    ],
)
def test_timesteps_that_make_no_sense_are_refused(scores, timesteps, sentence, tmp_path):
    scores.save(tmp_path)
    metadata, stored = stored_scores(tmp_path)
    save_file({**stored, "timesteps": torch.tensor(timesteps)}, tmp_path / "concepts.safetensors", metadata=metadata)
    with pytest.raises(InputError, match=sentence):
        ConceptScores.load(tmp_path)


@pytest.mark.parametrize("name", ["activity.unit", "places.unit", "effect.unit"])
def test_scores_without_their_unit_are_refused(scores, name, tmp_path):
    scores.save(tmp_path)
    metadata, stored = stored_scores(tmp_path)
    del stored[name]
    save_file(stored, tmp_path / "concepts.safetensors", metadata=metadata)
    with pytest.raises(InputError, match=f"it holds no {name}"):
        ConceptScores.load(tmp_path)


def test_scores_of_an_earlier_version_without_their_unit_are_refused(tmp_path):
    metadata, stored = stored_scores(MODELS / "saes" / SITES[0])
    save_file(stored, tmp_path / "concepts.safetensors", metadata=metadata)
    assert ConceptScores.load(tmp_path).effect is not None
    del stored["effect_unit"]
    save_file(stored, tmp_path / "concepts.safetensors", metadata=metadata)
    with pytest.raises(InputError, match="it holds no effect_unit"):
        ConceptScores.load(tmp_path)
