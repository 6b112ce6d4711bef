"""Activations out of running pipelines: streamed, shuffled, never dumped."""

from .stream import ShuffleBuffer, StreamBatch, stream_activations

__all__ = ["ShuffleBuffer", "StreamBatch", "stream_activations"]
