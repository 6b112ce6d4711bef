"""What one run does at one module: the edits of the SAEs that are loaded there, and those who observe its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..context import Context
from ..delta import add_shift, write_moved
from ..sites import (
    Place,
    Site,
    argument_of,
    grid_of,
    input_of,
    tensor_of,
    update_of,
    with_argument,
    with_input,
    with_tensor,
)
from .sae_run import SAERun, SAEsOfSite


@dataclass(eq=False)
class Observer:
    """A function that is handed every tensor of a site, after the edits there: `take(site, tensor, context)`."""

    site: Site
    place: Place
    take: Callable[[Site, torch.Tensor, Context], None]


@dataclass(eq=False)
class TensorRun:
    """What one run does with one tensor of a module: its output, input or update, of one stream."""

    kind: str
    stream: str
    saes: SAEsOfSite | None
    observers: list[Observer]


class ModuleRun:
    """What one run does at one module. Where nothing changes, the module's tensors are passed on untouched."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.fired = False
        # a list, since torch.compile does not guard on the keys of a dict that is iterated over
        self._tensors: list[TensorRun] = []
        self._inputs: dict[str, torch.Tensor] = {}

    def arrange(self, saes: Iterable[SAERun], observers: Iterable[Observer]) -> None:
        """Take the SAEs and observers of the plan that is in force from now on."""
        acting, observers = [sae for sae in saes if sae.acts], list(observers)
        sites = [*(sae.site for sae in acting), *(observer.site for observer in observers)]
        self._tensors = []
        for key in dict.fromkeys((site.kind, site.stream) for site in sites):
            here = [sae for sae in acting if (sae.site.kind, sae.site.stream) == key]
            watching = [each for each in observers if (each.site.kind, each.site.stream) == key]
            self._tensors.append(TensorRun(*key, SAEsOfSite(self.context, here) if here else None, watching))

    def before(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The arguments of a call of the module, edited."""
        self.fired = True
        for stream in self._streams("input"):
            x = input_of(args, kwargs, stream)
            edited = self._edited(x, None, "input", stream)
            if edited is not x:
                args, kwargs = with_input(args, kwargs, stream, edited)
            self._show(edited, "input", stream)
        for stream in self._streams("update"):
            self._inputs[stream] = input_of(args, kwargs, stream)
        return args, kwargs

    def after(self, module: nn.Module, output: Any) -> Any:
        """What the module returned, edited."""
        for stream in self._streams("output", "update"):
            x = tensor_of(output, module, stream)
            edited = self._edited(x, None, "output", stream)
            given = self._inputs.pop(stream, None)
            if given is not None:
                edited = self._edited(edited, (x, given), "update", stream)
            if edited is not x:
                output = with_tensor(output, edited, module, stream)
            self._show(edited, "output", stream)
            if given is not None:
                for observer in self._observers("update", stream):
                    observer.take(observer.site, update_of(edited, given, observer.site), self.context)
        return output

    def argument(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """The arguments of a denoiser's call with the site that is one of them edited; `None` where nothing changes."""
        self.fired = True
        if not self._tensors:
            return None
        saes, observers = self._tensors[0].saes, self._tensors[0].observers
        site = observers[0].site if saes is None else saes.saes[0].site
        x = argument_of(kwargs, site)
        edited = self._edited(x, None, "output", "image")
        self._show(edited, "output", "image")
        return None if edited is x else (args, with_argument(kwargs, site, edited))

    def _streams(self, *kinds: str) -> list[str]:
        """Streams, each once, at which these kinds of site are edited or observed."""
        return list(dict.fromkeys(tensor.stream for tensor in self._tensors if tensor.kind in kinds))

    def _saes(self, kind: str, stream: str) -> SAEsOfSite | None:
        return next((t.saes for t in self._tensors if (t.kind, t.stream) == (kind, stream)), None)

    def _observers(self, kind: str, stream: str) -> list[Observer]:
        return next((t.observers for t in self._tensors if (t.kind, t.stream) == (kind, stream)), [])

    def _show(self, x: torch.Tensor, kind: str, stream: str) -> None:
        for observer in self._observers(kind, stream):
            observer.take(observer.site, x, self.context)

    def _edited(
        self, x: torch.Tensor, update: tuple[torch.Tensor, torch.Tensor] | None, kind: str, stream: str
    ) -> torch.Tensor:
        """`x` with the changes that SAEs of this kind of site make from what they see; `x` itself if there are none.

        They see `x`, or, of an `update (output, input)`, the difference.
        """
        saes = self._saes(kind, stream)
        if saes is None:
            return x
        shift = saes.shift(x)
        if not saes.reads():
            return x if shift is None else self._add(x, shift)
        whole = len(x) == self.context.rows
        seen = x if update is None else update_of(*update, saes.saes[0].site)

        def grid() -> tuple[int, int]:
            return grid_of(x, self.context.size)

        cond = next((rows for branch, rows in self.context.parts() if branch == "cond"), None)
        if cond is not None:
            saes.decide(seen[cond], grid)
        groups = self._groups(saes, whole)
        each = [(rows, saes.change(seen[rows], branches, grid)) for branches, rows in groups]
        changes = [(rows, change) for rows, change in each if change is not None]
        if not changes:
            return x if shift is None else self._add(x, shift)
        if whole and len(groups) == 1:
            result = torch.empty_like(x)
        else:
            result = x.clone() if shift is None else self._add(x, shift)
        for rows, change in changes:
            add = () if shift is None else (shift if len(shift) == 1 else shift[rows],)
            write_moved(result, x, rows, sum(add, change))
        return result

    def _add(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """`x` with the shift added to the rows that the context knows of."""
        rows = self.context.rows
        if len(x) == rows:
            return add_shift(x, shift)
        return torch.cat([add_shift(x[:rows], shift[: len(x)]), x[rows:]])

    def _groups(self, saes: SAEsOfSite, whole: bool) -> list[tuple[tuple[str, ...], slice]]:
        """Adjacent branches that are changed alike, with their rows; each by itself if the batch is not `whole`."""
        groups: list[tuple[tuple[str, ...], slice]] = []
        last = None
        for branch, rows in self.context.parts():
            alike = saes.together(branch)
            if groups and whole and alike == last:
                groups[-1] = ((*groups[-1][0], branch), slice(groups[-1][1].start, rows.stop))
            else:
                groups.append(((branch,), rows))
            last = alike
        return groups
