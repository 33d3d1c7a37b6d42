"""Settings of the libraries below torch, to be made before torch is loaded. What a user has set stays."""

from __future__ import annotations

import os

__all__ = ["prepare"]

_SETTINGS = {
    # OpenMP threads that wait for each other by spinning take many times as long on a busy machine.
    "GOMP_SPINCOUNT": "20000",
    # Kernels are kept for every shape ever seen, with their scratch memory: a gigabyte where shapes vary. One chunk of
    # texts needs so many; others would be of shapes that rarely come again.
    "LRU_CACHE_CAPACITY": "24",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "24",
}


def prepare() -> None:
    """Set what is not set."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
