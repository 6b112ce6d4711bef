"""Recipes: a plan as a JSON file that people can read, share and load again, refused where it does not fit."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .edits import Edit, make_edit
from .errors import InputError
from .hooks import LoadedSAE
from .recipe_saes import check_sae, identity_of
from .rules import Rule, checked_rule
from .strengths import StrengthMap, StrengthTable

SCHEMA_VERSION = 2
READABLE = (1, 2)
AS_GIVEN = ("mode", "start", "stop", "branch", "unit", "tokens", "preserve_norm")
"""Arguments of `steer` that a recipe holds as they are."""
WHOLE = (0.0, 1.0)
"""Start and stop of an edit that has no window."""


class Planned(NamedTuple):
    """What a recipe plans for one SAE.

    `enabled` says whether the edits act or rest, as after `disable_sae`; `None` if the recipe does not say.
    """

    enabled: bool | None
    edits: list[Edit]


def recipe_of(loaded: Mapping[str, LoadedSAE], pipeline: str, base_model: str | None) -> dict[str, Any]:
    """The plan of a pipeline as plain data; raises `InputError` for what cannot be written down."""
    watched = {edit.when.adapter_name for one in loaded.values() for edit in one.edits if edit.when}
    return {
        "schema_version": SCHEMA_VERSION,
        "pipeline": pipeline,
        "base_model": base_model,
        "saes": {name: identity_of(one) for name, one in loaded.items() if one.edits or name in watched},
        "edits": [_written(name, edit) for name, one in loaded.items() for edit in one.edits],
    }


def plan_of(recipe: Any, loaded: Mapping[str, LoadedSAE]) -> dict[str, Planned]:
    """What a recipe plans for each SAE that it edits, checked against the loaded ones.

    Warns of edits of schema version 1 whose windows may mean other steps now.

    Raises:
        InputError: it is no recipe, an SAE is missing or another, or an edit cannot be read.
    """
    _check_frame(recipe)
    for name, identity in recipe["saes"].items():
        check_sae(name, identity, loaded)
    plan: dict[str, Planned] = {}
    for number, written in enumerate(recipe["edits"]):
        name = str(written.get("adapter_name")) if isinstance(written, dict) else ""
        if name not in recipe["saes"]:
            raise InputError(
                f"Edit {number} of the recipe is for the SAE {name!r}, which its saes do not list; list it there."
            )
        try:
            edit = _read(written, {each: loaded[each] for each in recipe["saes"]})
        except KeyError as error:
            raise InputError(f"Edit {number} of the recipe cannot be read: {error} is missing; write it.") from None
        except (TypeError, LookupError, AttributeError, ValueError, RuntimeError, OverflowError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"Edit {number} of the recipe cannot be read: {reason}") from None
        plan.setdefault(name, Planned(_enabled(name, recipe, loaded[name]), [])).edits.append(edit)
    _warn_of_windows(recipe["schema_version"], plan)
    return plan


def _check_frame(recipe: Any) -> None:
    """Raise `InputError` unless data is a recipe as far as its outermost fields tell."""
    if not isinstance(recipe, dict) or not {"schema_version", "saes", "edits"} <= set(recipe):
        raise InputError("This is not a recipe: it must have schema_version, saes and edits; write one by save_recipe.")
    version = recipe["schema_version"]
    if version not in READABLE or isinstance(version, bool):
        raise InputError(
            f"The recipe has schema version {version!r} and this library reads {SCHEMA_VERSION} and those before; "
            "save it again, or use the version of diffusers_sae that wrote it."
        )
    if not isinstance(recipe["saes"], dict) or not isinstance(recipe["edits"], list):
        raise InputError("The recipe's saes must be an object and its edits a list; write one by save_recipe.")
    for key in ("pipeline", "base_model"):
        if not isinstance(recipe.get(key), str | None):
            raise InputError(
                f"The recipe's {key} is {recipe[key]!r:.80}, and it must be a name; mend it or leave it out."
            )


def _enabled(name: str, recipe: Mapping[str, Any], one: LoadedSAE) -> bool | None:
    """Whether the recipe's edits of an SAE act; raises `InputError` if the plan's own, beside them, do otherwise."""
    enabled = recipe["saes"][name].get("enabled")
    if not isinstance(enabled, bool | None):
        raise InputError(f"The recipe says enabled = {enabled!r:.80} of the SAE {name!r}; it must be true or false.")
    if enabled is not None and one.edits and one.enabled is not enabled:
        now, call = ("rest", "enable_sae") if enabled else ("act", "disable_sae")
        raise InputError(
            f"The recipe's edits of {name!r} {'act' if enabled else 'rest'} and those in the plan {now}, and an SAE "
            f"has one switch for all; call {call}({name!r}) or reset_steering({name!r}) first."
        )
    return enabled


def _warn_of_windows(version: int, plan: Mapping[str, Planned]) -> None:
    if version > 1:
        return
    windows = {f"{e.start:g} to {e.stop:g}": None for p in plan.values() for e in p.edits if (e.start, e.stop) != WHOLE}
    if windows:
        warnings.warn(
            f"The recipe is of schema version 1, in which start and stop were shares of the scheduler's training "
            f"timesteps, and they are fractions of the run's steps now: its windows ({', '.join(windows)}) may hold "
            "other steps, above all with shifted schedules; check them and save the recipe again.",
            stacklevel=4,
        )


def read_json(path: str | os.PathLike) -> Any:
    """The data of a JSON file; raises `InputError`."""
    try:
        return json.loads(Path(path).read_bytes(), object_pairs_hook=_without_repeats)
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} cannot be read as JSON ({reason}); pass the path of a recipe.") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises `ValueError` for a name that comes twice, of which JSON's reader would drop one."""
    read = dict(pairs)
    if len(read) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} comes twice in an object")
    return read


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
    _check_fields(written, {*AS_GIVEN, "adapter_name", "features", "when", "mask"})
    one = loaded[written["adapter_name"]]
    given = {key: written[key] for key in AS_GIVEN if written.get(key) is not None}
    mask = torch.tensor(written["mask"]) if written.get("mask") is not None else None
    if mask is not None and mask.ndim == 3:
        mask = mask[:, None]  # (images, 1, H, W), since an (images, H, 1) could be channels that come last
    return make_edit(
        {_feature(f): _given_strength(s) for f, s in _features(written).items()},
        one.sae,
        mask=mask,
        when=_rule(written["when"], loaded) if written.get("when") is not None else None,
        statistics=one.sae.statistics,
        **given,
    )


