"""Training SAEs on streams and on stores of activations."""

from .from_store import train_on_store
from .streaming import StreamedSAE, StreamingConfig, train_on_stream
from .trainer import SAETrainer, TrainingConfig

__all__ = ["SAETrainer", "StreamedSAE", "StreamingConfig", "TrainingConfig", "train_on_store", "train_on_stream"]
