"""At which sites SAEs are measured: where a caller says, in the kind, stream and layout that they were trained at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ..errors import InputError
from ..saes import SparseAutoencoder
from ..site_mapping import SiteMapping
from ..sites import MARK, Site


def by_trained_site(saes: Mapping[Site | str, SparseAutoencoder]) -> SiteMapping[SparseAutoencoder]:
    """SAEs by site; raises `InputError` if two are for the same.

    Args:
        saes: `{site: SAE}`. A path alone means, if the SAE was trained there, the kind, stream and layout that it was
            trained at, else the block's output.
    """
    return SiteMapping((_site_of(named, sae), sae) for named, sae in saes.items())


def _site_of(named: Site | str, sae: SparseAutoencoder) -> Site:
    asked, trained = Site.of(named), sae.provenance.get("site")
    if isinstance(named, Site) or MARK in named or trained is None:
        return asked
    site = Site.of(trained)
    return site if Site(site.path) == Site(asked.path) else asked


def check_grids(sites: Iterable[Site]) -> None:
    """Raise `InputError` unless rows of the sites are places of an image."""
    for site in sites:
        if site.layout != "positions" or site.has_tokens:
            raise InputError(
                f"The rows of {site} are no places of an image; choose a block of the denoiser, with its image stream "
                "and the layout positions."
            )
