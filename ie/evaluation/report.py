"""What `ie eval` does: editors and training-free methods side by side on the same test records."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ie.base.load import load_base
from ie.base.model import Base
from ie.data.dataset import Dataset
from ie.data.record import Record
from ie.data.templates import load_templates
from ie.editor.files import load_editor, load_info
from ie.editor.methods import Method, editor_method, finetune_method, gradient_method
from ie.editor.request import EditRequest
from ie.errors import InputError
from ie.evaluation.instructions import heldout_instructions
from ie.evaluation.metrics import mean, wilson
from ie.evaluation.protocol import Figures, measure
from ie.evaluation.respondent import Respondent
from ie.evaluation.tuning import best_rate
from ie.versions import now, versions

__all__ = ["evaluate"]

OnNote = Callable[[str], None]

_BATCH_SIZE = 32  # edits whose updates are held at once
_N_TUNING = 64  # validation records that a rate is chosen on
_N_FIT = 256  # training records that the gradient method's normaliser is fitted on
_GRADIENT_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
_FINETUNE_RATES = (0.03, 0.1, 0.3, 1.0)
_RANDOM_SENTENCE = "The ferry leaves at noon unless the tide is late."


@dataclass(frozen=True)
class Contestant:
    """One method in the report.

    Attributes:
        method: its name in the rows.
        edit: what makes its updates; None for the base itself.
        extra: further keys of its rows.
    """

    method: str
    edit: Method | None
    extra: dict[str, str]


def evaluate(
    *,
    editors: Sequence[Path],
    data: Path,
    model: str | None = None,
    tasks: Sequence[str] | None = None,
    holdout: str | None = None,
    methods: Sequence[str] = (),
    controls: bool = False,
    generate: bool = True,
    limit: int | None = None,
    seed: int = 0,
    quant: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    on_note: OnNote = lambda text: None,
) -> dict[str, Any]:
    """Measure editors and methods on test records.

    Args:
        editors: editor folders; all for one base.
        data: dataset folder.
        model: the base model; None takes the first editor's.
        tasks: tasks to report; None for all of the dataset.
        holdout: a task that no editor may have been trained on; None takes the first editor's.
        methods: of `none`, `finetune`, `gradient`, beside the editors; `none` is always there.
        controls: measure the editors also under no, another task's and a random instruction.
        generate: greedy decoding too.
        limit: at most so many records of each task.
        seed: of the records drawn by `limit`.
        quant: see `load_base`.
        dtype: see `load_base`.
        device: see `load_base`.
        on_note: called with progress.

    Returns:
        The JSON object of `ie eval`.

    Raises:
        InputError: if an editor was trained on the hold-out, or there is nothing to measure.
        BaseMismatchError: if an editor was made for another base.
    """
    infos = [load_info(folder) for folder in editors]
    held = holdout or next((task for info in infos for task in info.holdout), None)
    for folder, info in zip(editors, infos, strict=True):
        if held in info.tasks:
            raise InputError(
                f"--holdout {held}: the editor {folder} was trained on it, so it is no hold-out",
                hint=f"train one without it: `ie train --holdout {held} --out DIR`",
            )
    dataset = Dataset.load(data)
    base = load_base(model or (infos[0].base.id if infos else "toy"), quant=quant, dtype=dtype, device=device)
    contestants = [Contestant("none", None, {}), *_editors(base, editors)]
    before = Respondent(base)
    contestants += _training_free(before, dataset, methods, tasks, on_note)
    rows: list[dict[str, Any]] = []
    for task in tasks or dataset.tasks:
        records = _limited(dataset.records("test", [task]), limit, seed)
        if not records:
            on_note(f"{task}: no test record")
            continue
        on_note(f"{task}: {len(records)} records")
        instructions = heldout_instructions(records)
        measured = [(one, _measure(before, one.edit, records, instructions, generate=generate)) for one in contestants]
        rows += [_row(task, one, found) for one, figures in measured for found in figures]
        if controls:
            rows += _controls(before, measured, task, records, dataset, generate=generate)
    if not rows:
        raise InputError(f"{data} has no test record of {', '.join(tasks or dataset.tasks)}")
    return {
        "holdout": held,
        "base": base.id,
        "editor": [str(folder) for folder in editors],
        "rows": rows,
        "data_fingerprint": dataset.fingerprint,
        "quant": base.quant,
        "seed": seed,
        "versions": versions(),
        "created": now(),
    }


def _editors(base: Base, folders: Sequence[Path]) -> Iterator[Contestant]:
    for folder in folders:
        editor, info = load_editor(folder, base)
        yield Contestant(info.method, editor_method(editor), {"editor": str(folder)})


def _training_free(
    before: Respondent, dataset: Dataset, methods: Sequence[str], tasks: Sequence[str] | None, on_note: OnNote
) -> Iterator[Contestant]:
    """The methods that were asked for, each with the rate that does best on validation records."""
    tuning = _limited(dataset.records("validation", tasks), _N_TUNING, seed=0)
    seen = [EditRequest.of(record, None) for record in _limited(dataset.records("train"), _N_FIT, seed=0)]
    makers: dict[str, tuple[Callable[[float], Method], Sequence[float]]] = {
        "finetune": (finetune_method, _FINETUNE_RATES),
        "gradient": (partial(gradient_method, before.base, seen), _GRADIENT_RATES),
    }
    for name in methods:
        if name in makers:
            make, rates = makers[name]
            rate = best_rate(before.base, make, rates, tuning, before)
            on_note(f"{name}: rate {rate:g}, chosen on {len(tuning)} validation records")
            yield Contestant(name, make(rate), {"rate": f"{rate:g}"})


def _limited(records: Sequence[Record], limit: int | None, seed: int) -> list[Record]:
    if limit is None or len(records) <= limit:
        return list(records)
    return random.Random(seed).sample(list(records), limit)


def _measure(
    before: Respondent,
    edit: Method | None,
    records: Sequence[Record],
    instructions: Sequence[str | None],
    *,
    generate: bool,
) -> list[Figures]:
    """Measure batch by batch, so that no more than a batch of updates is held."""
    merged: dict[tuple[str, str, str], list[float]] = {}
    for start in range(0, len(records), _BATCH_SIZE):
        part, told = records[start : start + _BATCH_SIZE], instructions[start : start + _BATCH_SIZE]
        requests = [EditRequest.of(record, text) for record, text in zip(part, told, strict=True)]
        update = None if edit is None else edit(before.base, requests)
        for found in measure(before.base, part, told, update, generate=generate, before=before):
            merged.setdefault((found.metric, found.query, found.decoding), []).extend(found.values)
    return [Figures(*key, tuple(values)) for key, values in merged.items()]


def _row(task: str, one: Contestant, found: Figures) -> dict[str, Any]:
    n = len(found.values)
    value = mean(found.values)
    if found.metric == "fluency":
        spread = torch.tensor(found.values).std(correction=0).item() if n > 1 else 0.0
        half = 1.96 * spread / n**0.5
        low, high = value - half, value + half
    else:
        low, high = wilson(value, n)
    return {
        "task": task,
        "method": one.method,
        "query": found.query,
        "decoding": found.decoding,
        "metric": found.metric,
        "value": value,
        "low": low,
        "high": high,
        "n": n,
        **one.extra,
    }


def _controls(
    before: Respondent,
    measured: Sequence[tuple[Contestant, list[Figures]]],
    task: str,
    records: Sequence[Record],
    dataset: Dataset,
    *,
    generate: bool,
) -> list[dict[str, Any]]:
    """The editors that read instructions, told other things than what is right.

    They have been measured under unseen wordings already; that is not done again.
    """
    variants: dict[str, list[str | None]] = {
        "none": [None] * len(records),
        "random": [_RANDOM_SENTENCE] * len(records),
    }
    template = load_templates().get(task)
    if template is not None:
        texts = [template.render(record, "train") for record in records]
        variants["right"] = [own[i % len(own)] for i, own in enumerate(texts)]
    other = next((name for name in dataset.tasks if name != task), None)
    if other is not None:
        told = heldout_instructions(dataset.records("test", [other]))
        variants["wrong-task"] = [told[i % len(told)] for i in range(len(records))] if told else [None] * len(records)
    rows = []
    for one, unseen in measured:
        if one.method != "instructedit":
            continue
        found_under = {"unseen": unseen}
        for name, instructions in variants.items():
            found_under[name] = _measure(before, one.edit, records, instructions, generate=generate)
        for name, figures in found_under.items():
            control = Contestant(one.method, one.edit, {**one.extra, "control": name})
            rows += [_row(task, control, found) for found in figures]
    return rows
