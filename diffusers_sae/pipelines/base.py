"""What makes a class of pipelines steerable: its calls are runs, and its copies carry the plan."""

from __future__ import annotations

import copyreg
from dataclasses import replace
from typing import Any

from diffusers import DiffusionPipeline

from ..errors import InputError
from ..handover import methods_through_handover
from ..hooks import SteeringState, as_run, is_run
from ..sites import resolve


class SteerableBase:
    """Calls that are runs, copies and pickles that carry the plan, and the plan itself."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Make the calls of a pipeline's class runs, whether it is a user's or made on the fly."""
        super().__init_subclass__(**kwargs)
        if not issubclass(cls, DiffusionPipeline):
            return
        mixin, pipeline = (cls.__mro__.index(each) for each in (SteerableBase, DiffusionPipeline))
        if mixin > pipeline:
            raise InputError(
                f"{cls.__name__} inherits steering after the pipeline, whose methods would come first; write "
                f"class {cls.__name__}(SAESteeringPipeline, ...)."
            )
        if cls.__call__ is SteerableBase.__call__:
            cls.__call__ = super().__call__  # type: ignore[misc,method-assign]
        through_handover = methods_through_handover(cls)
        for name in {"__call__": None, **through_handover}:
            method = getattr(cls, name)
            if name == "noise_image_embeddings":
                cls.noise_image_embeddings = through_handover[name]  # type: ignore[attr-defined]
            elif not is_run(method):
                nested = method if name in through_handover else None
                setattr(cls, name, as_run(through_handover.get(name, method), nested))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The pipeline's own call, which is a run by itself, also where a subclass's methods make it by `super()`."""
        return as_run(super().__call__.__func__)(self, *args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Copies and pickles carry the plan, to be the plan of an independent pipeline."""
        attributes = {name: value for name, value in self.__dict__.items() if name != "_steering_state"}
        plan = [replace(loaded, place=None) for loaded in self._steering.loaded.values()]  # type: ignore[arg-type]
        return copyreg.__newobj__, (type(self),), {**attributes, "_plan": plan}  # type: ignore[attr-defined]

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        plan = attributes.pop("_plan", [])
        self.__dict__.update(attributes)
        for loaded in plan:
            self._steering.add(replace(loaded, place=resolve(self, loaded.site), edits=list(loaded.edits)))

    @property
    def _steering(self) -> SteeringState:
        state = self.__dict__.get("_steering_state")
        if state is None:
            state = self.__dict__["_steering_state"] = SteeringState(self)
        return state
