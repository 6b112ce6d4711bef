"""How a recipe knows its SAEs: by everything that shapes their codes, and the units of its strengths."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NoReturn

import torch

from .errors import InputError
from .hooks import LoadedSAE
from .saes import SparseAutoencoder
from .saes.identity import HALVES, fingerprint, fingerprints, name_of, settings_of
from .saes.statistics import UNITS
from .sites import Site


def identity_of(one: LoadedSAE) -> dict[str, Any]:
    """What an SAE of a plan is known by: its site, and everything that shapes its codes and its strengths."""
    sums = fingerprints(one.sae, [torch.float32, *(HALVES if one.sae.W_dec.dtype not in HALVES else ())])
    identity: dict[str, Any] = {
        "site": one.site.as_dict(),
        "architecture": type(one.sae).__name__,
        "n_latents": one.sae.n_latents,
        "settings": settings_of(one.sae),
        "dtype": name_of(one.sae.W_dec.dtype),
        "sha256": sums.pop("float32"),
    }
    if sums:
        identity["sha256_rounded"] = sums
    units = sorted({edit.unit for edit in one.edits} - {"raw"})
    if units and one.sae.statistics is not None:
        identity["statistics"] = {unit: one.sae.statistics.fingerprint(unit) for unit in units}
    if one.edits:
        identity["enabled"] = one.enabled
    return identity


def check_sae(name: str, identity: Any, loaded: Mapping[str, LoadedSAE]) -> None:
    """Raise `InputError` unless the SAE loaded under a name is the recipe's, as far as the recipe tells."""
    if name not in loaded:
        raise InputError(
            f"The recipe needs an SAE named {name!r}; load it first by load_sae(..., adapter_name={name!r})."
        )
    one = loaded[name]
    known = isinstance(identity, dict) and isinstance(identity.get("sha256"), str) and identity.get("site") is not None
    if not known:
        raise InputError(f"The recipe does not say the site and the sha256 of the SAE {name!r}; save it again.")
    for key, value in (("architecture", type(one.sae).__name__), ("n_latents", one.sae.n_latents)):
        if identity.get(key) is not None and not _is_same(identity[key], value):
            _refuse(name, key, identity[key], repr(value))
    if Site.of(identity["site"]) != one.site:
        raise InputError(
            f"The recipe has the SAE {name!r} at {_named(identity['site'])} and it is loaded at {one.site}; "
            "load it there."
        )
    if not isinstance(identity.get("dtype"), str | None):
        raise InputError(f"The recipe says dtype = {identity['dtype']!r:.80} of the SAE {name!r}; it must be a name.")
    settings, ours = _object(name, identity, "settings"), settings_of(one.sae)
    for key, value in settings.items():
        if key not in ours or not _is_same(value, ours[key]):
            _refuse(name, key, value, repr(ours[key]) if key in ours else "no such setting")
    _check_weights(name, identity, one.sae)
    for unit, digest in _object(name, identity, "statistics").items():
        if one.sae.statistics is not None and (unit not in UNITS[1:] or digest != one.sae.statistics.fingerprint(unit)):
            raise InputError(
                f"The SAE loaded as {name!r} has other statistics than the recipe's, which has strengths in units of "
                f"their {unit}; load the SAE with those, or write the recipe with unit='raw'."
            )


def _check_weights(name: str, identity: Mapping[str, Any], sae: SparseAutoencoder) -> None:
    """Raise `InputError` unless an SAE has the weights of a recipe; warn if they are those but for rounding."""
    digest, dtype, written = fingerprint(sae), name_of(sae.W_dec.dtype), identity.get("dtype")
    if identity["sha256"] == digest:
        return
    halves = {name_of(half): half for half in HALVES}
    is_rounded = dtype in halves and _object(name, identity, "sha256_rounded").get(dtype) == digest
    was_rounded = dtype not in halves and written in halves and identity["sha256"] == fingerprint(sae, halves[written])
    if not is_rounded and not was_rounded:
        raise InputError(f"The SAE loaded as {name!r} is not the recipe's, since their weights differ; load that one.")
    warnings.warn(
        f"The SAE loaded as {name!r} is the recipe's in {dtype} and was in {written}; images differ by the rounding.",
        stacklevel=5,
    )


def _object(name: str, identity: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = identity.get(key)
    if not isinstance(value, dict | None):
        raise InputError(f"The recipe says {key} = {value!r:.80} of the SAE {name!r}; it must be an object.")
    return value or {}


def _is_same(a: Any, b: Any) -> bool:
    """Whether two values of JSON are equal; there, 1 and true differ."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _refuse(name: str, key: str, written: Any, ours: str) -> NoReturn:
    raise InputError(
        f"The recipe says {key} = {written!r:.80} of the SAE {name!r}, and the one loaded has {ours}; "
        "load the recipe's, or mend the recipe."
    )


def _named(site: Any) -> str:
    """A recipe's site in words, as far as it is one."""
    try:
        return str(Site.of(site))
    except (InputError, TypeError):
        return str(site)
