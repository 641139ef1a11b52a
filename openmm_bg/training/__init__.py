"""Training: data, losses, the resampled buffer, checkpoints and the loop that ties them."""

from openmm_bg.training.config import BufferConfig, LossWeights, Stage, TrainingConfig
from openmm_bg.training.dataset import Dataset
from openmm_bg.training.trainer import Trainer, TrainingDiverged, TrainingInterrupted

__all__ = [
    "BufferConfig",
    "Dataset",
    "LossWeights",
    "Stage",
    "Trainer",
    "TrainingConfig",
    "TrainingDiverged",
    "TrainingInterrupted",
]
