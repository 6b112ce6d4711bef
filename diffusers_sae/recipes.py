"""Recipes: a plan as a JSON file that people can read, share and load again, refused where it does not fit."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .edits import Edit, make_edit
from .errors import InputError
from .hooks import LoadedSAE
from .rules import Rule, checked_rule
from .saes import SparseAutoencoder
from .sites import Site
from .strengths import StrengthMap, StrengthTable

SCHEMA_VERSION = 1
AS_GIVEN = ("mode", "start", "stop", "branch", "unit", "tokens", "preserve_norm")
"""Arguments of `steer` that a recipe holds as they are."""


def fingerprint(sae: SparseAutoencoder) -> str:
    """SHA-256 of an SAE's weights as fp32, whatever type they are kept in."""
    sae.fetch()
    digest = hashlib.sha256()
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        for rows in tensor.detach().cpu().split(4096):
            digest.update(rows.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def recipe_of(loaded: Mapping[str, LoadedSAE], pipeline: str, base_model: str | None) -> dict[str, Any]:
    """The plan of a pipeline as plain data; raises `InputError` for what cannot be written down."""
    return {
        "schema_version": SCHEMA_VERSION,
        "pipeline": pipeline,
        "base_model": base_model,
        "saes": {
            name: {
                "site": one.site.as_dict(),
                "architecture": type(one.sae).__name__,
                "n_latents": one.sae.n_latents,
                "sha256": fingerprint(one.sae),
            }
            for name, one in loaded.items()
            if one.edits or any(e.when and e.when.adapter_name == name for o in loaded.values() for e in o.edits)
        },
        "edits": [_written(name, edit) for name, one in loaded.items() for edit in one.edits],
    }


def edits_of(recipe: Any, loaded: Mapping[str, LoadedSAE]) -> dict[str, list[Edit]]:
    """`{adapter_name: edits}` that a recipe asks for, checked against the loaded SAEs; raises `InputError`."""
    if not isinstance(recipe, dict) or not {"schema_version", "saes", "edits"} <= set(recipe):
        raise InputError("This is not a recipe: it must have schema_version, saes and edits; write one by save_recipe.")
    if recipe["schema_version"] != SCHEMA_VERSION:
        raise InputError(
            f"The recipe has schema version {recipe['schema_version']!r} and this library reads {SCHEMA_VERSION}; "
            "save it again, or use the version of diffusers_sae that wrote it."
        )
    if not isinstance(recipe["saes"], dict) or not isinstance(recipe["edits"], list):
        raise InputError("The recipe's saes must be an object and its edits a list; write one by save_recipe.")
    for key in ("pipeline", "base_model"):
        if not isinstance(recipe.get(key), str | None):
            raise InputError(
                f"The recipe's {key} is {recipe[key]!r:.80}, and it must be a name; mend it or leave it out."
            )
    for name, told in recipe["saes"].items():
        _check_sae(name, told, loaded)
    found: dict[str, list[Edit]] = {}
    for number, written in enumerate(recipe["edits"]):
        name = str(written.get("adapter_name")) if isinstance(written, dict) else ""
        if name not in recipe["saes"]:
            raise InputError(
                f"Edit {number} of the recipe is for the SAE {name!r}, which its saes do not list; list it there."
            )
        try:
            found.setdefault(name, []).append(_read(written, loaded))
        except (TypeError, LookupError, AttributeError, ValueError, RuntimeError, OverflowError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"Edit {number} of the recipe cannot be read: {reason}") from None
    return found


def read_json(path: str | os.PathLike) -> Any:
    """The data of a JSON file; raises `InputError`."""
    try:
        return json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} cannot be read as JSON ({reason}); pass the path of a recipe.") from None


