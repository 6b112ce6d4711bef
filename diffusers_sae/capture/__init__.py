"""Activations out of running pipelines: streamed and shuffled without a dump, or stored."""

from .store import ActivationStore
from .storing import StoreConfig, store_activations
from .stream import ShuffleBuffer, StreamBatch, stream_activations

__all__ = [
    "ActivationStore",
    "ShuffleBuffer",
    "StoreConfig",
    "StreamBatch",
    "store_activations",
    "stream_activations",
]
