"""UA, IRA, CRA and artefacts on outcomes counted by hand."""

import pytest

from diffusers_sae.evaluation.rows import Rows
from diffusers_sae.evaluation.unlearning import Outcome, unlearning_accuracy

OUTCOMES = [
    # number; asked style, object; seen style, object; seen bare; artefact
    Outcome(0, "neon", "cat", "flat", "cat", "neon", "cat", False),  # removed, object kept
    Outcome(1, "neon", "dog", "neon", "dog", "neon", "dog", False),  # not removed
    Outcome(2, "neon", "cat", "sepia", "dog", "neon", "cat", True),  # removed, object lost
    Outcome(3, "flat", "cat", "flat", "cat", "flat", "cat", None),  # not edited
    Outcome(4, "flat", "dog", "neon", "dog", "flat", "dog", False),  # another style hurt
    Outcome(5, "sepia", "dog", "sepia", "cat", "sepia", "cat", None),  # not edited, and wrong as it was
]


def counts(accuracy, name):
    share = accuracy.share(name)
    return share.hits, share.judgements


def test_removing_a_style():
    r = unlearning_accuracy(OUTCOMES, "style", "neon")
    assert counts(r, "ua") == (2, 3)
    assert counts(r, "ira") == (2, 3)
    assert counts(r, "cra") == (4, 6)
    assert counts(r, "cra_target") == (2, 3)
    assert counts(r, "ira_bare") == (3, 3) and counts(r, "cra_bare") == (5, 6)


def test_artefacts_are_counted_among_edited_images():
    r = unlearning_accuracy(OUTCOMES, "style", "neon")
    assert counts(r, "edited") == (4, 6)
    assert counts(r, "artefacts") == (1, 4)
    unedited = unlearning_accuracy([o for o in OUTCOMES if o.artefact is None], "style", "neon")
    assert unedited.as_dict()["artefacts"] == {"value": None, "low": None, "high": None, "images": 0}


@pytest.mark.parametrize("domain", ["style", "object"])
def test_edited_images_bound_what_a_removal_changes(domain):
    r = unlearning_accuracy(OUTCOMES, domain, "neon" if domain == "style" else "cat")
    for name in ("ira", "cra"):
        by, edited = (r.share(other) for other in (f"{name}_bare", "edited"))
        assert abs(r.share(name).hits - by.hits) <= edited.hits


def test_removing_an_object():
    r = unlearning_accuracy(OUTCOMES, "object", "cat")
    assert counts(r, "ua") == (1, 3)
    assert counts(r, "ira") == (2, 3)
    assert counts(r, "cra") == (3, 6)


def test_concepts_add_up_over_the_same_images():
    r = unlearning_accuracy(OUTCOMES, "style", "neon") + unlearning_accuracy(OUTCOMES, "style", "flat")
    assert counts(r, "ua") == (2 + 1, 3 + 2)
    cra = r.as_dict()["cra"]
    assert (cra["images"], cra["judgements"], cra["interval"]) == (6, 12, "bootstrap over images")


def test_rows_are_enough_to_compute_every_share():
    r = unlearning_accuracy(reversed(OUTCOMES), "style", "neon")
    record = r.rows_as_dict()["neon"]
    assert record["images"] == "0-5" and record["ua"] == "101---" and record["artefacts"] == "001-0-"
    again = Rows.from_dict(record)
    assert {name: again.share(name).as_dict() for name in again.columns} == r.as_dict()
