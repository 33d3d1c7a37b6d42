"""What `ie eval` does: editors and training-free methods side by side on the same test records."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from ie.base.load import load_base
from ie.base.model import Base
from ie.data.dataset import Dataset
from ie.data.record import Record
from ie.editor.files import load_editor, load_info
from ie.editor.methods import Method, editor_method, finetune_method, fitted_editor, gradient_method, ultra_method
from ie.editor.request import EditRequest
from ie.errors import InputError
from ie.evaluation.comparison import Interval, differences, harmonic_means
from ie.evaluation.instructions import heldout_instructions
from ie.evaluation.metrics import Z95, mean, wilson
from ie.evaluation.protocol import Figures, measure
from ie.evaluation.respondent import Respondent
from ie.evaluation.tuning import SETTINGS, best_setting
from ie.versions import now, versions

__all__ = ["evaluate"]

OnNote = Callable[[str], None]

_BATCH_SIZE = 32  # edits whose updates are held at once
_N_TUNING = 64  # validation records that a training-free method's setting is chosen on
_N_FIT = 256  # training records that normalisers are fitted on
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


Measured = tuple[Contestant, list[Figures]]


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
        holdout: a task that no editor may have been trained on, or `none`; None takes the editors' own, if none of them
            was trained on it.
        methods: of `none`, `finetune`, `gradient`, `ultra`, beside the editors; `none` is always there.
        controls: measure the editors also under no instruction, other tasks' and a random one.
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
        InputError: if an editor was trained on the hold-out, there is nothing to measure, or to choose settings on, or
            `controls` need templates that are not known.
        BaseMismatchError: if an editor was made for another base.
    """
    infos = [load_info(folder) for folder in editors]
    trained = {task for info in infos for task in info.tasks}
    held = holdout or next((task for info in infos for task in info.holdout if task not in trained), None)
    held = None if held == "none" else held
    for folder, info in zip(editors, infos, strict=True):
        if held in info.tasks:
            raise InputError(
                f"--holdout {held}: the editor {folder} was trained on it, so it is no hold-out",
                hint=f"train one without it: `ie train --holdout {held} --out DIR`",
            )
    held_out = {task for info in infos for task in info.holdout if task not in trained} | ({held} if held else set())
    dataset = Dataset.load(data)
    if controls:
        dataset.templates()  # not after minutes, if they aren't known
    base = load_base(model or (infos[0].base.id if infos else "toy"), quant=quant, dtype=dtype, device=device)
    contestants = [Contestant("none", None, {}), *_editors(base, editors)]
    before = Respondent(base)
    contestants += _training_free(before, dataset, methods, tasks, held_out, on_note)
    rows: list[dict[str, Any]] = []
    gaps: list[dict[str, Any]] = []
    for task in tasks or dataset.tasks:
        records = _limited(dataset.records("test", [task]), limit, seed)
        if not records:
            on_note(f"{task}: no test record")
            continue
        on_note(f"{task}: {len(records)} records")
        found, compared = _of_task(before, contestants, task, records, dataset, controls=controls, generate=generate)
        rows += found
        gaps += compared
    if not rows:
        raise InputError(f"{data} has no test record of {', '.join(tasks or dataset.tasks)}")
    return {
        "holdout": held,
        "base": base.id,
        "editor": [str(folder) for folder in editors],
        "rows": rows,
        "differences": gaps,
        "data_fingerprint": dataset.fingerprint,
        "quant": base.quant,
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "seed": seed,
        "versions": versions(),
        "created": now(),
    }


