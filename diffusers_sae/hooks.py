"""The hook that reads a site, edits what an SAE sees in it and writes the change back; and the hook that captures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from .context import DenoisingContext
from .edits import Edit, code_change
from .errors import InputError
from .rules import Rule
from .saes import LatentStatistics, SparseAutoencoder
from .sites import LAYOUTS, Site, grid_of, input_of, tensor_of, with_tensor
from .strengths import Grid


@dataclass
class LoadedSAE:
    """An SAE at a site of one pipeline."""

    name: str
    sae: SparseAutoencoder
    site: Site
    statistics: LatentStatistics | None = None
    enabled: bool = True
    edits: list[Edit] = field(default_factory=list)

    def change(self, x: torch.Tensor, branch: str, context: DenoisingContext, grid: Grid) -> torch.Tensor | None:
        """`M · s(t) · (dec(z') - dec(z))` of all edits for the rows of one branch, or `None` where nothing changes.

        `x` is `(images, P, d)` in fp32; the result broadcasts to it. `grid` gives height and width of the P places.
        """
        changes = [c for edit in self.edits if (c := self._change_of(edit, x, branch, context, grid)) is not None]
        return sum(changes[1:], changes[0]) if changes else None

    def _change_of(
        self,
        edit: Edit,
        x: torch.Tensor,
        branch: str,
        context: DenoisingContext,
        grid: Grid,
    ) -> torch.Tensor | None:
        if not edit.acts_on(branch) or not edit.in_window(context.progress):
            return None
        strengths = edit.strengths_at(context, self.statistics, grid)
        if strengths is None:
            return None
        delta = code_change(edit, self.sae, x, strengths) @ self.sae.W_dec[list(edit.features)]
        if edit.mask is not None:
            delta = delta * edit.mask_at(grid(), context.images).to(delta.device)
        chosen = edit.chosen_images(context)
        return delta if chosen is None else delta * chosen[:, None, None].to(delta)


class SAEProcessor(ModelHook):
    """Encode, edit, decode at one module, for all SAEs of one pipeline that sit there.

    Every SAE reads the tensor as the model made it; their changes add up. `rules_about(name)` gives the rules that look
    at an SAE. While `armed()` is false, or if nothing
    changes, the module's output is passed on untouched. Only `pre_forward` and `post_forward` are used, since
    other hooks on the module come and go (see Hugging Face's `HookRegistry.remove_hook`).
    """

    def __init__(
        self,
        loaded: list[LoadedSAE],
        context: DenoisingContext,
        armed: Callable[[], bool],
        rules_about: Callable[[str], list[Rule]],
    ) -> None:
        super().__init__()
        self.loaded = loaded
        self.context = context
        self.armed = armed
        self.rules_about = rules_about
        self.calls = 0
        self._input: torch.Tensor | None = None

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        if not self.armed():
            return args, kwargs
        self.calls += 1
        if self._reads("update"):
            self._input = input_of(args, kwargs)
        if self._reads("input"):
            x = input_of(args, kwargs)
            edited = self._edited(x, x, "input")
            if args:
                args = (edited, *args[1:])
            else:
                kwargs = {**kwargs, "hidden_states": edited}
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if not self.armed():
            return output
        x = tensor_of(output)
        edited = self._edited(x, x, "output")
        if self._input is not None:
            edited = self._edited(edited, x - self._input, "update")
            self._input = None
        return output if edited is x else with_tensor(output, edited)

    def _reads(self, kind: str) -> bool:
        """Whether an SAE at this kind of site has edits, or rules that look at it."""
        return any(one.site.kind == kind and (one.edits or self.rules_about(one.name)) for one in self.loaded)

    def _decide(self, one: LoadedSAE, seen: torch.Tensor) -> None:
        """Apply the rules about an SAE that are not decided in this run."""
        rules = [rule for rule in self.rules_about(one.name) if rule not in self.context.decisions]
        if rules:
            part = _rows(one, seen[self.context.rows_of("cond")])
            self.context.decisions.update({rule: rule.holds(one.sae, part) for rule in rules})

    def _edited(self, x: torch.Tensor, seen: torch.Tensor, kind: str) -> torch.Tensor:
        """`x` with the changes that SAEs of this kind of site make from what they see; `x` itself if there are none."""
        total: torch.Tensor | None = None
        at_kind = [one for one in self.loaded if one.site.kind == kind]
        for one in at_kind:
            self._decide(one, seen)
        for one in at_kind:
            if not one.enabled or not one.edits:
                continue
            layout = LAYOUTS[one.site.layout]
            for branch in self.context.branches:
                rows = self.context.rows_of(branch)
                part = _rows(one, seen[rows])
                change = one.change(part, branch, self.context, lambda: grid_of(x, self.context.size))
                if change is not None:
                    total = torch.zeros_like(x, dtype=torch.float32) if total is None else total
                    total[rows] += layout.from_rows(change.expand_as(part), seen[rows])
        if total is None:
            return x
        total = total.to(x.dtype)
        return torch.where(total == 0, x, x + total)  # adding 0 would turn -0 into +0


def _rows(one: LoadedSAE, seen: torch.Tensor) -> torch.Tensor:
    """What the SAE takes of a part of a batch, `(images, P, d)` in fp32."""
    one.sae.to(seen.device)
    x = LAYOUTS[one.site.layout].to_rows(seen).float()
    if x.shape[-1] != one.sae.d_in:
        raise InputError(
            f"The SAE {one.name!r} takes activations of width {one.sae.d_in} and {one.site} has {x.shape[-1]}; "
            "load an SAE that was trained at this site."
        )
    return x


class CaptureHook(ModelHook):
    """Hands every output of a module to `take(site, tensor)` while `armed()` is true."""

    def __init__(self, site: Site, take: Callable[[Site, torch.Tensor], None], armed: Callable[[], bool]) -> None:
        super().__init__()
        self.site, self.take, self.armed = site, take, armed
        self._input: torch.Tensor | None = None

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        if self.armed() and self.site.kind != "output":
            self._input = input_of(args, kwargs)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        if self.armed():
            x = tensor_of(output)
            if self._input is not None:
                x, self._input = (self._input if self.site.kind == "input" else x - self._input), None
            self.take(self.site, x)
        return output


def attach(denoiser: nn.Module, module: nn.Module, hook: ModelHook, name: str) -> None:
    """Register `hook` on a block of `denoiser`, so that caches of the hook system notice it."""
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)
    HookRegistry.check_if_exists_or_initialize(denoiser).invalidate_child_registries_cache()


def detach(denoiser: nn.Module, module: nn.Module, name: str) -> None:
    """Remove the hook `name` from a block of `denoiser`."""
    HookRegistry.check_if_exists_or_initialize(module).remove_hook(name, recurse=False)
    HookRegistry.check_if_exists_or_initialize(denoiser).invalidate_child_registries_cache()
