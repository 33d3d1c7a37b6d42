"""Training: episodes, the outer loss, the run."""

from ie.training.settings import TrainSettings
from ie.training.trainer import Event, train

__all__ = ["Event", "TrainSettings", "train"]
