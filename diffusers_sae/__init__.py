"""Sparse autoencoders for every Hugging Face diffusers pipeline: find concepts, turn them, measure and share them."""

from .edits import StrengthTable
from .errors import InputError
from .pipelines import SAESteeringMixin, SAESteeringPipeline
from .saes import LatentStatistics, TopKSAE
from .sites import Site

__all__ = [
    "InputError",
    "LatentStatistics",
    "SAESteeringMixin",
    "SAESteeringPipeline",
    "Site",
    "StrengthTable",
    "TopKSAE",
]
__version__ = "0.1.0"
