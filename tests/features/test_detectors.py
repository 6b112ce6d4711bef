"""Detectors tell prompts apart at the first step, and find their bounds by definition."""

import numpy as np
import pytest
import torch
from conftest import SITE, random_sae

from diffusers_sae import InputError
from diffusers_sae.features.detectors import ConceptDetectors, _bound, concept_detectors

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
