"""Gives the edits of a plan the decisions that their rules took in another run.

A rule decides by what an SAE sees at the beginning of a run. A run backwards ends there, so that the decisions are
passed to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from .edits import Edit
from .errors import InputError
from .pipelines import SAESteeringMixin

Key = tuple[str, int]
"""An edit: the name of its SAE, and its index among the SAE's edits."""


@dataclass(frozen=True)
class DecidedPlan:
    """The plan without rules, for images of a batch that they decided alike.

    Args:
        images: which of the batch.
        edits: those in force for these images, by the name of their SAE.
    """

    images: list[int]
    edits: dict[str, list[Edit]]


def decide_plans(pipe: Any, decisions: Mapping[Key, Any] | None, count: int) -> list[DecidedPlan]:
    """The plan for `count` images, by what the rules of its edits decided; one for all where there is no rule.

    Args:
        pipe: steerable or not.
        decisions: for each edit in force that has a rule, `(count,)` bool: the images that it acts on.
        count: images in the batch.

    Raises:
        InputError: a decision is missing or superfluous, or a rule is not of the kind that is decided once.
    """
    ruled = _ruled_edits(pipe)
    _check_rules(pipe, ruled)
    given = {} if decisions is None else decisions
    if not isinstance(given, Mapping):
        raise InputError(
            f"decisions={given!r:.80} is no mapping; pass {{(adapter_name, index of the edit): bool for each image}}."
        )
    missing, superfluous = [key for key in ruled if key not in given], [key for key in given if key not in ruled]
    if missing:
        name, index = missing[0]
        raise InputError(
            f"Edit {index} of {name!r} has a rule, which decided when the image was made; pass what it decided then: "
            f"decisions={{{missing[0]!r}: bool for each image}}, as pipe.rule_decisions() tells after that run."
        )
    if superfluous:
        raise InputError(f"decisions has {superfluous[0]!r}, where no edit in force has a rule; leave that out.")
    decided = {key: _as_bools(key, given[key], count) for key in ruled}
    alike: dict[tuple[bool, ...], list[int]] = {}
    for image in range(count):
        alike.setdefault(tuple(holds[image] for holds in decided.values()), []).append(image)
    return [
        DecidedPlan(images, _without_rules(pipe, dict(zip(decided, holds, strict=True)), images, count))
        for holds, images in alike.items()
    ]


def follows_steps(pipe: Any) -> bool:
    """Whether an edit in force depends on the fraction of a run's steps that are done."""
    edits = [edit for loaded in _saes(pipe).values() if loaded.enabled for edit in loaded.edits]
    return any((e.start, e.stop) != (0.0, 1.0) or any(map(callable, e.strengths)) for e in edits)


@contextmanager
def plan_replaced(pipe: Any, edits: Mapping[str, Sequence[Edit]]) -> Iterator[None]:
    """Other edits in force for the length of a `with` block, by the names of their SAEs."""
    saes = _saes(pipe)
    before = {name: list(loaded.edits) for name, loaded in saes.items()}
    decisions = pipe.rule_decisions() if saes else {}
    try:
        for name, others in edits.items():
            saes[name].edits[:] = others
        yield
    finally:
        for name, own in before.items():
            saes[name].edits[:] = own
        if saes:
            pipe._steering.decisions = decisions  # those of the run before, which may be wanted once more


def _saes(pipe: Any) -> dict[str, Any]:
    return pipe._steering.loaded if isinstance(pipe, SAESteeringMixin) else {}


def _ruled_edits(pipe: Any) -> dict[Key, Edit]:
    saes = {name: loaded for name, loaded in _saes(pipe).items() if loaded.enabled}
    return {(n, i): edit for n, loaded in saes.items() for i, edit in enumerate(loaded.edits) if edit.when is not None}


def _check_rules(pipe: Any, ruled: Mapping[Key, Edit]) -> None:
    """Raise `InputError` for rules that are not decided before their edits could act."""
    saes = _saes(pipe)
    for (name, index), edit in ruled.items():
        assert edit.when is not None
        if edit.when.at != "image":
            raise InputError(
                f"Edit {index} of {name!r} has a rule at places, which is decided anew at every step, so that it "
                "cannot be followed backwards; use a rule with at='image'."
            )
        own, watched = saes[name], saes[str(edit.when.adapter_name)]
        before = watched.place.runs_once and not own.place.runs_once
        if own.site != watched.site and not before:
            raise InputError(
                f"Edit {index} of {name!r} has a rule about {watched.name!r} at another site, so that it may have "
                "rested at the first step; let the rule watch an SAE at the edit's own site."
            )


def _as_bools(key: Key, holds: Any, count: int) -> list[bool]:
    try:
        tensor = torch.as_tensor(holds)
    except (TypeError, ValueError, RuntimeError):
        tensor = torch.empty(0)
    if tensor.dtype != torch.bool or tuple(tensor.shape) != (count,):
        raise InputError(
            f"decisions[{key!r}] is {tensor.dtype} of shape {tuple(tensor.shape)}; pass one bool for each of the "
            f"{count} images."
        )
    return tensor.tolist()


def _without_rules(pipe: Any, holds: Mapping[Key, bool], images: list[int], count: int) -> dict[str, list[Edit]]:
    """The edits that act on some images of `count`, those of SAEs that are disabled too."""
    return {
        name: [_for_images(edit, images, count) for i, edit in enumerate(loaded.edits) if holds.get((name, i), True)]
        for name, loaded in _saes(pipe).items()
    }


def _for_images(edit: Edit, images: list[int], count: int) -> Edit:
    """An edit without its rule; of strengths and masks for each image of `count`, those of some images."""
    strengths = tuple(
        [strength[i] for i in images] if isinstance(strength, Sequence) and len(strength) == count else strength
        for strength in edit.strengths
    )
    mask = edit.mask[images] if edit.mask is not None and len(edit.mask) == count else edit.mask
    return replace(edit, when=None, strengths=strengths, mask=mask)
