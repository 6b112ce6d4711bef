"""The dictionaries: one architecture a file, found by name in `ARCHITECTURES`."""

from .base import ARCHITECTURES, SparseAutoencoder, SparseCode, register_architecture
from .statistics import LatentStatistics, StatisticsAccumulator
from .topk import TopKSAE

__all__ = [
    "ARCHITECTURES",
    "LatentStatistics",
    "SparseAutoencoder",
    "SparseCode",
    "StatisticsAccumulator",
    "TopKSAE",
    "register_architecture",
]
