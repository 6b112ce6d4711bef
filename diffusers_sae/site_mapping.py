"""Values by site: two sites of one path are two entries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from .errors import InputError
from .sites import MARK, Site, canonical_path

V = TypeVar("V")


class UnknownSite(InputError, KeyError):
    """A site that a mapping has no entry of."""

    __str__ = Exception.__str__  # a KeyError shows its text in quotes


class SiteMapping(Mapping[Site, V]):
    """`{site: value}`, read-only.

    A value is looked up by its site, by the site's text, or by its path where that is the path of one site only.

    Args:
        entries: a mapping or pairs, by sites, their texts or dicts.

    Raises:
        InputError: a site is there twice; or, when looked up, is not there (a `KeyError` as well), or a path is that of
            several sites.
    """

    def __init__(self, entries: Mapping[Any, V] | Iterable[tuple[Any, V]] = ()) -> None:
        pairs = list(entries.items() if isinstance(entries, Mapping) else entries)
        sites = distinct_sites([site for site, _ in pairs])
        self._values = dict(zip(sites, (value for _, value in pairs), strict=True))

    def __getitem__(self, site: Site | str) -> V:
        return self._values[self.find(site)]

    def __iter__(self) -> Iterator[Site]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({{{', '.join(f'{str(site)!r}: {value!r}' for site, value in self.items())}}})"

    def find(self, site: Site | str) -> Site:
        """The site of the entry that a site, a text or a path names."""
        asked = Site.of(site)
        if asked in self._values:
            return asked
        is_path = isinstance(site, str) and MARK not in site
        same = [each for each in self if is_path and canonical_path(each.path) == canonical_path(asked.path)]
        if len(same) == 1:
            return same[0]
        names = ", ".join(map(str, same or self)) or "none"
        if same:
            raise InputError(f"{site} is the path of several sites: {names}; name one of them.")
        raise UnknownSite(f"There is no entry of {asked}; choose one of {names}.")


def distinct_sites(sites: Iterable[Any]) -> list[Site]:
    """Sites from themselves, texts or dicts; raises `InputError` if two are the same, however they are spelt."""
    if isinstance(sites, (str, Site)):
        raise InputError(f"Sites are passed as a list; pass [{str(sites)!r}].")
    distinct: dict[Site, Any] = {}
    for each in sites:
        site = Site.of(each)
        if site in distinct:
            raise InputError(
                f"The site {site} is named twice, as {_shown(distinct[site])} and {_shown(each)}; leave one out."
            )
        distinct[site] = each
    return list(distinct)


def _shown(site: Any) -> str:
    """A site as it was written."""
    if not isinstance(site, Site):
        return repr(site)
    words = str(site).partition(MARK)
    return repr(site.path + "".join(words[1:]))
