"""Sparse autoencoders for every Hugging Face diffusers pipeline: find concepts, turn them, measure and share them."""

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
