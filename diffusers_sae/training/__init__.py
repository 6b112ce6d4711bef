"""Training SAEs on streams and on stores of activations."""

from .from_store import train_on_store
from .streaming import StreamingConfig, train_on_stream
from .trainer import SAETrainer, TrainingConfig

__all__ = ["SAETrainer", "StreamingConfig", "TrainingConfig", "train_on_store", "train_on_stream"]
