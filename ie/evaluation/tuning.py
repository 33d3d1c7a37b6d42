"""Choosing the rate of a training-free method, on validation records and never on test ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ie.base.model import Base
from ie.data.record import Record
from ie.editor.methods import Method
from ie.editor.request import EditRequest
from ie.evaluation.metrics import harmonic_mean, mean
from ie.evaluation.protocol import measure
from ie.evaluation.respondent import Respondent

__all__ = ["VALIDATED", "best_rate", "forced_figures"]

VALIDATED = ("reliability", "generalization", "locality")


def forced_figures(
    base: Base,
    method: Method,
    records: Sequence[Record],
    instructions: Sequence[str | None],
    before: Respondent | None = None,
) -> dict[str, float]:
    """Reliability, generalization and locality, forced, plain, a mean over records: what choices are made by.

    Args:
        base: the base model.
        method: what makes the edits.
        records: n records.
        instructions: n instructions, for the edits.
        before: see `measure`; whoever asks again and again hands in the same one.
    """
    requests = [EditRequest.of(record, text) for record, text in zip(records, instructions, strict=True)]
    update = method(base, requests)
    figures = measure(
        base, records, instructions, update, generate=False, queries=("plain",), metrics=VALIDATED, before=before
    )
    values: dict[str, list[float]] = {}
    for one in figures:
        values.setdefault(one.metric, []).extend(one.values.values())
    return {name: mean(values[name]) for name in VALIDATED if name in values}


def best_rate(
    base: Base,
    make: Callable[[float], Method],
    rates: Sequence[float],
    records: Sequence[Record],
    before: Respondent | None = None,
) -> float:
    """The rate with the highest harmonic mean of the three figures on some validation records.

    Args:
        base: the base model.
        make: makes the method of a rate.
        rates: the rates to choose from.
        records: validation records.
        before: see `measure`.
    """
    plain = [None] * len(records)
    before = before or Respondent(base)

    def score(rate: float) -> float:
        return harmonic_mean(list(forced_figures(base, make(rate), records, plain, before).values()))

    return max(rates, key=score)
