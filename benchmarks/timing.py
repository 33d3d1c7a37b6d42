"""Timing two things against each other in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

__all__ = ["alternating", "seconds"]


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call, up to where a GPU is done with it."""
    _settle()
    began = time.perf_counter()
    work()
    _settle()
    return time.perf_counter() - began


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternating(*sides: Sequence[Callable[[], object]]) -> list[float]:
    """Median time of each side's calls; the sides take turns, a call of one after a call of the other."""
    times = [[seconds(work) for work in turn] for turn in zip(*sides, strict=True)]
    return [statistics.median(column) for column in zip(*times, strict=True)]
