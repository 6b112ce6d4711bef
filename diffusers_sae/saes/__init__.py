"""The dictionaries: one architecture a file, found by name in `ARCHITECTURES`."""

from .base import ARCHITECTURES, SparseAutoencoder, SparseCode, register_architecture
from .batch_topk import BatchTopKSAE
from .channel_aware import ChannelAwareSAE
from .directions import Directions
from .gated import GatedSAE
from .jump_relu import JumpReLUSAE
from .matryoshka import MatryoshkaSAE
from .relu import ReLUSAE
from .statistics import LatentStatistics, StatisticsAccumulator
from .topk import TopKSAE

__all__ = [
    "ARCHITECTURES",
    "BatchTopKSAE",
    "ChannelAwareSAE",
    "Directions",
    "GatedSAE",
    "JumpReLUSAE",
    "LatentStatistics",
    "MatryoshkaSAE",
    "ReLUSAE",
    "SparseAutoencoder",
    "SparseCode",
    "StatisticsAccumulator",
    "TopKSAE",
    "register_architecture",
]
