"""The paired t-test: whether one of two measurements of the same things is larger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from ..errors import InputError

ROUNDING = 1e-14
"""By how much two differences may differ by rounding, in parts of what was measured."""


@dataclass(frozen=True)
class PairedTest:
    """Means before and after, mean difference with its 95 % interval, Student's t and the two-sided p, over n pairs."""

    before: float
    after: float
    difference: float
    low: float
    high: float
    t: float
    p: float
    pairs: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def paired_t_test(before: Sequence[float], after: Sequence[float]) -> PairedTest:
    """Test whether `after - before` has a mean other than 0.

    If no pair differs, t is 0 and p is 1.

    Raises:
        InputError: fewer than two pairs, numbers that are not finite, or the same difference in all pairs, which has no
            spread to compare it with.
    """
    from scipy.stats import ttest_rel

    a, b = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if a.ndim != 1 or a.shape != b.shape or len(a) < 2:
        raise InputError(f"There are {a.shape} and {b.shape} measurements; pass two lists of one length, at least 2.")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError("Some measurements are not finite numbers; leave those pairs out.")
    means = float(a.mean()), float(b.mean()), float((b - a).mean())
    if (a == b).all():
        return PairedTest(*means, low=0.0, high=0.0, t=0.0, p=1.0, pairs=len(a))
    if np.ptp(b - a) <= ROUNDING * max(np.abs(a).max(), np.abs(b).max()):
        raise InputError(f"All {len(a)} pairs differ by {means[2]:g}, so that there is no spread to test it against.")
    found = ttest_rel(b, a)
    low, high = found.confidence_interval()
    return PairedTest(*means, float(low), float(high), float(found.statistic), float(found.pvalue), len(a))
