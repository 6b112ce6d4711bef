"""How hooks get on modules and off again. A module carries one hook, whatever number of pipelines use it; the hook has
no state, and acts for the run that the calling thread is in."""

from __future__ import annotations

import copyreg
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

from ..sites import Place
from .current import current_run

NAME = "diffusers_sae"
"""Of our hook in diffusers' registry, and of the attribute of a module that lists what is attached to it."""
_ATTRIBUTE = f"_{NAME}"
_keys = itertools.count()
_lock = threading.RLock()


class SAEProcessor(ModelHook):
    """Encodes, edits and decodes at one module, for the run of the calling thread.

    Only `pre_forward` and `post_forward` are used: diffusers loses a hook's `new_forward` when a hook that was
    registered before it is removed.
    """

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        run = current_run()
        here = None if run is None else run.at(self.key)
        return (args, kwargs) if here is None else here.before(args, kwargs)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        run = current_run()
        here = None if run is None else run.at(self.key)
        return output if here is None else here.after(module, output)


class ArgumentProcessor:
    """The same for an argument of a denoiser, such as `image_embeds`: a native forward pre-hook."""

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        run = current_run()
        here = None if run is None else run.at(self.key)
        return None if here is None else here.argument(args, kwargs)


class RootHook:
    """Shows the arguments of a component's calls to the run: a native forward pre-hook.

    A hook of diffusers' registry would be lost on the root of a component under `enable_model_cpu_offload`.
    """

    def __init__(self, key: str) -> None:
        self.key = key

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        run = current_run()
        if run is not None:
            run.enter(self.key, args, kwargs)


class Attachment:
    """One hook on one module, shared by all that use it: it goes with the last of them.

    Args:
        module: that carries the hook.
        root: the component that the module lies in; the same one for hooks on a component.
        make: gives the hook for a key. A `ModelHook` goes into the module's registry, another one becomes a native
            forward pre-hook.
    """

    def __init__(self, module: nn.Module, root: nn.Module, make: Callable[[str], Any]) -> None:
        self.module, self.root = module, root
        self.key = f"{NAME}_{next(_keys)}"
        self.users = 0
        self._hook = make(self.key)
        self._handle: Any = None

    def attach(self) -> None:
        """Put the hook on, or do so again where something that was removed from the module took it along."""
        if isinstance(self._hook, ModelHook):
            if not _is_called(self.module):
                _register(self.root, self.module, self._hook)
        elif self._handle is None:
            self._handle = self.module.register_forward_pre_hook(self._hook, with_kwargs=True)

    def detach(self) -> None:
        """Take the hook off."""
        if isinstance(self._hook, ModelHook):
            _unregister(self.root, self.module)
        elif self._handle is not None:
            self._handle.remove()
            self._handle = None

    @property
    def handle_id(self) -> int | None:
        """The key of a native hook in the module's dict of hooks."""
        return None if self._handle is None else self._handle.id


def attach(place: Place) -> Attachment:
    """Use the hook of a site's module; one more use that `release` ends."""
    return _use(place.module, place.root, ArgumentProcessor if place.is_argument else SAEProcessor)


def attach_root(place: Place) -> Attachment:
    """Use the hook on the component that a site lies in, which must come before those in it."""
    return _use(place.root, place.root, RootHook)


def _use(module: nn.Module, root: nn.Module, make: Callable[[str], Any]) -> Attachment:
    with _lock:
        attachments = module.__dict__.setdefault(_ATTRIBUTE, {})
        name = make.__name__  # type: ignore[attr-defined]
        attachment = attachments.get(name) or Attachment(module, root, make)
        attachment.attach()
        attachments[name] = attachment
        attachment.users += 1
        module.__dict__.setdefault("__reduce_ex__", lambda protocol: _reduce(module))
        return attachment


def release(attachment: Attachment) -> None:
    """End one use of a hook; the last one leaves the module as it was."""
    with _lock:
        attachment.users -= 1
        if attachment.users:
            return
        module = attachment.module
        attachment.detach()
        attachments = module.__dict__[_ATTRIBUTE]
        attachments.pop(next(name for name, each in attachments.items() if each is attachment))
        if not attachments:
            del module.__dict__[_ATTRIBUTE], module.__dict__["__reduce_ex__"]


def _reduce(module: nn.Module) -> tuple:
    """How a hooked module is copied and pickled: without hooks, since a copy belongs to no pipeline.

    With its registry, a copy would go on calling the weights of the original.
    """
    state = {k: v for k, v in module.__dict__.items() if k not in (_ATTRIBUTE, "__reduce_ex__")}
    if hasattr(module, "_diffusers_hook"):
        state.pop("forward", None)
        state.pop("_diffusers_hook")
    ours = {attachment.handle_id for attachment in module.__dict__[_ATTRIBUTE].values()}
    for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        hooks = state[name]
        state[name] = type(hooks)((key, hook) for key, hook in hooks.items() if key not in ours)
    return copyreg.__newobj__, (type(module),), state  # type: ignore[attr-defined]


def _register(root: nn.Module, module: nn.Module, hook: ModelHook) -> None:
    """Register `hook` on a block of `root`, inside of its cache if it has one, so that the hook system notices it."""
    registry = HookRegistry.check_if_exists_or_initialize(module)
    if NAME in registry.hooks:  # though it is not called any more
        _forget(registry)
    with _without_cache(root):
        registry.register_hook(hook, NAME)
    HookRegistry.check_if_exists_or_initialize(root).invalidate_child_registries_cache()


def _unregister(root: nn.Module, module: nn.Module) -> None:
    """Remove our hook from a block of `root`, also from under a hook of accelerate's."""
    registry = HookRegistry.check_if_exists_or_initialize(module)
    with _without_cache(root):
        outer: Any = module.forward
        if not _is_called(module):
            _forget(registry)
        elif _link(registry, outer) is None and hasattr(module, "_old_forward"):
            # diffusers would put the plain forward in place of accelerate's, which then could not load the weights
            module.forward = module._old_forward  # type: ignore[assignment]
            registry.remove_hook(NAME, recurse=False)
            module._old_forward, module.forward = module.forward, outer  # type: ignore[assignment]
        else:
            registry.remove_hook(NAME, recurse=False)
    if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
        del module.forward  # which diffusers puts on the module itself
    HookRegistry.check_if_exists_or_initialize(root).invalidate_child_registries_cache()


def _forget(registry: HookRegistry) -> None:
    """Strike our hook off a registry whose chain of calls is gone."""
    index = registry._hook_order.index(NAME)
    del registry.hooks[NAME], registry._hook_order[index], registry._fn_refs[index]


def _link(registry: HookRegistry, forward: Any) -> int | None:
    """Which hook of a registry a forward function calls first, by its index; `None` if it is no function of it."""
    cells = getattr(getattr(forward, "func", None), "__closure__", None) or ()
    links = [i for i, link in enumerate(registry._fn_refs) for cell in cells if cell.cell_contents is link]
    return links[0] if links else None


def _is_called(module: nn.Module) -> bool:
    """Whether a call of the module reaches our hook.

    accelerate keeps the forward function that it wraps and puts it back later, whatever was registered since.
    """
    registry = getattr(module, "_diffusers_hook", None)
    if registry is None or NAME not in registry.hooks:
        return False
    ours = registry._hook_order.index(NAME)
    forward: Any = module.forward
    while forward is not None:
        link = _link(registry, forward)
        if link is not None and link >= ours:
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


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
