"""`SAESteeringPipeline`: any supported diffusers pipeline, made steerable."""

from __future__ import annotations

import functools
import os
from typing import Any

from diffusers import DiffusionPipeline

from ..errors import InputError
from ..families import pipeline_class
from .mixin import SAESteeringMixin


class SAESteeringPipeline(SAESteeringMixin):
    """Makes any supported diffusers pipeline steerable.

    Both constructors return an object that is an instance of `SAESteeringPipeline` and of the stock class.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """`DiffusionPipeline.from_pretrained`, with its arguments, made steerable."""
        if issubclass(cls, DiffusionPipeline):
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        pipe = pipeline_class(pretrained_model_name_or_path, kwargs).from_pretrained(
            pretrained_model_name_or_path, **kwargs
        )
        pipe.__class__ = _steerable(type(pipe))  # type: ignore[arg-type]
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """A steerable pipeline that shares `pipeline`'s modules, dtypes and devices; `pipeline` itself is not changed.

        Unlike `DiffusionPipeline.from_pipe`, nothing is cast. Keyword arguments replace components.
        """
        if not isinstance(pipeline, DiffusionPipeline):
            raise InputError(f"from_pipe takes a diffusers pipeline, not {type(pipeline).__name__}; pass one.")
        if issubclass(cls, DiffusionPipeline):
            return super().from_pipe(pipeline, **{"dtype": pipeline.dtype, **kwargs})  # type: ignore[misc]
        stock = type(pipeline)
        pipe: Any = stock.__new__(stock) if issubclass(stock, SAESteeringPipeline) else _empty(stock)
        pipe.__dict__.update(pipeline.__dict__)
        pipe.__dict__.pop("_steering_state", None)
        if kwargs:
            pipe.register_modules(**kwargs)
        return pipe

    def __reduce_ex__(self, protocol: Any) -> tuple:
        make, arguments, state = super().__reduce_ex__(protocol)
        made_of = type(self).__dict__.get("_made_of")
        return (make, arguments, state) if made_of is None else (_empty, (made_of,), state)


@functools.cache
def _steerable(cls: Any) -> type:
    """`cls` with steering, under the same name and module, so that it saves and loads as the stock class."""
    described = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (SAESteeringPipeline, cls), {**described, "_made_of": cls})


def _empty(made_of: type) -> Any:
    """A steerable pipeline without attributes: classes made on the fly have no name to be pickled by."""
    cls: Any = _steerable(made_of)
    return cls.__new__(cls)
