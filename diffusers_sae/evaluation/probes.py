"""Linear probes: how well a linear map reads labels off a representation, such as the code of an SAE."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from ..errors import InputError

PENALTIES = (1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Weights of the square norm that are tried. Scaled rows have entries of variance 1, at least on average."""


def f_statistic(x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """`(m,)`: between-class over within-class mean square of each entry of `x (N, m)` (one-way analysis of variance).

    0 for an entry that does not vary, and for all if there is one class only.
    """
    classes, y = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        return np.zeros(x.shape[1])
    shows = np.eye(len(classes), dtype=x.dtype)[y]  # (N, classes)
    counts = shows.sum(0)[:, None]
    centred = x - x.mean(0)
    centred -= centred.mean(0)  # the first mean is rounded, by which large entries of little spread seem to differ
    total = np.einsum("nm,nm->m", centred, centred).astype(float)
    between = (np.square((shows.T @ centred).astype(float)) / counts).sum(0)
    within = np.maximum(total - between, 1e-6 * total)
    freedom = max(len(x) - len(classes), 1) / (len(classes) - 1)
    return np.divide(between * freedom, within, out=np.zeros_like(total), where=(np.ptp(x, axis=0) > 0) & (within > 0))


SELECTIONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "mean": lambda x, labels: np.abs(x.mean(0)),
    "variance": lambda x, labels: x.var(0),
    "f": f_statistic,
}
"""What the entries of a representation `(N, m)` are ranked by: mean activation, variance, or F, which takes labels."""

SCALINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "each": lambda x: x.std(0) + 1e-3 * np.sqrt(x.var(0).mean()) + 1e-12,
    "common": lambda x: np.sqrt(x.var(0).mean(keepdims=True)) + 1e-12,
}
"""What centred entries are divided by: each by its own standard deviation, or all by one number."""


@dataclass(frozen=True)
class Probe:
    """A linear classifier that reads some entries of a representation; made by `fit_probe`.

    `entries (m,)`; `mean (m,)` and `scale (m,)` or `(1,)` of them in the training rows; `weights (m, classes)` and
    `bias (classes,)`; `classes` holds the labels. `selection`, `scaling` and `penalty` are those that
    cross-validation chose, with the accuracy `cross_validated` on the folds left out.
    """

    entries: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray
    bias: np.ndarray
    classes: np.ndarray
    selection: str
    scaling: str
    penalty: float
    cross_validated: float = float("nan")

    def predict(self, x: np.ndarray) -> np.ndarray:
        """The label with the highest score of each row of the whole representation, `(N, M)`."""
        return self._of_entries(x[:, self.entries])

    def _of_entries(self, rows: np.ndarray) -> np.ndarray:
        """The labels of rows `(N, m)` of the entries that are read."""
        weights = self.weights / self.scale.reshape(-1, 1)
        return self.classes[(rows @ weights + (self.bias - self.mean @ weights)).argmax(1)]

    def accuracy(self, x: np.ndarray, labels: np.ndarray) -> float:
        return float((self.predict(x) == labels).mean())


def ridge_weights(x: np.ndarray, targets: np.ndarray, penalties: Sequence[float]) -> Iterator[np.ndarray]:
    """For each penalty λ, the weights `(m, c)` that minimise `‖X W - Y‖² / N + λ ‖W‖²`, in closed form.

    Args:
        x: rows `(N, m)`.
        targets: `(N, c)`.
    """
    count, width = x.shape
    primal = width <= count
    gram = (x.T @ x if primal else x @ x.T) / count
    sides = (x.T @ targets if primal else targets) / count
    if len(penalties) == 1:  # eigenvectors pay where several penalties share them
        solutions = iter([np.linalg.solve(gram + penalties[0] * np.eye(len(gram)), sides)])
    else:
        values, v = np.linalg.eigh(gram)
        projected = v.T @ sides
        solutions = (v @ (projected / (np.maximum(values, 0) + penalty)[:, None]) for penalty in penalties)
    for solution in solutions:
        yield solution if primal else x.T @ solution


