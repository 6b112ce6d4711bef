"""What a steerable pipeline keeps: its SAEs, its contexts, and the hooks on the components that they lie in."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .context import Context, DenoisingContext, context_of
from .families import image_maker_of
from .handover import Handover, handover_of
from .hooks import ArgumentProcessor, CaptureHook, LoadedSAE, SAEProcessor, attach, nothing
from .prepared import prepare, why_idle
from .rules import Decision, Rule
from .sites import Place, unwrapped

_numbers = itertools.count()


class Root:
    """A component of the pipeline with sites in it, and the hook on it that keeps its context."""

    def __init__(self, name: str, module: nn.Module, context: Context) -> None:
        self.name, self.module, self.context = name, module, context
        self.users = 0
        self.handle: Any = None


class _Reader:
    """The hook on a root: tells the context the arguments of every call while the pipeline runs."""

    def __init__(self, state: SteeringState, context: Context, denoiser: bool) -> None:
        self._state, self._context, self._denoiser = state, context, denoiser

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._state.armed:
            if self._denoiser and not torch.compiler.is_compiling():
                self._state.prepare()
            self._context.update(args, kwargs)  # type: ignore[attr-defined]
            if self._context.moved:
                self._state.prepare_again(self._context)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return nothing  # a copy of the module belongs to no pipeline


class SteeringState:
    """One pipeline's SAEs and hooks.

    Hooks stay on the modules from the first `load_sae` to the last `delete_saes`, since attaching them for each call
    would make compiled models compile anew. They act only while their own pipeline runs (`armed`), so that another
    pipeline that shares the modules is not touched.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = weakref.ref(pipe)
        self._name = f"diffusers_sae_{next(_numbers)}"
        self.handover = handover_of(pipe)
        self.loaded: dict[str, LoadedSAE] = {}
        self.armed = False
        self.first_image = 0
        self._roots: dict[str, Root] = {}
        self._processors: dict[tuple[nn.Module, bool], SAEProcessor] = {}
        self._detach: dict[SAEProcessor, Callable[[], None]] = {}
        self._decisions: dict[Rule | None, Decision] = {}

    def add(self, one: LoadedSAE) -> None:
        """Hook an SAE to its module."""
        root = self._hold(one.place)
        one.context = root.context
        key = one.place.module, one.place.is_argument
        if key not in self._processors:
            cls = ArgumentProcessor if one.place.is_argument else SAEProcessor
            processor = self._processors[key] = cls([], root.context, lambda: self.armed)
            self._detach[processor] = attach(one.place, one.site, processor, self._name)
        self._processors[key].loaded.append(one)
        self.loaded[one.name] = one

    def remove(self, one: LoadedSAE) -> None:
        """Unhook an SAE; the last one at a module takes the hook with it."""
        key, processor = next((k, p) for k, p in self._processors.items() if one in p.loaded)
        processor.loaded.remove(one)
        del self.loaded[one.name]
        root = next(r for r in self._roots.values() if r.context is processor.context)
        if not processor.loaded:
            del self._processors[key]
            self._detach.pop(processor)()
        self._release(root)

    def rules_about(self, name: str) -> list[Rule]:
        """Rules of all edits in force that look at the latents of the SAE `name`."""
        rules = (edit.when for one in self.loaded.values() if one.enabled for edit in one.edits)
        return [rule for rule in rules if rule is not None and rule.adapter_name == name]

    @contextmanager
    def attached(self, hooks: Sequence[tuple[Place, CaptureHook]]) -> Iterator[None]:
        """Other hooks of this pipeline, for the length of a `with` block."""
        held = []
        for place, hook in hooks:
            root = self._hold(place)
            hook.context = root.context
            name = f"{self._name}_capture_{next(_numbers)}"
            held.append((root, attach(place, hook.site, hook, name)))
        try:
            yield
        finally:
            for root, detach in held:
                detach()
                self._release(root)

    @contextmanager
    def unsteered(self) -> Iterator[None]:
        """Suspend the plan for the length of a `with` block, also if it ends in an error: no edit and no rule acts."""
        before = [(one, one.enabled) for one in self.loaded.values()]
        for one, _ in before:
            one.enabled = False
        try:
            yield
        finally:
            for one, enabled in before:
                one.enabled = enabled

    @contextmanager
    def running(self, pipe: Any, call: Mapping[str, Any]) -> Iterator[None]:
        """One call of the pipeline: the hooks act, and a site that never fired is warned of."""
        self._prepare_decisions(pipe._execution_device)
        for root in self._roots.values():
            if isinstance(root.context, DenoisingContext):
                root.context.start(pipe, call)
            else:
                root.context.begin()
                self._prepare_edits(root, pipe._execution_device)
        for processor in self._processors.values():
            processor.fired = False
        self.armed = True
        try:
            yield
        finally:
            self.armed = False
            maker = self._roots.get("handover" if self.handover else image_maker_of(pipe)[0])
            roots = [maker] if maker else self._roots.values()
            self.first_image += max((root.context.images for root in roots), default=0)
        for root in self._roots.values():
            root.context.end()
        self._warn_of_silence(pipe)
        self._warn_of_idle_edits()

    @contextmanager
    def reading(self, pipe: Any) -> Iterator[None]:
        """The text encoders run by themselves, with no denoising to follow: hooks on them act, and none is missed."""
        self._prepare_decisions(pipe._execution_device)
        for root in self._roots.values():
            if not isinstance(root.context, DenoisingContext):
                root.context.begin()
                self._prepare_edits(root, pipe._execution_device)
        self.armed = True
        try:
            yield
        finally:
            self.armed = False

    def prepare(self, loop: Any = None, total: int | None = None) -> None:
        """Make the plan ready for the scheduler's timesteps, which are set by now.

        `loop` and `total` are what the pipeline gives its progress bar, where that is known.
        """
        if not self.armed:
            return
        for root in self._roots.values():
            if isinstance(root.context, DenoisingContext) and not root.context.is_prepared:
                device = self._pipe()._execution_device  # type: ignore[union-attr]
                root.context.prepare(device, loop, total)
                self._prepare_edits(root, device)

    def prepare_again(self, context: Context) -> None:
        """Make the plan ready for other timesteps than were expected, at the first call of the denoiser."""
        root = next(r for r in self._roots.values() if r.context is context)
        self._prepare_edits(root, self._pipe()._execution_device)  # type: ignore[union-attr]

    def _prepare_edits(self, root: Root, device: torch.device) -> None:
        for one in self.loaded.values():
            if one.context is not root.context:
                continue
            one.make_ready(
                [
                    prepare(edit, one.sae, one.sae.statistics, root.context, self._decisions.get(edit.when), device)
                    for edit in (one.edits if one.enabled else [])
                ]
            )
            if one.decisions or any(e.edit.operation.needs_code for e in one.prepared):
                one.sae.fetch()
                one.sae.to(device)

    def _prepare_decisions(self, device: torch.device) -> None:
        """All rules, undecided, before anything runs: the SAE that one looks at may run before the edit is prepared."""
        rules = [edit.when for one in self.loaded.values() if one.enabled for edit in one.edits if edit.when]
        self._decisions = {rule: Decision(rule, device) for rule in rules}
        for one in self.loaded.values():
            one.decisions = [d for d in self._decisions.values() if d.rule.adapter_name == one.name]

    def _warn_of_silence(self, pipe: Any) -> None:
        for processor in self._processors.values():
            if processor.fired:
                continue
            root = next(r for r in self._roots.values() if r.context is processor.context)
            same = unwrapped(getattr(pipe, root.name, None)) is root.module
            what_now = "the site did not run" if same else f"the pipeline has another {root.name} now"
            for one in processor.loaded:
                edits = "The edits of" if one.enabled and one.edits else ""
                rules = "The edits with rules about" if self.rules_about(one.name) else ""
                for what in filter(None, (edits, rules)):
                    warnings.warn(
                        f"{what} {one.name!r} at {one.site} never acted, since {what_now}; load the SAE again.",
                        stacklevel=4,
                    )

    def _warn_of_idle_edits(self) -> None:
        for processor in self._processors.values():
            for one in processor.loaded if processor.fired else []:
                for prepared in one.prepared:
                    why = why_idle(prepared.edit, one.context)
                    if why is not None:
                        latents = ", ".join(map(str, prepared.edit.features[:5]))
                        warnings.warn(f"An edit of {one.name!r} (latents {latents}) did not act: {why}.", stacklevel=4)

    def _hold(self, place: Place) -> Root:
        """The root of a place, which tells its context its arguments from the first hook to the last."""
        root = self._roots.get(place.root_name)
        if root is None:
            root = Root(place.root_name, place.root, context_of(place.root_name))
            if isinstance(place.root, Handover):
                root.context.branches = place.root.branches
            self._roots[place.root_name] = root
            reader = _Reader(self, root.context, isinstance(root.context, DenoisingContext))
            # a native hook: one of the registry's is lost on the root under enable_model_cpu_offload
            root.handle = root.module.register_forward_pre_hook(reader, with_kwargs=True)
        root.users += 1
        return root

    def _release(self, root: Root) -> None:
        root.users -= 1
        if root.users == 0:
            root.handle.remove()
            del self._roots[root.name]
