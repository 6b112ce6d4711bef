"""Copies of a pipeline that share its modules, to run with other components or without steering."""

from __future__ import annotations

from typing import Any

from .handover import stock_class


def with_components(pipe: Any, **components: Any) -> Any:
    """The pipeline with other components; it shares the rest, and the plan, if there is one."""
    return _twin(type(pipe), pipe, components)


def stock_with_components(pipe: Any, **components: Any) -> Any:
    """The same without steering: edits rest, and nothing is captured."""
    return _twin(stock_class(type(pipe)), pipe, components)


def _twin(cls: Any, pipe: Any, components: dict[str, Any]) -> Any:
    twin = cls.__new__(cls)  # as copy.copy would make it, which pipelines may define otherwise
    twin.__dict__.update(vars(pipe))
    twin.register_modules(**components)
    return twin
