"""UA, IRA and CRA on outcomes counted by hand."""

import pytest

from diffusers_sae.evaluation.shares import Share
from diffusers_sae.evaluation.unlearning import Outcome, unlearning_accuracy

OUTCOMES = [
    # asked style, object; seen style, object; artefact
    Outcome("neon", "cat", "flat", "cat", False),  # removed, object kept
    Outcome("neon", "dog", "neon", "dog", False),  # not removed
    Outcome("neon", "cat", "sepia", "dog", True),  # removed, object lost
    Outcome("flat", "cat", "flat", "cat", False),
    Outcome("flat", "dog", "neon", "dog", False),  # another style hurt
    Outcome("sepia", "dog", "sepia", "cat", False),  # object hurt
]


def test_removing_a_style():
    r = unlearning_accuracy(OUTCOMES, "style", "neon")
    assert (r.ua.hits, r.ua.total) == (2, 3)
    assert (r.ira.hits, r.ira.total) == (2, 3)
    assert (r.cra.hits, r.cra.total) == (4, 6)
    assert (r.cra_target.hits, r.cra_target.total) == (2, 3)
    assert (r.artefacts.hits, r.artefacts.total) == (1, 6)


def test_removing_an_object():
    r = unlearning_accuracy(OUTCOMES, "object", "cat")
    assert (r.ua.hits, r.ua.total) == (1, 3)
    assert (r.ira.hits, r.ira.total) == (2, 3)
    assert (r.cra.hits, r.cra.total) == (3, 6)


def test_concepts_add_up():
    r = unlearning_accuracy(OUTCOMES, "style", "neon") + unlearning_accuracy(OUTCOMES, "style", "flat")
    assert (r.ua.hits, r.ua.total) == (2 + 1, 3 + 2)


def test_wilson_interval():
    low, high = Share(9, 10).interval()
    assert low == pytest.approx(0.5958, abs=1e-3) and high == pytest.approx(0.9821, abs=1e-3)
