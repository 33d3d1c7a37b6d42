"""Choosing the settings of a training-free method, on validation records and never on test ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

from ie.base.model import Base
from ie.data.record import Record
from ie.editor.methods import Method
from ie.editor.request import EditRequest
from ie.evaluation.metrics import harmonic_mean, mean
from ie.evaluation.protocol import measure
from ie.evaluation.respondent import Respondent

__all__ = ["SETTINGS", "VALIDATED", "best_setting", "forced_figures"]

VALIDATED = ("reliability", "generalization", "locality")
# What is chosen from, for each training-free method.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "finetune": [{"rate": rate, "steps": n} for rate, n in product((0.03, 0.1, 0.3, 1.0), (3, 10))],
    "gradient": [{"rate": rate} for rate in (1e-4, 3e-4, 1e-3, 3e-3)],
    "ultra": [
        {"rate": rate, "regularisation": share} for rate, share in product((3e-4, 1e-3, 3e-3, 1e-2), (0.01, 0.1, 1.0))
    ],
}


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


def best_setting(
    base: Base,
    make: Callable[..., Method],
    settings: Sequence[Mapping[str, Any]],
    records: Sequence[Record],
    before: Respondent | None = None,
) -> Mapping[str, Any]:
    """The setting with the highest harmonic mean of the three figures on some validation records.

    Args:
        base: the base model.
        make: makes the method of a setting, handed over as keyword arguments.
        settings: what to choose from, such as `{"rate": 0.1}`.
        records: validation records.
        before: see `measure`.
    """
    plain = [None] * len(records)
    before = before or Respondent(base)

    def score(setting: Mapping[str, Any]) -> float:
        return harmonic_mean(list(forced_figures(base, make(**setting), records, plain, before).values()))

    return max(settings, key=score)
