"""Judgements of images as a table: one row per image and target, from which every share can be computed anew."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ..errors import InputError
from .shares import Share

SYMBOLS: dict[bool | None, str] = {False: "0", True: "1", None: "-"}
VALUES = {symbol: value for value, symbol in SYMBOLS.items()}


@dataclass(frozen=True)
class Rows:
    """Judgements of images for one target: a column per share, which holds for each image True, False or, where the
    share does not count the image, `None`.

    `images` are numbers that identify the images among those of all targets: images of one number share their prompt
    and noise.
    """

    images: Sequence[int]
    columns: Mapping[str, Sequence[bool | None]]

    def __post_init__(self) -> None:
        for name, column in self.columns.items():
            if len(column) != len(self.images):
                raise InputError(
                    f"Column {name!r} has {len(column)} judgements of {len(self.images)} images; pass one per image, "
                    "None where it is not counted."
                )

    def share(self, column: str) -> Share:
        judged = [(i, hit) for i, hit in zip(self.images, self.columns[column], strict=True) if hit is not None]
        return Share.of((hit for _, hit in judged), (i for i, _ in judged))

    def as_dict(self) -> dict[str, str]:
        """Short text for JSON: images as ranges `"0-7,12"`, each column as a string of `1`, `0` and `-`."""
        columns = {name: "".join(SYMBOLS[hit] for hit in column) for name, column in self.columns.items()}
        return {"images": _ranges(self.images), **columns}

    @classmethod
    def from_dict(cls, record: Mapping[str, str]) -> Rows:
        columns = {name: [VALUES[s] for s in text] for name, text in record.items() if name != "images"}
        return cls(_numbers(record["images"]), columns)

    def figures(self) -> dict[str, Any]:
        """Every share, and the rows that they are computed from."""
        return {**{name: self.share(name).as_dict() for name in self.columns}, "rows": self.as_dict()}


def pooled(rows: Iterable[Rows], column: str) -> Share:
    """A column's share over the rows of several targets."""
    return sum((each.share(column) for each in rows), Share())


def _ranges(numbers: Sequence[int]) -> str:
    """`[0, 1, 2, 7]` as `"0-2,7"`."""
    runs = groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    ends = [(run[0][1], run[-1][1]) for run in (list(group) for _, group in runs)]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)


def _numbers(ranges: str) -> list[int]:
    ends = [part.split("-") for part in ranges.split(",") if part]
    return [number for end in ends for number in range(int(end[0]), int(end[-1]) + 1)]
