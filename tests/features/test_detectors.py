"""Detectors tell prompts apart at the first step, and find their bounds by definition."""

import json

import numpy as np
import pytest
import torch
from conftest import SITE, random_sae
from safetensors import safe_open
from safetensors.torch import save_file

from diffusers_sae import InputError, Site
from diffusers_sae.features.detectors import ConceptDetectors, _bound, _fit, concept_detectors

LABELLED = [("aaaa", ["a"]), ("bbbb", ["b"])] * 24
CALL = {"num_inference_steps": 4, "guidance_scale": 5.0, "height": 16, "width": 16}


@pytest.fixture
def detectors(sd):
    torch.manual_seed(0)
    return concept_detectors(sd.pipe, {SITE: random_sae(n_latents=64, k=16)}, LABELLED, ["a", "b"], **CALL)[SITE]


def test_prompts_are_told_apart_on_fresh_noise(sd, detectors):
    assert (detectors.accuracy >= 0.9).all()
    torch.manual_seed(0)
    sd.pipe.load_sae(random_sae(n_latents=64, k=16))
    prompts = ["aaaa", "bbbb", "aaaa", "bbbb", "bbbb", "aaaa"]
    generator = [torch.Generator().manual_seed(1000 + i) for i in range(6)]

    def run():
        return sd.run(prompt=prompts, generator=[g.manual_seed(1000 + i) for i, g in enumerate(generator)])

    bare = run()
    sd.pipe.steer({3: 5.0}, when=detectors.rule("b"))
    changed = [not torch.equal(old, new) for old, new in zip(bare, run(), strict=True)]
    assert changed == [p == "bbbb" for p in prompts]


def test_only_the_first_step_is_run(sd, monkeypatch):
    calls = []
    sd.pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    concept_detectors(sd.pipe, {SITE: random_sae()}, LABELLED, ["a", "b"], batch_size=16, **CALL)
    assert len(calls) == 3


def test_kinds_of_one_path_are_read_apart(sd):
    """An SAE by its path alone is read at the kind that it was trained at."""
    torch.manual_seed(0)
    sae = random_sae(n_latents=64, k=16, site=f"{SITE}@update")
    saes = {Site(SITE): sae, Site(SITE, kind="update"): sae}
    together = concept_detectors(sd.pipe, saes, LABELLED, ["a", "b"], **CALL)
    assert list(together) == list(saes)
    assert not torch.equal(together[SITE].weights, together[f"{SITE}@update"].weights)
    for key, site in ((Site(SITE), SITE), (SITE, f"{SITE}@update"), (f"{SITE}@update", f"{SITE}@update")):
        alone = concept_detectors(sd.pipe, {key: sae}, LABELLED, ["a", "b"], **CALL)
        assert list(alone) == [Site.of(site)] and torch.equal(alone[key].weights, together[site].weights)
    with pytest.raises(InputError, match=f"The site {SITE}@update is named twice"):
        concept_detectors(sd.pipe, {SITE: sae, Site.of(f"{SITE}@update"): sae}, LABELLED, ["a", "b"], **CALL)


def test_the_bound_has_the_highest_balanced_accuracy():
    rng = np.random.default_rng(0)
    labels = rng.random(60) < 0.3
    scores = rng.normal(size=60) + 1.5 * labels
    bound, accuracy = _bound(torch.tensor(scores), torch.tensor(labels))

    def balanced(b):
        return ((scores[labels] > b).mean() + (scores[~labels] <= b).mean()) / 2

    assert balanced(bound) == pytest.approx(accuracy)
    assert accuracy == pytest.approx(max(balanced(b) for b in np.sort(scores)[:-1]))


def test_they_survive_saving(detectors, tmp_path):
    detectors.save(tmp_path)
    loaded = ConceptDetectors.load(tmp_path)
    rule, before = loaded.rule("a", "eye"), detectors.rule("a", "eye")
    assert rule.features == before.features and rule.above == before.above and rule.adapter_name == "eye"


def test_bad_input_gets_a_sentence(sd, detectors, tmp_path):
    with pytest.raises(InputError, match="'c' has no detector; choose one of a, b"):
        detectors.rule("c")
    with pytest.raises(InputError, match="cannot be read as concept detectors"):
        ConceptDetectors.load(tmp_path)
    with pytest.raises(InputError, match="Too few prompts name c"):
        concept_detectors(sd.pipe, {SITE: random_sae()}, LABELLED, ["a", "c"], **CALL)


