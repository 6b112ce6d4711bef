"""The paired t-test, against its textbook formula and Student's density summed numerically."""

import math

import numpy as np
import pytest

from diffusers_sae import InputError
from diffusers_sae.evaluation.paired import paired_t_test


def density(x, freedom):
    constant = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    return constant * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)


def test_against_the_formula():
    rng = np.random.default_rng(0)
    before = rng.normal(size=12)
    after = before + rng.normal(0.4, 0.8, size=12)
    found = paired_t_test(before.tolist(), after.tolist())
    difference = [b - a for a, b in zip(before, after, strict=True)]
    mean = sum(difference) / 12
    spread = math.sqrt(sum((d - mean) ** 2 for d in difference) / 11)
    t = mean / (spread / math.sqrt(12))
    assert found.difference == pytest.approx(mean) and found.t == pytest.approx(t) and found.pairs == 12
    inside = np.linspace(-abs(t), abs(t), 200_001)
    assert found.p == pytest.approx(1 - np.trapezoid(density(inside, 11), inside), rel=1e-6)
    assert found.high - mean == pytest.approx(2.200985 * spread / math.sqrt(12), rel=1e-5)  # the table's t(11, 0.975)
    assert found.before == pytest.approx(before.mean()) and found.after == pytest.approx(after.mean())


def test_the_direction_has_a_sign():
    assert paired_t_test([1, 2, 3], [2, 3.1, 4]).t > 0 > paired_t_test([2, 3.1, 4], [1, 2, 3]).t


def test_where_no_pair_differs():
    found = paired_t_test([0.1, 0.5, 0.5], [0.1, 0.5, 0.5])
    assert (found.difference, found.low, found.high, found.t, found.p, found.pairs) == (0, 0, 0, 0, 1, 3)


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ([1.0, 2.0, 3.0], [2.0, 3.0, 4.0], "All 3 pairs differ by 1"),
        ([0.1, 0.2], [0.2, 0.3], "no spread"),
        ([1.0], [2.0], "at least 2"),
        ([1.0, 2.0], [1.0], "one length"),
        ([1.0, math.nan], [1.0, 2.0], "not finite"),
    ],
)
def test_bad_input_gets_a_sentence(before, after, sentence):
    with pytest.raises(InputError, match=sentence):
        paired_t_test(before, after)
