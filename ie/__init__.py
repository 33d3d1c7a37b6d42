"""ie: instruction-guided knowledge editing for language models.

An edit is a low-rank update ΔW = BᵀA beside a frozen base model. The names below are imported when they are first
used, so `import ie` itself loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ie.base import load_base
    from ie.data.dataset import Dataset
    from ie.data.record import Record
    from ie.editor import Editor
    from ie.patch import Patch, applied

__version__ = "0.1.0"

__all__ = ["Dataset", "Editor", "Patch", "Record", "__version__", "applied", "load_base"]

_HOME = {
    "Dataset": "ie.data.dataset",
    "Editor": "ie.editor",
    "Patch": "ie.patch",
    "Record": "ie.data.record",
    "applied": "ie.patch",
    "load_base": "ie.base",
}


def __getattr__(name: str) -> object:
    """Import a public name from its module on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'ie' has no attribute {name!r}")
    value: object = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """All public names, those not imported yet included."""
    return sorted({*globals(), *__all__})
