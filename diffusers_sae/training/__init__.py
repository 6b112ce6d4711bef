"""Training SAEs on streams of activations."""

from .trainer import SAETrainer, TrainingConfig

__all__ = ["SAETrainer", "TrainingConfig"]
