"""Training SAEs on streams and on stores of activations."""

from .config import TrainingConfig
from .from_rows import train_on_rows
from .from_store import train_on_store
from .scales import SCALES, sizes_for
from .streaming import StreamedSAE, train_on_stream
from .streaming_config import StreamingConfig
from .trainer import SAETrainer

__all__ = [
    "SCALES",
    "SAETrainer",
    "StreamedSAE",
    "StreamingConfig",
    "TrainingConfig",
    "sizes_for",
    "train_on_rows",
    "train_on_store",
    "train_on_stream",
]
