"""Linear probes against the normal equations, Fisher's F and labels that are known to be there or not."""

import numpy as np
import pytest
from scipy.stats import f_oneway

from diffusers_sae import InputError
from diffusers_sae.evaluation.probes import f_statistic, fit_probe, ridge_weights


@pytest.mark.parametrize("penalties", [(0.01, 2.0), (0.3,)])
@pytest.mark.parametrize("width", [6, 50])
def test_ridge_solves_the_normal_equations(width, penalties):
    rng = np.random.default_rng(0)
    x, targets = rng.normal(size=(20, width)), rng.normal(size=(20, 3))
    for penalty, weights in zip(penalties, ridge_weights(x, targets, penalties), strict=True):
        augmented = np.vstack([x, np.sqrt(20 * penalty) * np.eye(width)])  # ridge as least squares with more rows
        expected = np.linalg.lstsq(augmented, np.vstack([targets, np.zeros((width, 3))]), rcond=None)[0]
        np.testing.assert_allclose(weights, expected, atol=1e-9)


def test_f_equals_scipy():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 60) * 3
    x = rng.normal(size=(60, 5)) + labels[:, None] * np.array([0, 0.1, 0.3, 1, 0])
    x[:, 4] = 2.5
    expected = [f_oneway(*(x[labels == c, j] for c in np.unique(labels))).statistic for j in range(4)]
    np.testing.assert_allclose(f_statistic(x, labels), [*expected, 0], rtol=1e-9)


def rows(count, seed):
    """Labels 5, 6, 7 that entries 30 to 32 tell, small; entries 0 to 9 are large and tell nothing."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(5, 8, count)
    x = rng.normal(size=(count, 40)) * 0.3
    x[:, :10] = 50 + 5 * rng.normal(size=(count, 10))
    x[np.arange(count), 25 + labels] += 1.5
    return x, labels


def test_the_entries_that_tell_are_found_from_labels_alone():
    x, labels = rows(300, 0)
    new, expected = rows(300, 1)
    probe = fit_probe(x, labels, entries=3)
    assert probe.selection == "f" and sorted(probe.entries) == [30, 31, 32]
    assert probe.accuracy(new, expected) > 0.95 and set(probe.predict(new)) == {5, 6, 7}
    assert probe.cross_validated == pytest.approx(probe.accuracy(new, expected), abs=0.04)
    for selection in ("mean", "variance"):
        blind = fit_probe(x, labels, entries=3, selections=[selection])
        assert max(blind.entries) < 10 and blind.accuracy(new, expected) < 0.5
    assert fit_probe(x, labels, entries=None).accuracy(new, expected) > 0.95


def test_nothing_is_read_where_nothing_is():
    rng = np.random.default_rng(2)
    x, labels = rng.normal(size=(200, 400)), rng.integers(0, 4, 200)
    probe = fit_probe(x, labels, entries=20)  # 20 of 400 are picked by their labels, which must not leak into the folds
    assert probe.cross_validated < 0.4
    assert probe.accuracy(x, labels) > probe.cross_validated


def test_rows_of_a_group_are_not_judged_by_each_other():
    rng = np.random.default_rng(5)
    image = rng.permutation(240) // 3  # three rows of each, alike but for noise; their labels say nothing of others'
    x = rng.normal(size=(80, 200))[image] + 0.1 * rng.normal(size=(240, 200))
    labels = rng.integers(0, 4, 80)[image]
    assert fit_probe(x, labels).cross_validated > 0.8
    assert fit_probe(x, labels, groups=np.char.add("image ", image.astype(str))).cross_validated < 0.45


def test_predictions_equal_the_formula_on_the_whole_representation():
    x, labels = rows(80, 3)
    probe = fit_probe(x, labels, entries=None, selections=["mean"], scalings=["each"], penalties=[0.1])
    scale = x.std(0) + 1e-3 * np.sqrt(x.var(0).mean())
    a = (x - x.mean(0)) / scale
    y = (labels[:, None] == np.array([5, 6, 7])).astype(float)
    w = np.linalg.solve(a.T @ a + 80 * 0.1 * np.eye(40), a.T @ (y - y.mean(0)))
    np.testing.assert_allclose(probe.weights, w, atol=1e-10)
    new, _ = rows(50, 4)
    scores = (new - x.mean(0)) / scale @ w + y.mean(0)
    assert (probe.predict(new) == 5 + scores.argmax(1)).all()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"labels": np.zeros(20)}, "same label"),
        ({"labels": np.arange(19)}, "a label and a group for each"),
        ({"folds": 21}, "2 folds to as many as there are groups"),
        ({"groups": np.arange(20) // 10, "folds": 3}, "as many as there are groups"),
        ({"groups": np.arange(19)}, "and a group for each"),
        ({"selections": ["median"]}, "choose among mean, variance, f"),
        ({"scalings": ["none"]}, "choose among each, common"),
    ],
)
def test_bad_input_gets_a_sentence(arguments, sentence):
    given = {"x": np.ones((20, 3)), "labels": np.arange(20) % 2, **arguments}
    with pytest.raises(InputError, match=sentence):
        fit_probe(given.pop("x"), given.pop("labels"), **given)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e8, 1e-20])
def test_entries_that_do_not_vary_tell_nothing(dtype, value):
    x, labels = rows(300, 0)
    x[:, 5] = value
    x = x.astype(dtype)
    assert f_statistic(x, labels)[5] == 0
    probe = fit_probe(x, labels, entries=3)
    assert sorted(probe.entries) == [30, 31, 32]


@pytest.mark.parametrize("scaling", ["each", "common"])
def test_rows_that_are_all_the_same_give_the_commonest_label(scaling):
    labels = np.array([0] * 12 + [1] * 30)
    probe = fit_probe(np.full((42, 4), 0.3), labels, scalings=[scaling])
    assert np.isfinite(probe.weights).all() and probe.accuracy(np.full((42, 4), 0.3), labels) == 30 / 42


def test_a_fold_that_holds_all_rows_of_a_class():
    x, labels = rows(40, 0)
    labels = np.where(np.arange(40) == 7, 6, 5)
    assert np.isfinite(fit_probe(x, labels, entries=3).weights).all()
    assert not f_statistic(x, np.zeros(40)).any()
    x[3, 3] = np.nan
    with pytest.raises(InputError, match="not finite"):
        fit_probe(x, labels)
