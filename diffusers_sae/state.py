"""What a steerable pipeline keeps: its SAEs, its context, and the hooks that hang on its U-Net."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers.hooks import ModelHook
from torch import nn

from .context import DenoisingContext
from .hooks import LoadedSAE, SAEProcessor, attach, detach
from .rules import Rule

_numbers = itertools.count()


class SteeringState:
    """One pipeline's SAEs and hooks.

    Hooks stay on the modules from the first `load_sae` to the last `delete_saes`, since attaching them for each call
    would make compiled models compile anew. They act only while their own pipeline runs (`armed`), so that another
    pipeline that shares the U-Net is not touched.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = weakref.ref(pipe)
        self._name = f"diffusers_sae_{next(_numbers)}"
        self.context = DenoisingContext()
        self.loaded: dict[str, LoadedSAE] = {}
        self.armed = False
        self.first_image = 0
        self._processors: dict[nn.Module, SAEProcessor] = {}
        self._denoiser: nn.Module | None = None
        self._root_hook: Any = None
        self._users = 0

    def add(self, one: LoadedSAE, module: nn.Module) -> None:
        """Hook an SAE to its module."""
        if module not in self._processors:
            processor = SAEProcessor([], self.context, lambda: self.armed, self.rules_about)
            attach(self._hold_denoiser(), module, processor, self._name)
            self._processors[module] = processor
        self._processors[module].loaded.append(one)
        self.loaded[one.name] = one

    def remove(self, one: LoadedSAE) -> None:
        """Unhook an SAE; the last one at a module takes the hook with it."""
        module, processor = next((m, p) for m, p in self._processors.items() if one in p.loaded)
        processor.loaded.remove(one)
        del self.loaded[one.name]
        if not processor.loaded:
            del self._processors[module]
            self._release_denoiser([(module, self._name)])

    def rules_about(self, name: str) -> list[Rule]:
        """Rules of all edits that look at the latents of the SAE `name`."""
        rules = (edit.when for one in self.loaded.values() for edit in one.edits)
        return [rule for rule in rules if rule is not None and rule.adapter_name == name]

    @contextmanager
    def attached(self, hooks: Sequence[tuple[nn.Module, ModelHook]]) -> Iterator[None]:
        """Other hooks of this pipeline, for the length of a `with` block."""
        denoiser = self._hold_denoiser()
        named = [(module, hook, f"{self._name}_capture_{next(_numbers)}") for module, hook in hooks]
        for module, hook, name in named:
            attach(denoiser, module, hook, name)
        try:
            yield
        finally:
            self._release_denoiser([(module, name) for module, _, name in named])

    @contextmanager
    def running(self, pipe: Any) -> Iterator[None]:
        """One call of the pipeline: the hooks act, and a site that never fired is warned of."""
        self.context.begin()
        for processor in self._processors.values():
            processor.calls = 0
        self.armed = True
        try:
            yield
        finally:
            self.armed = False
            self.first_image += self.context.images
        self._warn_of_silence(pipe)

    def _warn_of_silence(self, pipe: Any) -> None:
        for processor in self._processors.values():
            if processor.calls:
                continue
            same = pipe.unet is self._denoiser
            why = "the site did not run" if same else "the pipeline has another U-Net now"
            for one in processor.loaded:
                edits = "The edits of" if one.enabled and one.edits else ""
                rules = "The edits with rules about" if self.rules_about(one.name) else ""
                for what in filter(None, (edits, rules)):
                    warnings.warn(
                        f"{what} {one.name!r} at {one.site} never acted, since {why}; load the SAE again.",
                        stacklevel=4,
                    )

    def _hold_denoiser(self) -> nn.Module:
        """The U-Net, which tells the context its arguments from the first hook to the last."""
        self._users += 1
        if self._denoiser is None:
            self._denoiser = self._pipe().unet  # type: ignore[union-attr]

            def read(module: nn.Module, args: tuple, kwargs: dict) -> None:
                if self.armed:
                    self.context.update(self._pipe(), args, kwargs)

            # a native hook: one of the registry's is lost on the root under enable_model_cpu_offload
            self._root_hook = self._denoiser.register_forward_pre_hook(read, with_kwargs=True)
        return self._denoiser

    def _release_denoiser(self, hooks: Sequence[tuple[nn.Module, str]]) -> None:
        """Take `hooks` (module, name) off, and with the last ones the one on the U-Net."""
        assert self._denoiser is not None
        for module, name in hooks:
            detach(self._denoiser, module, name)
        self._users -= 1
        if self._users == 0:
            self._root_hook.remove()
            self._root_hook = self._denoiser = None