def _of_task(
    before: Respondent,
    contestants: Sequence[Contestant],
    task: str,
    records: Sequence[Record],
    dataset: Dataset,
    *,
    controls: bool,
    generate: bool,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of one task, and those of the differences between its contestants."""
    told = heldout_instructions(records)
    measured = [(one, _measure(before, one.edit, records, told, generate=generate)) for one in contestants]
    rows = [row for one, figures in measured for row in _rows(task, one, figures)]
    gaps = [row for left, right in combinations(measured[1:], 2) for row in _gaps(task, left, right)]
    if controls:
        for right, *others in _controls(before, measured, task, records, dataset, generate=generate):
            rows += [row for one, figures in (right, *others) for row in _rows(task, one, figures)]
            gaps += [row for other in others for row in _gaps(task, right, other)]
    return rows, gaps


def _editors(base: Base, folders: Sequence[Path]) -> Iterator[Contestant]:
    for folder in folders:
        editor, info = load_editor(folder, base)
        yield Contestant(info.method, editor_method(editor), {"editor": str(folder)})


def _training_free(
    before: Respondent,
    dataset: Dataset,
    methods: Sequence[str],
    tasks: Sequence[str] | None,
    held: Collection[str],
    on_note: OnNote,
) -> Iterator[Contestant]:
    """The methods that were asked for, each with the setting that does best on validation records.

    Of what is held out nothing is fitted or chosen on, as nothing of an editor is; else on the tasks that are reported.
    """
    known = [task for task in dataset.tasks if task not in held]
    chosen_on = [task for task in known if task in (tasks or known)] or known
    tuning = _limited(dataset.records("validation", chosen_on), _N_TUNING, seed=0)
    seen = [EditRequest.of(record, None) for record in _limited(dataset.records("train", known), _N_FIT, seed=0)]
    wanted = [name for name in methods if name in SETTINGS]
    if wanted and not (tuning and seen):
        raise InputError(
            f"{', '.join(wanted)}: settings are chosen on training and validation records, and there are none",
            hint="leave --methods out, or build a dataset with training records too",
        )
    makers: dict[str, Callable[..., Method]] = {"finetune": finetune_method}
    if set(wanted) - set(makers):
        fitted = fitted_editor(before.base, seen)
        makers |= {"gradient": partial(gradient_method, fitted), "ultra": partial(ultra_method, fitted)}
    for name in wanted:
        setting = best_setting(before.base, makers[name], SETTINGS[name], tuning, before)
        shown = {key: f"{value:g}" for key, value in setting.items()}
        said = ", ".join(f"{key} {value}" for key, value in shown.items())
        on_note(f"{name}: {said}, chosen on {len(tuning)} validation records")
        yield Contestant(name, makers[name](**setting), shown)


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
    merged: dict[tuple[str, str, str], dict[int, float]] = {}
    for start in range(0, len(records), _BATCH_SIZE):
        part, told = records[start : start + _BATCH_SIZE], instructions[start : start + _BATCH_SIZE]
        requests = [EditRequest.of(record, text) for record, text in zip(part, told, strict=True)]
        update = None if edit is None else edit(before.base, requests)
        for found in measure(before.base, part, told, update, generate=generate, before=before):
            values = {start + record: value for record, value in found.values.items()}
            merged.setdefault((found.metric, found.query, found.decoding), {}).update(values)
    return [Figures(*key, values) for key, values in merged.items()]


def _rows(task: str, one: Contestant, figures: Sequence[Figures]) -> list[dict[str, Any]]:
    """A row for each figure of a contestant, and one for each harmonic mean."""
    found = [_interval(one) for one in figures] + harmonic_means(figures)
    return [{"task": task, "method": one.method, **interval._asdict(), **one.extra} for interval in found]


def _interval(figures: Figures) -> Interval:
    values = list(figures.values.values())
    n, value = len(values), mean(values)
    if figures.metric == "fluency":
        spread = torch.tensor(values).std().item() if n > 1 else math.nan
        half = Z95 * spread / n**0.5
        low, high = value - half, value + half
    else:
        low, high = wilson(value, n)
    return Interval(figures.metric, figures.query, figures.decoding, value, low, high, n)


def _gaps(task: str, left: Measured, right: Measured) -> list[dict[str, Any]]:
    """A row for each figure of one contestant less that of another."""
    (one, figures), (other, others) = left, right
    versus = {f"versus_{key}": value for key, value in other.extra.items()}
    names = {"task": task, "method": one.method, **one.extra, "versus": other.method, **versus}
    return [{**names, **interval._asdict()} for interval in differences(figures, others)]


def _controls(
    before: Respondent,
    measured: Sequence[Measured],
    task: str,
    records: Sequence[Record],
    dataset: Dataset,
    *,
    generate: bool,
) -> Iterator[list[Measured]]:
    """The editors that read instructions, each told what is right first and then other things.

    What they do under unseen wordings in turn has been measured already; it is not done again.
    """
    told = _other_instructions(task, records, dataset)
    for one, unseen in measured:
        if one.method.startswith("instructedit"):
            found = {
                names: _measure(before, one.edit, records, texts, generate=generate) for names, texts in told.items()
            }
            found["unseen", ""] = unseen
            yield [
                (
                    Contestant(
                        one.method, one.edit, {**one.extra, "control": name, **({"style": style} if style else {})}
                    ),
                    figures,
                )
                for (name, style), figures in found.items()
            ]


def _other_instructions(
    task: str, records: Sequence[Record], dataset: Dataset
) -> dict[tuple[str, str], list[str | None]]:
    """What editors are told in the controls, by control and style; the first is what is right."""
    out: dict[tuple[str, str], list[str | None]] = {}
    template = dataset.templates()[task]
    seen = [template.render(record, "train") for record in records]
    out["right", ""] = [texts[i % len(texts)] for i, texts in enumerate(seen)]
    unseen = [template.render(record, "heldout") for record in records]
    out |= {("unseen", style): [texts[k] for texts in unseen] for k, style in enumerate(template.styles)}
    out["none", ""] = [None] * len(records)
    out["random", ""] = [_RANDOM_SENTENCE] * len(records)
    others = [heldout_instructions(dataset.records("test", [name])) for name in dataset.tasks if name != task]
    others = [texts for texts in others if texts]
    if others:  # in turns
        turns = (divmod(i, len(others)) for i in range(len(records)))
        out["wrong-task", ""] = [others[k][turn % len(others[k])] for turn, k in turns]
    return out
