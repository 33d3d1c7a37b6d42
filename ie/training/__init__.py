"""Training: episodes, the outer loss, the run, its checkpoints.

The names below are imported when they are first used: reading a configuration loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ie.training.events import Event
    from ie.training.settings import TrainSettings
    from ie.training.trainer import train

__all__ = ["Event", "TrainSettings", "train"]

_HOME = {"Event": "events", "TrainSettings": "settings", "train": "trainer"}


def __getattr__(name: str) -> object:
    """Import a name from its module on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'ie.training' has no attribute {name!r}")
    return getattr(import_module(f"ie.training.{_HOME[name]}"), name)