def fitted(codes, labels):
    """A detector of one concept, on three quarters of the codes."""
    return _fit(torch.tensor(codes), torch.tensor(labels)[:, None], 3 * len(codes) // 4, ("a",))


@pytest.mark.parametrize("constant", [0.1, 1e4, 1e-30])
def test_a_latent_that_is_the_same_for_all_prompts_is_not_read(constant):
    rng = np.random.default_rng(0)
    labels = rng.random(400) < 0.5
    codes = (rng.random((400, 4)) + 2 * labels[:, None] * [0, 0, 0, 1]).astype(np.float32)
    codes[:, 1] = constant
    detector = fitted(codes, labels)
    assert torch.isfinite(detector.weights).all() and detector.weights[0, 1] == 0 and detector.accuracy[0] == 1
    without = fitted(np.delete(codes, 1, axis=1), labels)
    torch.testing.assert_close(detector.weights[0, [0, 2, 3]], without.weights[0])


def test_latents_below_zero_are_read_too():
    rng = np.random.default_rng(0)
    labels = rng.random(400) < 0.5
    codes = (rng.random((400, 4)) + 2 * labels[:, None] * [0, 0, 0, 1]).astype(np.float32)
    above, below = fitted(codes, labels), fitted(-codes, labels)
    torch.testing.assert_close(below.weights, -above.weights)
    assert below.accuracy[0] == 1


def test_where_no_latent_differs_there_is_no_rule():
    detector = fitted(np.full((40, 3), 0.5, np.float32), [True, False] * 20)
    assert detector.accuracy.tolist() == [0.5]
    with pytest.raises(InputError, match="The detector of 'a' reads no latent"):
        detector.rule("a")


@pytest.mark.parametrize(
    ("scores", "labels", "accuracy"),
    [
        ([1.0, 1.0, 1.0, 1.0], [0, 0, 1, 1], 0.5),  # equal scores cannot be parted
        ([1.0, 1.0], [0, 1], 0.5),
        ([0.0, 1.0, 1.0, 1.0, 2.0], [0, 0, 1, 0, 1], 0.75),
        ([0.0, 1.0, 1.0, 2.0], [0, 0, 1, 1], 0.75),
        ([2.0, 1.0], [0, 1], 0.5),  # the wrong way round
        ([1.0, float(np.nextafter(np.float32(1), np.float32(2)))], [0, 1], 1.0),  # no number lies between
        ([3e38, 3.2e38], [0, 1], 1.0),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_a_bound_does_what_its_accuracy_says(scores, labels, accuracy, seed):
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    scores, labels = torch.tensor(scores)[order], torch.tensor(labels).bool()[order]
    bound, told = _bound(scores, labels)
    holds = scores > bound
    assert told == pytest.approx(accuracy)
    assert float(holds[labels].float().mean() + (~holds[~labels]).float().mean()) / 2 == pytest.approx(accuracy)


def test_detectors_do_not_depend_on_the_plan(sd, sae):
    def weights():
        torch.manual_seed(0)
        saes = {SITE: random_sae(n_latents=64, k=16)}
        return concept_detectors(sd.pipe, saes, LABELLED, ["a", "b"], **CALL)[SITE].weights

    bare = weights()
    sd.pipe.load_sae(sae)
    sd.pipe.steer({3: 9.0})
    steered = sd.run()
    assert torch.equal(weights(), bare)
    assert torch.equal(sd.run(), steered)


def test_a_detector_of_one_concept_is_saved(tmp_path):
    detector = fitted(np.eye(40, 4, dtype=np.float32), [True, False] * 20)
    detector.save(tmp_path)
    again = ConceptDetectors.load(tmp_path)
    assert torch.equal(again.bounds, detector.bounds) and torch.equal(again.accuracy, detector.accuracy)


def test_labels_that_tell_nothing_apart(sd):
    with pytest.raises(InputError, match="Too few prompts do without a; add some"):
        concept_detectors(sd.pipe, {SITE: random_sae()}, [("aaaa", ["a"])] * 8, ["a"], **CALL)
    with pytest.raises(InputError, match="Too few prompts name a"):
        concept_detectors(sd.pipe, {SITE: random_sae()}, [], ["a"], **CALL)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"weights": [[torch.nan, 1.0], [0.0, 1.0]]}, "not finite"),
        ({"bounds": [torch.nan, 1.0]}, "not finite"),
        ({"bounds": [1.0]}, "not as many"),
        ({"bounds": [[1.0], [1.0]]}, "not as many"),
        ({"weights": [1.0, 2.0]}, "without weights"),
        ({"concepts": "[]"}, "not as many"),
        ({"concepts": '["a"]'}, "not as many"),
        ({"concepts": '["a", "a"]'}, "twice"),
        ({"concepts": '"ab"'}, "no names"),
        ({"concepts": "[1, 2]"}, "no names"),
        ({"concepts": "{"}, "cannot be read as concept detectors"),
        ({"concepts": "[" * 100_000}, "cannot be read as concept detectors"),
    ],
)
def test_files_that_make_no_sense_are_refused(change, sentence, tmp_path):
    detectors = ConceptDetectors(("a", "b"), torch.eye(2), torch.ones(2), torch.ones(2))
    detectors.save(tmp_path)
    path = tmp_path / "detectors.safetensors"
    assert ConceptDetectors.load(tmp_path).concepts == ("a", "b")
    with safe_open(path, "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    metadata = {"concepts": change.get("concepts", json.dumps(["a", "b"]))}
    stored |= {key: torch.tensor(value) for key, value in change.items() if key != "concepts"}
    save_file(stored, path, metadata=metadata)
    with pytest.raises(InputError, match=sentence):
        ConceptDetectors.load(tmp_path)