def _check_fields(written: Any, known: Set[str]) -> None:
    """Raise `InputError` unless data is an object with these fields alone; a misspelt one must not be left out."""
    if not isinstance(written, dict):
        raise InputError(f"{written!r:.80} is no object; write {{...}} with {', '.join(sorted(known))}.")
    if unknown := set(written) - known:
        raise InputError(f"{', '.join(sorted(unknown))} is unknown to this version.")


def _features(written: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(written["features"], dict):
        raise InputError(f"features = {written['features']!r:.80} is no object; write {{feature: number}}.")
    return written["features"]


def _feature(text: str) -> int:
    if not text.isdecimal() or text != str(int(text)):  # "03" beside "3" would be a feature twice
        raise InputError(f"{text!r} is not a feature.")
    return int(text)


def _given_strength(strength: Any) -> Any:
    if not isinstance(strength, dict):
        return strength
    _check_fields(strength, {"timesteps", "values"})
    if not isinstance(strength["timesteps"], list) or not isinstance(strength["values"], list):
        raise InputError("The timesteps and the values of a table are lists.")
    timesteps, values = tuple(float(t) for t in strength["timesteps"]), strength["values"]
    if not timesteps or not all(math.isfinite(t) for t in timesteps) or len(timesteps) != len(values):
        raise InputError("A table has as many values as timesteps, at least one, and finite ones.")
    if isinstance(values[0], list):
        return StrengthMap(timesteps, torch.tensor(values))
    return StrengthTable(timesteps, tuple(float(v) for v in values))


def _rule(written: Mapping[str, Any], loaded: Mapping[str, LoadedSAE]) -> Rule:
    _check_fields(written, {"adapter_name", "features", "above", "at"})
    name = written["adapter_name"]
    if not isinstance(name, str) or name not in loaded:
        raise InputError(f"a rule looks at the SAE {name!r}, which the recipe's saes do not list.")
    at = written["at"] if written.get("at") is not None else "image"
    rule = Rule({_feature(f): w for f, w in _features(written).items()}, written["above"], name, at)
    return checked_rule(rule, name, loaded[name].sae)
