"""Shares of images, with confidence intervals."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Share:
    """`hits` of `total`."""

    hits: int = 0
    total: int = 0

    def count(self, hit: bool) -> None:
        self.hits += hit
        self.total += 1

    @property
    def value(self) -> float:
        return self.hits / self.total

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's interval of the share."""
        from scipy.stats import binomtest

        low, high = binomtest(self.hits, self.total).proportion_ci(confidence, method="wilson")
        return float(low), float(high)

    def __add__(self, other: Share) -> Share:
        return Share(self.hits + other.hits, self.total + other.total)

    def as_dict(self) -> dict[str, object]:
        low, high = self.interval()
        return {"value": round(self.value, 4), "low": round(low, 4), "high": round(high, 4), "images": self.total}
