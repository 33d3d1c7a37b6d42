"""Choosing the rate of a training-free method, on validation records and never on test ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ie.base.model import Base
from ie.data.record import Record
from ie.editor.methods import Method
from ie.editor.request import EditRequest
from ie.evaluation.metrics import harmonic_mean, mean
from ie.evaluation.protocol import measure

__all__ = ["VALIDATED", "best_rate", "forced_figures"]

VALIDATED = ("reliability", "generalization", "locality")


def forced_figures(
    base: Base, method: Method, records: Sequence[Record], instructions: Sequence[str | None]
) -> dict[str, float]:
    """Reliability, generalization and locality, forced, plain, a mean over records: what choices are made by."""
    requests = [EditRequest.of(record, text) for record, text in zip(records, instructions, strict=True)]
    figures = measure(
        base, records, instructions, method(base, requests), generate=False, queries=("plain",), metrics=VALIDATED
    )
    values: dict[str, list[float]] = {}
    for one in figures:
        values.setdefault(one.metric, []).extend(one.values)
    return {name: mean(found) for name, found in values.items()}


def best_rate(base: Base, make: Callable[[float], Method], rates: Sequence[float], records: Sequence[Record]) -> float:
    """The rate with the highest harmonic mean of the three figures on some validation records."""
    plain = [None] * len(records)

    def score(rate: float) -> float:
        return harmonic_mean(list(forced_figures(base, make(rate), records, plain).values()))

    return max(rates, key=score)
