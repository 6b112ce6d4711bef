"""The state of one call of one pipeline: where it is, which edits are ready for it, and what its rules decided."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..context import Context, DenoisingContext, TextContext, context_of
from ..edits import Edit
from ..families import image_maker_of
from ..handover import Handover
from ..prepared import PreparedEdit, prepare, why_idle
from ..rules import Decision, Rule
from ..sites import Place, unwrapped
from .current import Run, current_run, set_current_run
from .module_run import ModuleRun
from .sae_run import LoadedSAE
from .state import SteeringState

_placing = threading.Lock()
"""Held while an SAE's weights are read or moved, since pipelines in several threads may share it."""


class SteeringRun:
    """One call of a pipeline, in the thread that makes it; a context manager around the call.

    Runs may overlap in several threads, nest, and share modules: hooks act for the innermost run of their thread. The
    plan is read when the run begins and after every callback, and what has changed acts from the next step on.

    Args:
        state: of the pipeline.
        pipe: the pipeline, or a copy of it that shares the state.
        call: arguments of the call.
        reads_only: the text encoders run by themselves, with no denoising to follow.

    Attributes:
        modules: what the run does at each hooked module, by the key of the hook.
        contexts: where each component is, by the key of the hook on it.
    """

    def __init__(self, state: SteeringState, pipe: Any, call: Mapping[str, Any], reads_only: bool = False) -> None:
        self.state, self.pipe, self.call = state, pipe, call
        self.modules: dict[str, ModuleRun] = {}
        self.contexts: dict[str, Context] = {}
        self.first_image = state.next_image
        self._reads_only = reads_only
        self._progress: tuple[Any, int | None] | None = None
        self._device = pipe._execution_device
        self._outer: Run | None = None
        self._ran_inside: set[str] = set()
        self._decided_inside: dict[tuple[str, int], torch.Tensor] = {}
        self._plan: tuple[Any, ...] = ()
        self._decisions: dict[Rule, Decision] = {}
        self._prepared: dict[Edit, tuple[Context, PreparedEdit]] = {}

    def __enter__(self) -> SteeringRun:
        self.state.follow_modules()
        self._outer = current_run()
        self._take_plan()
        set_current_run(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        set_current_run(self._outer)
        self._count_images()
        self.state.decisions = {**self._decided_inside, **self.decisions()}
        outer = self._outer_of_pipeline
        if outer is not None:
            outer._absorb(self)
        if kind is None and not self._reads_only:
            for context in self.contexts.values():
                context.end()
            if outer is None:
                self._warn_of_silence()
            self._warn_of_idle_edits()

    @property
    def _outer_of_pipeline(self) -> SteeringRun | None:
        """The run of the same pipeline that this one is inside of: a subclass's call around the pipeline's own."""
        same = isinstance(self._outer, SteeringRun) and self._outer.state is self.state
        return self._outer if same else None  # type: ignore[return-value]

    def at(self, key: str) -> ModuleRun | None:
        """What the run does at the module whose hook has this key."""
        return self.modules.get(key)

    def enter(self, key: str, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """A component is about to run with these arguments."""
        if key not in self.contexts:
            return
        context = self.contexts[key]
        if isinstance(context, DenoisingContext) and not torch.compiler.is_compiling():
            self.prepare()
        context.update(args, kwargs)  # type: ignore[attr-defined]
        if context.moved:
            self._prepare_anew(context)

    def context_of(self, root: nn.Module) -> Context:
        """Where a component with sites in use is."""
        return next(self.contexts[key] for key, place in self.state.roots() if place.root is root)

    def prepare(self, loop: Any = None, total: int | None = None) -> None:
        """Make the plan ready for the scheduler's timesteps, which are set by now.

        Args:
            loop, total: what the pipeline gives its progress bar, where that is known.
        """
        if self._reads_only:
            return
        if self._progress is None or loop is not None or total is not None:
            self._progress = loop, total  # kept also for components whose first site comes later in the run
        for context in self.contexts.values():
            if isinstance(context, DenoisingContext) and not context.is_prepared:
                context.prepare(self._device, loop, total)
                self._prepare_anew(context)

    def _prepare_anew(self, context: Context) -> None:
        """Make edits ready for other timesteps than they were."""
        self._prepared = {edit: ready for edit, ready in self._prepared.items() if ready[0] is not context}
        self._arrange()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Somebody else's code runs in this thread, which may run pipelines, this one too, and change the plan."""
        self._count_images()
        set_current_run(None)
        try:
            yield
        finally:
            set_current_run(self)
        if not _same(self._plan, self.state.plan()):
            self._take_plan()

    def decisions(self) -> dict[tuple[str, int], torch.Tensor]:
        """What rules about whole images have decided, by SAE and index of the edit: bool `(images,)`."""
        return {
            (loaded.name, i): decision.holds
            for loaded in self.state.active()
            for i, edit in enumerate(loaded.edits)
            if edit.when is not None and edit.when.at == "image"
            for decision in (self._decisions.get(edit.when),)
            if decision is not None and decision.holds is not None
        }

    def _take_plan(self) -> None:
        self._plan = self.state.plan()
        rules = [edit.when for loaded in self.state.active() for edit in loaded.edits if edit.when]
        # all rules, undecided, before anything runs: the SAE that one looks at may run before the edit is prepared
        self._decisions = {rule: self._decisions.get(rule) or self._new_decision(rule) for rule in rules}
        for key, place in self.state.roots():
            if key not in self.contexts:
                self._add_context(key, place)
        self._arrange()

    def _new_decision(self, rule: Rule) -> Decision:
        """Undecided; or as the run outside decided by the prompt, which may reach this one as embeddings."""
        outer, watched = self._outer_of_pipeline, self.state.loaded.get(rule.adapter_name or "")
        if outer is not None and watched is not None and watched.site.is_text_encoder and rule in outer._decisions:
            return copy.copy(outer._decisions[rule])
        return Decision(rule, self._device)

    def _add_context(self, key: str, place: Place) -> None:
        context = context_of(place.root_name)
        if isinstance(place.root, Handover):
            context.branches = place.root.branches
        context.first_image = self.first_image
        if isinstance(context, TextContext):
            context.start(self.call)
        if isinstance(context, DenoisingContext):
            context.start(self.pipe, self.call)
            if self._progress is not None:
                context.prepare(self._device, *self._progress, underway=True)
        self.contexts[key] = context

    def _arrange(self) -> None:
        """Tell every module what to do, with edits made ready that were not yet."""
        active = self.state.active()
        edits = {edit: None for loaded in active for edit in loaded.edits}
        self._prepared = {edit: ready for edit, ready in self._prepared.items() if edit in edits}
        modules = {}
        for key, root_key, saes, observers in self.state.modules():
            context = self.contexts[root_key]
            modules[key] = self.modules.get(key) or ModuleRun(context)
            runs = [loaded.in_run(context, self._ready(loaded, context), self._about(loaded)) for loaded in saes]
            modules[key].arrange(runs, observers)
        self.modules = modules

    def _about(self, loaded: LoadedSAE) -> list[Decision]:
        """The rules that look at an SAE."""
        return [decision for decision in self._decisions.values() if decision.rule.adapter_name == loaded.name]

    def _ready(self, loaded: LoadedSAE, context: Context) -> list[PreparedEdit]:
        """The edits of an SAE, made ready, if they can be by now."""
        edits = loaded.edits if loaded in self.state.active() else []
        if isinstance(context, DenoisingContext) and not context.is_prepared:
            return []
        for edit in edits:
            if edit not in self._prepared:
                decision = None if edit.when is None else self._decisions[edit.when]
                self._prepared[edit] = context, self._made_ready(edit, loaded, context, decision)
        if self._about(loaded) or any(edit.operation.needs_code for edit in edits):
            with _placing:
                loaded.sae.fetch()
                loaded.sae.to(self._device)
        return [self._prepared[edit][1] for edit in edits]

    def _made_ready(self, edit: Edit, loaded: LoadedSAE, context: Context, decision: Decision | None) -> PreparedEdit:
        """One edit, made ready. Its strengths may be functions, which must not meet the run."""
        before = current_run()
        set_current_run(None)
        try:
            return prepare(edit, loaded.sae, loaded.sae.statistics, context, decision, self._device)
        finally:
            set_current_run(before)

    def _count_images(self) -> None:
        """Let the images of later runs be numbered after those of this one."""
        if self._reads_only:
            return
        maker = "handover" if self.state.handover else image_maker_of(self.pipe)[0]
        roots = {place.root_name: self.contexts[key] for key, place in self.state.roots() if key in self.contexts}
        contexts = [roots[maker]] if maker in roots else list(roots.values())
        images = max((context.images for context in contexts), default=0)
        self.state.next_image = max(self.state.next_image, self.first_image + images)

    def _absorb(self, inner: SteeringRun) -> None:
        """A run of the same pipeline inside this one has ended; a module that ran in it has run."""
        self._ran_inside |= inner._ran_inside | {key for key, module in inner.modules.items() if module.fired}
        self._decided_inside = self.state.decisions

    def _warn_of_silence(self) -> None:
        """Warn of edits and rules whose site has never run."""
        for key, _, saes, _ in self.state.modules():
            if key not in self.modules or self.modules[key].fired or key in self._ran_inside:
                continue
            for loaded in saes:
                place = loaded.place
                same = unwrapped(getattr(self.pipe, place.root_name, place.root)) is place.root
                what_now = "the site did not run" if same else f"the pipeline has another {place.root_name} now"
                edits = "The edits of" if loaded.enabled and loaded.edits else ""
                rules = "The edits with rules about" if self.state.rules_about(loaded.name) else ""
                for what in filter(None, (edits, rules)):
                    warnings.warn(
                        f"{what} {loaded.name!r} at {loaded.site} never acted, since {what_now}; load the SAE again.",
                        stacklevel=4,
                    )

    def _warn_of_idle_edits(self) -> None:
        """Warn of edits whose window or branch the run does not have."""
        for key, _, saes, _ in self.state.modules():
            if key in self.modules and self.modules[key].fired:
                for loaded in saes:
                    for edit in loaded.edits:
                        self._warn_of_idle_edit(loaded, edit)

    def _warn_of_idle_edit(self, loaded: LoadedSAE, edit: Edit) -> None:
        if edit in self._prepared:
            why = why_idle(edit, self._prepared[edit][0])
            if why is not None:
                latents = ", ".join(map(str, edit.features[:5]))
                warnings.warn(f"An edit of {loaded.name!r} (latents {latents}) did not act: {why}.", stacklevel=5)


def _same(plan: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether two plans hold the same objects."""
    return len(plan) == len(other) and all(a is b for a, b in zip(plan, other, strict=True))
