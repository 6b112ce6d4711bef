"""Shares of images on counts made by hand, and how often their intervals hold the truth."""

import numpy as np
import pytest
from scipy.stats import binomtest

from diffusers_sae.evaluation.shares import Share, wilson


def test_judgements_are_counted_once_per_image():
    share = Share.of([True, False, True, True], ["a", "a", "b", "c"])
    assert (share.hits, share.judgements, share.images, share.value) == (3, 4, 3, 0.75)


def test_a_sum_joins_judgements_of_the_same_image():
    total = Share.of([True, False], [1, 2]) + Share.of([True, True], [2, 3])
    assert (total.hits, total.judgements, total.images) == (3, 4, 3)
    assert sum([total, total], Share()).images == 3


def test_one_judgement_per_image_has_the_interval_of_wilson():
    share = Share.of([True] * 9 + [False], range(10))
    expected = binomtest(9, 10).proportion_ci(0.95, method="wilson")
    assert share.interval() == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert share.as_dict() == {"value": 0.9, "low": 0.5958, "high": 0.9821, "images": 10, "interval": "Wilson"}


@pytest.mark.parametrize(("hits", "images"), [(0, 7), (7, 7), (100, 224)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_wilson_is_that_of_scipy(hits, images, confidence):
    expected = binomtest(hits, images).proportion_ci(confidence, method="wilson")
    assert wilson(hits / images, images, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_copies_of_the_same_images_narrow_no_interval():
    """The objects' IRA: 214 of 224 images are seen right, whichever of 27 other objects is removed."""
    hits = [True] * 214 + [False] * 10
    once, often = Share.of(hits, range(224)), Share.of(27 * hits, 27 * list(range(224)))
    assert often.value == once.value and (often.judgements, often.images) == (6048, 224)
    assert often.interval() == pytest.approx(once.interval(), abs=0.01)
    assert often.as_dict()["interval"] == "bootstrap over images"
    told_before = wilson(often.value, 6048)
    assert often.interval()[0] < told_before[0] - 0.02 and often.interval()[1] > told_before[1] + 0.01


def test_where_all_images_agree_their_number_still_tells():
    share = Share.of([True] * 56, 2 * list(range(28)))
    assert share.as_dict() == {
        "value": 1.0, "low": 0.8794, "high": 1.0, "images": 28, "judgements": 56, "interval": "Wilson, distinct images",
    }  # fmt: skip
    halves = Share.of([True, False] * 28, [i // 2 for i in range(56)])
    assert halves.interval() == pytest.approx(wilson(0.5, 28))


def test_intervals_are_the_same_each_time():
    share = Share.of(np.random.default_rng(3).random(60) < 0.7, [i % 20 for i in range(60)])
    assert share.interval() == share.interval()
    low, high = share.interval()
    assert low < share.value < high and share.interval(0.5)[0] > low


def test_nothing_counted_has_no_value():
    assert Share().as_dict() == {"value": None, "low": None, "high": None, "images": 0}


@pytest.mark.parametrize(
    ("images", "targets", "truth", "changed"), [(224, 27, 0.95, 0.03), (100, 8, 0.9, 0.3), (28, 4, 0.8, 0.3)]
)
def test_intervals_cover_the_truth(images, targets, truth, changed):
    """Images are seen right by chance `truth`; a target leaves an image as it is, or changes it by chance `changed`."""
    rng, inside, pooled, draws = np.random.default_rng(0), 0, 0, 300
    for _ in range(draws):
        bare, fresh = rng.random(images) < truth, rng.random((targets, images)) < truth
        seen = np.where(rng.random((targets, images)) < changed, fresh, bare)
        share = Share.of(seen.ravel().tolist(), targets * list(range(images)))
        low, high = share.interval(resamples=499)
        inside += low <= truth <= high
        low, high = wilson(share.value, share.judgements)
        pooled += low <= truth <= high
    assert 0.91 <= inside / draws <= 0.985
    assert pooled / draws < 0.9  # counted as so many images, the same judgements say more than they know
