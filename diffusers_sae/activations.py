"""Captured activations, with a label for every row: timestep, guidance branch and image."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .context import Context
from .errors import InputError
from .layouts import LAYOUTS
from .site_mapping import SiteMapping
from .sites import Site, grid_of


@dataclass
class SiteActivations:
    """What one site held, in the order in which it was seen.

    `tensor (N, ...)` has one entry for each denoiser call, branch and image; `timestep (N,)`, `branch` (N names) and
    `image (N,)` say which. Images count on over calls of the pipeline. `size` is height and width of the last latents.
    """

    site: Site
    size: tuple[int, int] = (1, 1)
    _tensors: list[torch.Tensor] = field(default_factory=list)
    _labels: list[tuple[float, str, int]] = field(default_factory=list)

    @property
    def tensor(self) -> torch.Tensor:
        if not self._tensors:
            raise InputError(f"{self.site} did not run, so that it held nothing; choose a block that runs.")
        return torch.cat(self._tensors)

    @property
    def calls(self) -> int:
        """How many calls of the module were seen."""
        return len(self._tensors)

    @property
    def timestep(self) -> torch.Tensor:
        return torch.tensor([t for t, _, _ in self._labels])

    @property
    def branch(self) -> list[str]:
        return [b for _, b, _ in self._labels]

    @property
    def image(self) -> torch.Tensor:
        return torch.tensor([i for _, _, i in self._labels])

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the places that `rows` has; raises `InputError` if its rows are none."""
        if self.site.layout != "positions":
            raise InputError(f"The rows of {self.site} are no places, so that it has no grid; use layout='positions'.")
        return grid_of(self._tensors[-1], self.size)

    def select(
        self, branch: str | None = None, timestep: float | None = None, image: int | None = None
    ) -> torch.Tensor:
        """The entries with these labels, `(M, ...)`."""
        wanted = (timestep, branch, image)
        keep = [all(w is None or w == have for w, have in zip(wanted, row, strict=True)) for row in self._labels]
        return self.tensor[torch.tensor(keep, dtype=torch.bool)]

    def rows(self, branch: str | None = None, timestep: float | None = None, image: int | None = None) -> torch.Tensor:
        """`select`, as rows `(M, P, d)` in the site's layout: what an SAE takes."""
        return LAYOUTS[self.site.layout].to_rows(self.select(branch, timestep, image))

    def count_images_anew(self, n: int) -> None:
        """Give every n images the numbers 0 to n - 1, as if each call of the pipeline had drawn the same ones."""
        first = min(image for _, _, image in self._labels)
        self._labels = [(t, branch, (image - first) % n) for t, branch, image in self._labels]

    def take(self, x: torch.Tensor, context: Context, first_image: int) -> None:
        """Add one call's tensor `(rows, ...)`."""
        self._tensors.append(x.detach().clone())
        self.size = context.size
        n = context.images
        self._labels += [(context.timestep, context.branches[r // n], first_image + r % n) for r in range(len(x))]


class AllSeen(Exception):
    """Every site has been seen in the call of the pipeline that is on, and the rest of it is not needed."""


class Activations(SiteMapping[SiteActivations]):
    """`{site: SiteActivations}`, filled while `with pipe.capture(...)` is open.

    With `once`, a call of the pipeline ends by `AllSeen` as soon as each site has been seen in it.
    """

    once = False

    def take(self, site: Site, x: torch.Tensor, context: Context, first_image: int) -> None:
        """Add one call's tensor `(rows, ...)` of a site; raises `AllSeen`."""
        self[site].take(x, context, first_image)
        if self.once and len({each.calls for each in self.values()}) == 1:
            raise AllSeen
