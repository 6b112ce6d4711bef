"""The plan of a pipeline: its SAEs, their edits, what observes it, and the hooks on the modules that these need."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..handover import handover_of
from ..rules import Rule
from ..sites import Place
from .attachment import Attachment, attach, attach_root, release
from .module_run import Observer
from .sae_run import LoadedSAE


class SteeringState:
    """What a steerable pipeline keeps between its runs.

    Hooks stay on the modules from the first `load_sae` to the last `delete_saes`, since attaching them for each call
    would make compiled models compile anew. They leave with the state, too, when the pipeline is collected.
    """

    def __init__(self, pipe: Any) -> None:
        self.handover = handover_of(pipe)
        self.loaded: dict[str, LoadedSAE] = {}
        self.next_image = 0
        self.decisions: dict[tuple[str, int], torch.Tensor] = {}
        self._observers: list[Observer] = []
        self._resting: list[object] = []
        self._hooks: dict[LoadedSAE | Observer, tuple[Attachment, Attachment]] = {}
        weakref.finalize(self, _release_all, self._hooks).atexit = False

    def add(self, loaded: LoadedSAE) -> None:
        """Hook an SAE to its module."""
        self._attach(loaded, loaded.place)
        self.loaded[loaded.name] = loaded

    def remove(self, loaded: LoadedSAE) -> None:
        """Unhook an SAE."""
        del self.loaded[loaded.name]
        self._detach(loaded)

    def active(self) -> list[LoadedSAE]:
        """The SAEs whose edits are in force."""
        return [] if self._resting else [loaded for loaded in self.loaded.values() if loaded.enabled]

    def rules_about(self, name: str) -> list[Rule]:
        """Rules of all edits in force that look at the latents of the SAE `name`."""
        rules = (edit.when for loaded in self.active() for edit in loaded.edits)
        return [rule for rule in rules if rule is not None and rule.adapter_name == name]

    def plan(self) -> tuple[Any, ...]:
        """All that a run does, as objects whose identity tells whether it has changed."""
        saes = [part for loaded in self.loaded.values() for part in (loaded, loaded.enabled, *loaded.edits)]
        return (*saes, *self._observers, *self._resting)

    def roots(self) -> list[tuple[str, Place]]:
        """Every component with sites in use: the key of its hook, and the place of one of its sites."""
        return list({root.key: (root.key, user.place) for user, (root, _) in self._hooks.items()}.values())

    def modules(self) -> Iterator[tuple[str, str, list[LoadedSAE], list[Observer]]]:
        """Every module with sites in use: the keys of its hook and of its root's, its SAEs and its observers."""
        for root, hook in {hook.key: (root, hook) for root, hook in self._hooks.values()}.values():
            saes = [loaded for loaded in self.loaded.values() if self._hooks[loaded][1] is hook]
            observers = [observer for observer in self._observers if self._hooks[observer][1] is hook]
            yield hook.key, root.key, saes, observers

    @contextmanager
    def observed(self, observers: Sequence[Observer]) -> Iterator[None]:
        """Let observers see the runs of this pipeline, for the length of a `with` block."""
        try:
            for observer in observers:
                self._attach(observer, observer.place)
                self._observers.append(observer)
            yield
        finally:
            for observer in observers:
                if observer in self._observers:
                    self._observers.remove(observer)
                    self._detach(observer)

    @contextmanager
    def unsteered(self) -> Iterator[None]:
        """Suspend the plan for the length of a `with` block: no edit and no rule acts."""
        self._resting.append(rests := object())
        try:
            yield
        finally:
            self._resting.remove(rests)

    def follow_modules(self) -> None:
        """Move hooks to what is now at their sites' paths, such as the LoRA that has replaced a Linear there."""
        for user, (root, hook) in list(self._hooks.items()):
            module = _module_now(user.place)
            if module is user.place.module:
                hook.attach()  # again, if something that was removed took it along
                root.attach()
            else:
                user.place = user.place._replace(module=module)
                self._detach(user)
                self._attach(user, user.place)

    def _attach(self, user: LoadedSAE | Observer, place: Place) -> None:
        root = attach_root(place)
        try:
            self._hooks[user] = root, attach(place)
        except BaseException:
            release(root)
            raise

    def _detach(self, user: LoadedSAE | Observer) -> None:
        for attachment in reversed(self._hooks.pop(user)):
            release(attachment)


def _module_now(place: Place) -> nn.Module:
    """The module that is at the path of a place by now; the one that was, if there is none any more."""
    try:
        return place.root.get_submodule(place.path) if place.path else place.module
    except AttributeError:
        return place.module


def _release_all(hooks: dict[LoadedSAE | Observer, tuple[Attachment, Attachment]]) -> None:
    """Take off the hooks of a pipeline that is gone."""
    while hooks:
        for attachment in reversed(hooks.popitem()[1]):
            release(attachment)