def fit_probe(
    x: np.ndarray,
    labels: np.ndarray,
    *,
    entries: int | None = 512,
    selections: Sequence[str] = tuple(SELECTIONS),
    scalings: Sequence[str] = tuple(SCALINGS),
    penalties: Sequence[float] = PENALTIES,
    folds: int = 5,
    groups: np.ndarray | None = None,
    seed: int = 0,
) -> Probe:
    """A ridge classifier of the labels, from the highest entries of a representation.

    Ridge regression of one column for each class, 1 where a row has that label. Selection, scaling and penalty are
    those with the best accuracy in cross-validation over the rows given here, each fold's entries being selected
    without its labels; no other row is looked at.

    Args:
        x: rows `(N, M)`.
        labels: `(N,)`.
        entries: how many are read; all, if None or if there are no more.
        selections: what they may be ranked by, of `SELECTIONS`.
        scalings: what they may be divided by, of `SCALINGS`.
        penalties: weights of the square norm that are tried.
        folds: parts into which the rows are drawn by `seed`.
        groups: `(N,)`, of which group a row is, such as the image it was taken from: rows of one group fall into the
            same part, so that no row is judged by a probe that knows its like. By default each row is one.

    Raises:
        InputError: shapes that do not fit, fewer rows or groups than folds, one class only, or an unknown selection or
            scaling.
    """
    of = np.arange(len(x)) if groups is None else np.unique(groups, return_inverse=True)[1]
    _check(x, labels, of, selections, scalings, folds)
    classes, y = np.unique(labels, return_inverse=True)
    targets = np.eye(len(classes))[y]
    every = entries is None or entries >= x.shape[1]
    settings = list(product(selections[:1] if every else selections, scalings))
    hits = {(*setting, penalty): 0 for setting in settings for penalty in penalties}
    part = (np.random.default_rng(seed).permutation(of.max() + 1) % folds)[of]
    for fold in range(folds):
        train, test = part != fold, part == fold
        seen, left_out = x[train], x[test]
        for selection in dict.fromkeys(s for s, _ in settings):
            top = _top(seen, y[train], selection, entries)
            fitted, judged = seen[:, top], left_out[:, top].astype(float)
            for scaling in scalings:
                for probe in _probes(fitted, targets[train], top, selection, scaling, penalties):
                    hits[selection, scaling, probe.penalty] += int((probe._of_entries(judged) == y[test]).sum())
    selection, scaling, penalty = max(hits, key=lambda key: hits[key])
    top = _top(x, y, selection, entries)
    (probe,) = _probes(x[:, top], targets, top, selection, scaling, [penalty])
    return replace(probe, classes=classes, cross_validated=hits[selection, scaling, penalty] / len(y))


def _top(x: np.ndarray, y: np.ndarray, selection: str, entries: int | None) -> np.ndarray:
    if entries is None or entries >= x.shape[1]:
        return np.arange(x.shape[1])
    return np.argsort(-SELECTIONS[selection](x, y), kind="stable")[:entries]


def _probes(
    x: np.ndarray, targets: np.ndarray, top: np.ndarray, selection: str, scaling: str, penalties: Sequence[float]
) -> Iterator[Probe]:
    rows, bias = x.astype(float), targets.mean(0)
    mean, scale = rows.mean(0), SCALINGS[scaling](rows)
    rows = (rows - mean) / scale
    for penalty, weights in zip(penalties, ridge_weights(rows, targets - bias, penalties), strict=True):
        yield Probe(top, mean, scale, weights, bias, np.arange(len(bias)), selection, scaling, penalty)


def _check(
    x: np.ndarray, labels: np.ndarray, of: np.ndarray, selections: Sequence[str], scalings: Sequence[str], folds: int
) -> None:
    if x.ndim != 2 or labels.shape != x.shape[:1] or of.shape != x.shape[:1] or not 2 <= folds <= len(np.unique(of)):
        raise InputError(
            f"There are rows of shape {x.shape}, labels of shape {labels.shape}, groups of shape {of.shape} and "
            f"{folds} folds; pass rows (N, M), a label and a group for each, and 2 folds to as many as there are "
            "groups."
        )
    if not np.isfinite(x).all():
        raise InputError("Some rows hold numbers that are not finite; leave those rows out.")
    if len(np.unique(labels)) < 2:
        raise InputError("All rows have the same label; a probe needs two or more.")
    for known, named in ((SELECTIONS, selections), (SCALINGS, scalings)):
        for name in named:
            if name not in known:
                raise InputError(f"{name!r} is not known; choose among {', '.join(known)}.")
