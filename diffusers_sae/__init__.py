"""Sparse autoencoders for every Hugging Face diffusers pipeline: find concepts, turn them, measure and share them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import InputError
    from .inversion import Inversion, invert
    from .loaders import load_sae
    from .pipelines import SAESteeringMixin, SAESteeringPipeline
    from .rules import Rule
    from .saes import (
        BatchTopKSAE,
        ChannelAwareSAE,
        Directions,
        GatedSAE,
        JumpReLUSAE,
        LatentStatistics,
        MatryoshkaSAE,
        ReLUSAE,
        TopKSAE,
    )
    from .sites import Site
    from .strengths import StrengthMap, StrengthTable

__all__ = [
    "BatchTopKSAE",
    "ChannelAwareSAE",
    "Directions",
    "GatedSAE",
    "InputError",
    "Inversion",
    "JumpReLUSAE",
    "LatentStatistics",
    "MatryoshkaSAE",
    "ReLUSAE",
    "Rule",
    "SAESteeringMixin",
    "SAESteeringPipeline",
    "Site",
    "StrengthMap",
    "StrengthTable",
    "TopKSAE",
    "invert",
    "load_sae",
]
__version__ = "0.1.0"

# torch and diffusers take seconds to import, in which the command line could not yet answer Ctrl-C in a sentence
_EXPORTS = {
    "errors": ("InputError",),
    "inversion": ("Inversion", "invert"),
    "loaders": ("load_sae",),
    "pipelines": ("SAESteeringMixin", "SAESteeringPipeline"),
    "rules": ("Rule",),
    "saes": (
        "BatchTopKSAE", "ChannelAwareSAE", "Directions", "GatedSAE", "JumpReLUSAE", "LatentStatistics",
        "MatryoshkaSAE", "ReLUSAE", "TopKSAE",
    ),
    "sites": ("Site",),
    "strengths": ("StrengthMap", "StrengthTable"),
}  # fmt: skip
"""Which module defines which of the names."""
_MODULES = {name: module for module, names in _EXPORTS.items() for name in names}


def __getattr__(name: str) -> Any:
    """The export of that name, or the module (`diffusers_sae.saes`), imported when it is first asked for."""
    if name in _MODULES:
        value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    elif name in _EXPORTS:
        value = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