def _check_sae(name: str, told: Any, loaded: Mapping[str, LoadedSAE]) -> None:
    if name not in loaded:
        raise InputError(
            f"The recipe needs an SAE named {name!r}; load it first by load_sae(..., adapter_name={name!r})."
        )
    one = loaded[name]
    if not isinstance(told, dict) or not isinstance(told.get("sha256"), str) or told.get("site") is None:
        raise InputError(f"The recipe does not say the site and the sha256 of the SAE {name!r}; save it again.")
    for key, value in (("architecture", type(one.sae).__name__), ("n_latents", one.sae.n_latents)):
        if told.get(key) is not None and (type(told[key]) is not type(value) or told[key] != value):
            raise InputError(
                f"The recipe says {key} = {told[key]!r:.80} of the SAE {name!r}, and the one loaded has {value!r}; "
                "load the recipe's, or mend the recipe."
            )
    if Site.of(told["site"]) != one.site:
        raise InputError(
            f"The recipe has the SAE {name!r} at {_named(told['site'])} and it is loaded at {one.site}; load it there."
        )
    if told["sha256"] != fingerprint(one.sae):
        raise InputError(f"The SAE loaded as {name!r} is not the recipe's, since their weights differ; load that one.")


def _named(site: Any) -> str:
    """A recipe's site in words, as far as it is one."""
    try:
        return str(Site.of(site))
    except (InputError, TypeError):
        return str(site)


def _written(name: str, edit: Edit) -> dict[str, Any]:
    written: dict[str, Any] = {
        "adapter_name": name,
        "mode": edit.mode,
        "features": {str(f): _strength(f, s) for f, s in zip(edit.features, edit.strengths, strict=True)},
        "start": edit.start,
        "stop": edit.stop,
        "branch": edit.branch,
        "unit": edit.unit,
    }
    if edit.when is not None:
        written["when"] = {
            "adapter_name": edit.when.adapter_name,
            "features": {str(f): float(w) for f, w in edit.when.features.items()},
            "above": float(edit.when.above),
            "at": edit.when.at,
        }
    if edit.tokens:
        written["tokens"] = list(edit.tokens)
    if edit.preserve_norm:
        written["preserve_norm"] = True
    if edit.mask is not None:
        written["mask"] = edit.mask[:, 0].tolist()
    return written


def _strength(feature: int, strength: Any) -> Any:
    if isinstance(strength, (StrengthTable, StrengthMap)):
        values = strength.values.tolist() if isinstance(strength, StrengthMap) else list(strength.values)
        return {"timesteps": list(strength.timesteps), "values": values}
    if callable(strength):
        raise InputError(
            f"The strength of feature {feature} is a function, which a recipe cannot hold; pass a StrengthTable."
        )
    return strength


def _read(written: Mapping[str, Any], loaded: Mapping[str, LoadedSAE]) -> Edit:
    if unknown := set(written) - {*AS_GIVEN, "adapter_name", "features", "when", "mask"}:
        raise InputError(f"{', '.join(sorted(unknown))} is unknown to this version.")
    one = loaded[written["adapter_name"]]
    given = {key: written[key] for key in AS_GIVEN if written.get(key) is not None}
    mask = torch.tensor(written["mask"]) if written.get("mask") is not None else None
    return make_edit(
        {_feature(f): _given_strength(s) for f, s in written["features"].items()},
        one.sae,
        mask=mask,
        when=_rule(written["when"], loaded) if written.get("when") is not None else None,
        statistics=one.sae.statistics,
        **given,
    )


def _feature(text: str) -> int:
    if not text.isdecimal():
        raise InputError(f"{text!r} is not a feature.")
    return int(text)


def _given_strength(strength: Any) -> Any:
    if not isinstance(strength, dict):
        return strength
    if not isinstance(strength["timesteps"], list) or not isinstance(strength["values"], list):
        raise InputError("The timesteps and the values of a table are lists.")
    timesteps, values = tuple(float(t) for t in strength["timesteps"]), strength["values"]
    if not timesteps or not all(math.isfinite(t) for t in timesteps) or len(timesteps) != len(values):
        raise InputError("A table has as many values as timesteps, at least one, and finite ones.")
    if isinstance(values[0], list):
        return StrengthMap(timesteps, torch.tensor(values))
    return StrengthTable(timesteps, tuple(float(v) for v in values))


def _rule(written: Mapping[str, Any], loaded: Mapping[str, LoadedSAE]) -> Rule:
    name = written["adapter_name"]
    if name not in loaded:
        raise InputError(f"a rule looks at the SAE {name!r}, which is not loaded.")
    at = written["at"] if written.get("at") is not None else "image"
    rule = Rule({_feature(f): w for f, w in written["features"].items()}, written["above"], name, at)
    return checked_rule(rule, name, loaded[name].sae)
