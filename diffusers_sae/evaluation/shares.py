"""Shares of images, with confidence intervals over images."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np

RESAMPLES = 9999


class Share:
    """The share of judgements that hold, each of an image; an image may be judged several times, once per target.

    Judgements of one image depend on each other, so that intervals are over images: the more judgements of the same
    images, the narrower no interval gets. `images` identify the images; adding shares joins judgements of the same one.
    """

    def __init__(self) -> None:
        self._by_image: dict[Hashable, tuple[int, int]] = {}  # of each image: those that hold, and all

    @classmethod
    def of(cls, hits: Iterable[bool], images: Iterable[Hashable]) -> Share:
        """The share of `hits`, each of the image at the same place of `images`."""
        share = cls()
        for hit, image in zip(hits, images, strict=True):
            share.count(bool(hit), image)
        return share

    def count(self, hit: bool, image: Hashable) -> None:
        hits, judgements = self._by_image.get(image, (0, 0))
        self._by_image[image] = hits + hit, judgements + 1

    def __add__(self, other: Share) -> Share:
        total = Share()
        for share in (self, other):
            for image, (hits, judgements) in share._by_image.items():
                before = total._by_image.get(image, (0, 0))
                total._by_image[image] = before[0] + hits, before[1] + judgements
        return total

    @property
    def hits(self) -> int:
        return sum(hits for hits, _ in self._by_image.values())

    @property
    def judgements(self) -> int:
        return sum(judgements for _, judgements in self._by_image.values())

    @property
    def images(self) -> int:
        """Number of distinct images."""
        return len(self._by_image)

    @property
    def value(self) -> float:
        """Raises `ZeroDivisionError` if nothing was counted."""
        return self.hits / self.judgements

    def interval(self, confidence: float = 0.95, resamples: int = RESAMPLES) -> tuple[float, float]:
        """Wilson's interval if every image is judged once, else a bootstrap over images (see `_bootstrap`)."""
        return self._interval(confidence, resamples)[:2]

    def as_dict(self) -> dict[str, Any]:
        """Value, 95 % interval and how it was made, numbers of distinct images and, if they differ, of judgements.

        The values are `None` if nothing was counted.
        """
        if not self.judgements:
            return {"value": None, "low": None, "high": None, "images": 0}
        low, high, method = self._interval(0.95, RESAMPLES)
        judgements = {"judgements": self.judgements} if self.judgements != self.images else {}
        numbers = {"value": round(self.value, 4), "low": round(low, 4), "high": round(high, 4)}
        return {**numbers, "images": self.images, **judgements, "interval": method}

    def _interval(self, confidence: float, resamples: int) -> tuple[float, float, str]:
        if self.judgements > self.images:
            low, high = self._bootstrap(confidence, resamples)
            if np.isfinite([low, high]).all():
                return low, high, "bootstrap over images"
        method = "Wilson" if self.judgements == self.images else "Wilson, distinct images"
        return *wilson(self.value, self.images, confidence), method

    def _bootstrap(self, confidence: float, resamples: int) -> tuple[float, float]:
        """BCa interval: images are drawn anew with all their judgements; NaN if every image has the same share.

        Then, as where all judgements hold, resampling shows no spread at all, although more images would.
        """
        from scipy.stats import bootstrap

        counts = np.array(list(self._by_image.values()), dtype=float)  # (images, 2)
        hits, judgements = counts.T
        if np.ptp(hits / judgements) == 0:
            return float("nan"), float("nan")
        interval = bootstrap(
            (hits, judgements), _ratio, paired=True, vectorized=True, n_resamples=resamples, batch=1000,
            confidence_level=confidence, method="BCa", rng=np.random.default_rng(0),
        ).confidence_interval  # fmt: skip
        return float(interval.low), float(interval.high)


def wilson(share: float, images: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share of `images` independent images.

    The share may be one that no whole number of them has: that of several judgements per image.
    """
    from scipy.special import ndtri

    z = float(ndtri(0.5 + confidence / 2))
    middle = share + z * z / 2 / images
    half = z * (share * (1 - share) / images + z * z / 4 / images**2) ** 0.5
    whole = 1 + z * z / images
    return max((middle - half) / whole, 0.0), min((middle + half) / whole, 1.0)


def _ratio(hits: np.ndarray, judgements: np.ndarray, axis: int = -1) -> np.ndarray:
    return hits.sum(axis=axis) / judgements.sum(axis=axis)
