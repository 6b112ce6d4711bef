"""Activations out of running pipelines: streamed and shuffled without a dump, or stored."""

from .store import ActivationStore
from .storing import StoreConfig, store_activations
from .stream import ShuffleBuffer, StreamBatch, stream_activations
from .text import TokenActivations, read_prompts, stream_prompts

__all__ = [
    "ActivationStore",
    "ShuffleBuffer",
    "StoreConfig",
    "StreamBatch",
    "TokenActivations",
    "read_prompts",
    "store_activations",
    "stream_activations",
    "stream_prompts",
]
