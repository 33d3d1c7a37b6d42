"""Base models: loading, edit targets, prefix and suffix runs, signals."""

from ie.base.load import load_base
from ie.base.model import Base

__all__ = ["Base", "load_base"]
