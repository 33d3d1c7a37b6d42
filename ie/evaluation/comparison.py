"""What follows from figures: harmonic means, and paired differences between two ways of editing the same records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ie.evaluation.metrics import bootstrap
from ie.evaluation.protocol import Figures

__all__ = ["HARMONIC", "Interval", "differences", "harmonic_means"]

HARMONIC = "harmonic-mean"
_BALANCED = ("reliability", "generalization", "locality")

_Key = tuple[str, str, str]  # metric, query, decoding


class Interval(NamedTuple):
    """A figure of one metric with its 95 % interval, over n records."""

    metric: str
    query: str
    decoding: str
    value: float
    low: float
    high: float
    n: int


def harmonic_means(figures: Sequence[Figures]) -> list[Interval]:
    """Harmonic mean of reliability, generalization and locality for each query and decoding.

    Generalization is left out where a task has no rephrase; the plain locality stands for every query, since unrelated
    questions carry no instruction. Intervals are bootstrapped over records.
    """
    return [
        Interval(HARMONIC, *way, *bootstrap(values, _harmonic), len(values))
        for way, values in _balanced({_key(one): one for one in figures}).items()
    ]


def differences(left: Sequence[Figures], right: Sequence[Figures]) -> list[Interval]:
    """Left less right, metric by metric and for the harmonic mean, over the records that both have a value for.

    Args:
        left: figures of some records.
        right: figures of the same records, edited in another way.
    """
    of_left, of_right = ({_key(one): one for one in figures} for figures in (left, right))
    out = []
    for key in of_left.keys() & of_right.keys():
        a, b = of_left[key].values, of_right[key].values
        gaps = torch.tensor([[a[record] - b[record]] for record in a.keys() & b.keys()])
        if len(gaps):
            out.append(Interval(*key, *bootstrap(gaps, lambda means: means[:, 0]), len(gaps)))
    both_right = _balanced(of_right)
    for way, values in _balanced(of_left).items():
        other = both_right.get(way)
        if other is not None and other.shape == values.shape:
            found = bootstrap(torch.cat((values, other), 1), _harmonic_gap)
            out.append(Interval(HARMONIC, *way, *found, len(values)))
    return sorted(out)


def _balanced(figures: dict[_Key, Figures]) -> dict[tuple[str, str], Tensor]:
    """For each query and decoding the three metrics' values (n_records, 2 or 3), nan where a record has none."""
    out = {}
    for metric, query, decoding in figures:
        if metric != "reliability":
            continue
        keys = [(name, "plain" if name == "locality" else query, decoding) for name in _BALANCED]
        columns = [figures[key].values for key in keys if key in figures]
        if ("locality", "plain", decoding) in figures:
            records = sorted(set().union(*columns))
            rows = [[column.get(record, math.nan) for column in columns] for record in records]
            out[query, decoding] = torch.tensor(rows)
    return out


def _harmonic(means: Tensor) -> Tensor:
    return means.shape[1] / means.clamp(min=1e-9).reciprocal().sum(1)


def _harmonic_gap(means: Tensor) -> Tensor:
    left, right = means.chunk(2, 1)
    return _harmonic(left) - _harmonic(right)


def _key(one: Figures) -> _Key:
    return one.metric, one.query, one.decoding
