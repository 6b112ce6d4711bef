"""The hook that reads a site, edits what an SAE sees in it and writes the change back; and the hook that captures."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from .context import Context
from .delta import add_shift, neutral, write_moved
from .edits import Edit
from .errors import InputError
from .prepared import PreparedEdit
from .rules import Decision
from .saes import SparseAutoencoder
from .shifts import Shifts
from .sites import (
    LAYOUTS,
    Place,
    Site,
    argument_of,
    grid_of,
    input_of,
    tensor_of,
    with_argument,
    with_input,
    with_tensor,
)


@dataclass(eq=False)
class LoadedSAE:
    """An SAE at a site of one pipeline, its edits, and those made ready for the run that is on."""

    name: str
    sae: SparseAutoencoder
    site: Site
    place: Place
    enabled: bool = True
    edits: list[Edit] = field(default_factory=list)
    prepared: list[PreparedEdit] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    context: Context = field(default_factory=Context)
    _shifts: Shifts | None = None

    def make_ready(self, prepared: list[PreparedEdit]) -> None:
        """Take the edits of the run that begins."""
        self.prepared = prepared
        shifts = [edit for edit in prepared if edit.is_shift]
        self._shifts = Shifts(shifts) if shifts else None

    def shift(self) -> torch.Tensor | None:
        """What edits add now that no activation shapes; see `Shifts.at`."""
        return None if self._shifts is None else self._shifts.at(self.context)

    def reads(self) -> bool:
        """Whether an edit of the run, or a rule, depends on activations."""
        shifts = self._shifts is not None and all(edit.is_shift for edit in self.prepared)
        return bool(self.decisions) or (bool(self.prepared) and not shifts)

    def due(self, branch: str) -> list[PreparedEdit]:
        """The edits, those in `shift` left out, that may change rows of the branch now."""
        rest = self.prepared if self._shifts is None else [edit for edit in self.prepared if not edit.is_shift]
        return [edit for edit in rest if edit.needs(branch, self.context)]

    def together(self, branch: str) -> tuple[Any, ...]:
        """Branches for which this is equal are changed alike, so that one call of `change` does for both."""
        known = [self.prepared.index(edit) for edit in self.due(branch)]
        return tuple((i, self.prepared[i].edit.weights[branch]) for i in known)

    def change(self, x: torch.Tensor, branch: str, grid: Callable[[], tuple[int, int]]) -> torch.Tensor | None:
        """`M · s(t) · (dec(z') - dec(z))` of the edits that are due, or `None` where nothing changes.

        `x` is `(..., images, P, d)`, with the branches in front that are changed together with `branch`; the result is
        in fp32 and broadcasts to it. `grid` gives height and width of the P places.
        """
        due = self.due(branch)
        codes = iter(self._codes(x, [edit.features for edit in due if edit.edit.operation.needs_code]))
        total: torch.Tensor | None = None
        for edit in due:
            z = next(codes) if edit.edit.operation.needs_code else None
            delta = edit.change(x, z, branch, self.context, grid() if edit.needs_grid else None)
            total = delta if total is None else total + delta
        return total

    def _codes(self, x: torch.Tensor, features: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        """The codes of several groups of features, `(..., images, P, m)` each, in one encoding."""
        if not features:
            return ()
        if len(features) == 1:
            return (self.sae.encode_only(x, features[0]),)
        return self.sae.encode_only(x, torch.cat(features)).split([len(each) for each in features], -1)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """What the SAE takes of a part of a batch, `(images, P, d)`."""
        rows = LAYOUTS[self.site.layout].to_rows(x)
        if rows.shape[-1] != self.sae.d_in:
            raise InputError(
                f"The SAE {self.name!r} takes activations of width {self.sae.d_in} and {self.site} has "
                f"{rows.shape[-1]}; load an SAE that was trained at this site"
                + (", or make images of the size it was trained at." if self.site.layout != "positions" else ".")
            )
        return rows


class SAEProcessor(ModelHook):
    """Encode, edit, decode at one module, for all SAEs of one pipeline that sit there.

    Every SAE reads the tensor as the model made it; their changes add up. While `armed()` is false, or if nothing
    changes, the module's output is passed on untouched. Only `pre_forward` and `post_forward` are used, since
    other hooks on the module come and go (see Hugging Face's `HookRegistry.remove_hook`).
    """

    def __init__(self, loaded: list[LoadedSAE], context: Context, armed: Callable[[], bool]) -> None:
        super().__init__()
        self.loaded = loaded
        self.context = context
        self.armed = armed
        self.fired = False
        self._inputs: dict[str, torch.Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelHook:
        return ModelHook()  # a copy belongs to no pipeline; registries above remember hooks and are copied with them

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        if not self.armed():
            return args, kwargs
        self.fired = True
        for stream in self._streams("update"):
            self._inputs[stream] = input_of(args, kwargs, stream)
        for stream in self._streams("input"):
            x = input_of(args, kwargs, stream)
            args, kwargs = with_input(args, kwargs, stream, self._edited(x, None, "input", stream))
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if not self.armed():
            return output
        for stream in self._streams("output", "update"):
            x = tensor_of(output, module, stream)
            edited = self._edited(x, None, "output", stream)
            if stream in self._inputs:
                edited = self._edited(edited, (x, self._inputs.pop(stream)), "update", stream)
            if edited is not x:
                output = with_tensor(output, edited, module, stream)
        return output

    def _streams(self, *kinds: str) -> list[str]:
        """Streams, each once, at which an SAE of these kinds of site has edits, or rules that look at it."""
        used = [one for one in self.loaded if one.site.kind in kinds and (one.prepared or one.decisions)]
        return list(dict.fromkeys(one.site.stream for one in used))

    def _edited(
        self, x: torch.Tensor, update: tuple[torch.Tensor, torch.Tensor] | None, kind: str, stream: str
    ) -> torch.Tensor:
        """`x` with the changes that SAEs of this kind of site make from what they see; `x` itself if there are none.

        They see `x`, or, of an `update (output, input)`, the difference.
        """
        here = [one for one in self.loaded if one.site.kind == kind and one.site.stream == stream]
        whole = len(x) == self.context.rows
        shift = self._shift(here, x)
        if not any(one.reads() for one in here):
            return x if shift is None else self._add(x, shift)
        seen = x if update is None else update[0] - update[1]

        def grid() -> tuple[int, int]:
            return grid_of(x, self.context.size)

        cond = next((rows for branch, rows in self.context.parts() if branch == "cond"), None)
        if cond is not None:
            for one in here:
                self._decide(one, seen[cond], grid)
        groups = self._groups(here, whole)
        changes = [(rows, self._sum(here, seen[rows], branches, grid)) for branches, rows in groups]
        found = [(rows, change) for rows, change in changes if change is not None]
        if not found:
            return x if shift is None else self._add(x, shift)
        if whole and len(groups) == 1:
            result = torch.empty_like(x)
        else:
            result = x.clone() if shift is None else self._add(x, shift)
        for rows, change in found:
            add = () if shift is None else (shift if len(shift) == 1 else shift[rows],)
            write_moved(result, x, rows, sum(add, change))
        return result

    def _shift(self, here: list[LoadedSAE], x: torch.Tensor) -> torch.Tensor | None:
        """What SAEs add to a batch `x` that no activation shapes, with one row or all; -0 where nothing."""
        found = []
        for one in here:
            shift = one.shift()
            if shift is not None:
                one.rows(x)  # which raises if the SAE does not fit
                found.append(LAYOUTS[one.site.layout].from_rows(shift, x))
        return neutral(sum(found[1:], found[0])) if len(found) > 1 else next(iter(found), None)

    def _add(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """`x` with the shift added to the rows that the context knows of."""
        rows = self.context.rows
        if len(x) == rows:
            return add_shift(x, shift)
        return torch.cat([add_shift(x[:rows], shift[: len(x)]), x[rows:]])

    def _groups(self, here: list[LoadedSAE], whole: bool) -> list[tuple[tuple[str, ...], slice]]:
        """Adjacent branches that are changed alike, with their rows; each by itself if the batch is not `whole`."""
        groups: list[tuple[tuple[str, ...], slice]] = []
        last = None
        for branch, rows in self.context.parts():
            alike = [one.together(branch) for one in here if one.prepared]
            if groups and whole and alike == last:
                groups[-1] = ((*groups[-1][0], branch), slice(groups[-1][1].start, rows.stop))
            else:
                groups.append(((branch,), rows))
            last = alike
        return groups

    def _sum(
        self, here: list[LoadedSAE], seen: torch.Tensor, branches: tuple[str, ...], grid: Callable[[], tuple[int, int]]
    ) -> torch.Tensor | None:
        """The changes of some SAEs, in the shape of the site's tensor, for rows of branches that are changed alike."""
        changes = [self._change(one, seen, branches, grid) for one in here if one.prepared]
        found = [change for change in changes if change is not None]
        return sum(found[1:], found[0]) if found else None

    def _change(
        self, one: LoadedSAE, seen: torch.Tensor, branches: tuple[str, ...], grid: Callable[[], tuple[int, int]]
    ) -> torch.Tensor | None:
        """The change of one SAE for rows of branches that are changed alike, in the shape of the site's tensor."""
        rows = one.rows(seen)
        if len(branches) == 1:
            change = one.change(rows, branches[0], grid)
        else:
            change = one.change(rows.unflatten(0, (len(branches), -1)), branches[0], grid)
            if change is not None:
                change = change.expand(len(branches), self.context.images, *change.shape[-2:]).flatten(0, 1)
        return None if change is None else LAYOUTS[one.site.layout].from_rows(change, seen)

    @staticmethod
    def _decide(one: LoadedSAE, seen: torch.Tensor, grid: Callable[[], tuple[int, int]]) -> None:
        """Apply the rules about an SAE."""
        for decision in one.decisions:
            decision.see(one.sae, one.rows(seen), grid() if decision.rule.at == "place" else None)


class ArgumentProcessor(SAEProcessor):
    """The same for what a denoiser is given: a native hook on it, since one of the registry's is lost under offload."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return nothing

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        if not self.armed() or not self.loaded:
            return None
        self.fired = True
        site = self.loaded[0].site
        x = argument_of(kwargs, site)
        edited = self._edited(x, None, "output", "image")
        return None if edited is x else (args, with_argument(kwargs, site, edited))


def nothing(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """What a copy of a hooked module has in the place of the hook: the copy belongs to no pipeline."""


class CaptureHook(ModelHook):
    """Hands every output of a module to `take(site, tensor, context)` while `armed()` is true."""

    context: Context

    def __init__(
        self, site: Site, take: Callable[[Site, torch.Tensor, Context], None], armed: Callable[[], bool]
    ) -> None:
        super().__init__()
        self.site, self.take, self.armed = site, take, armed
        self._input: torch.Tensor | None = None

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        if self.armed() and self.site.kind != "output":
            self._input = input_of(args, kwargs, self.site.stream)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if self.armed():
            x = tensor_of(output, module, self.site.stream)
            if self._input is not None:
                x, self._input = (self._input if self.site.kind == "input" else x - self._input), None
            self.take(self.site, x, self.context)
        return output

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """As a native hook, of what a denoiser is given."""
        if self.armed():
            self.take(self.site, argument_of(kwargs, self.site), self.context)


def attach(place: Place, site: Site, hook: Any, name: str) -> Callable[[], None]:
    """Hang a hook on a site's module; returns what takes it off."""
    if place.is_argument:
        return place.module.register_forward_pre_hook(hook, with_kwargs=True).remove
    _register(place.root, place.module, hook, name)
    return lambda: _unregister(place.root, place.module, name)


def _register(root: nn.Module, module: nn.Module, hook: ModelHook, name: str) -> None:
    """Register `hook` on a block of `root`, inside of its cache if it has one, so that the hook system notices it."""
    registry = HookRegistry.check_if_exists_or_initialize(module)
    with _without_cache(root):
        registry.register_hook(hook, name)
    HookRegistry.check_if_exists_or_initialize(root).invalidate_child_registries_cache()
    module.__dict__.setdefault("__deepcopy__", lambda memo: _bare_copy(module, memo))


def _unregister(root: nn.Module, module: nn.Module, name: str) -> None:
    """Remove the hook `name` from a block of `root`."""
    registry = HookRegistry.check_if_exists_or_initialize(module)
    with _without_cache(root):
        registry.remove_hook(name, recurse=False)
    HookRegistry.check_if_exists_or_initialize(root).invalidate_child_registries_cache()
    if not registry.hooks:
        module.__dict__.pop("__deepcopy__", None)


@contextmanager
def _without_cache(root: nn.Module) -> Iterator[None]:
    """Take a cache such as First-Block-Cache off and put it on again.

    A hook that came after it would run on blocks that it skips, and edit what holds the edit already; and a hook under
    it that goes takes it along.
    """
    config = root._cache_config if getattr(root, "is_cache_enabled", False) else None
    if config is not None:
        root.disable_cache()  # type: ignore[operator]
    yield
    if config is not None:
        root.enable_cache(config)  # type: ignore[operator]


def _bare_copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of a hooked module without its hooks; with them, it would go on calling the original's weights."""
    twin = type(module).__new__(type(module))
    memo[id(module)] = twin
    hooked = ("forward", "_diffusers_hook", "__deepcopy__")
    twin.__dict__.update({k: copy.deepcopy(v, memo) for k, v in module.__dict__.items() if k not in hooked})
    return twin
