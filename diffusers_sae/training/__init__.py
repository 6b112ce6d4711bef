"""Training SAEs on streams of activations."""

from .streaming import StreamingConfig, train_on_stream
from .trainer import SAETrainer, TrainingConfig

__all__ = ["SAETrainer", "StreamingConfig", "TrainingConfig", "train_on_stream"]
