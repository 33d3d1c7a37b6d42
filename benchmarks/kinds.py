"""Whether an editor knows the kinds of edits by instructions that it never saw: `python -m benchmarks.kinds BASE DATA`.

Each kind of the published data, and held-out zsre, is left out in turn, and an editor's `Kinds` are fitted on training
wordings of the others, as training does; nothing is trained. Then they are asked held-out wordings: of the kind left
out, which is of none that they know, and of the others, these also in their words alone, without the layout that names
the task. Percent, means of the seeds' draws.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality import TASKS, arguments, build
from ie.base import Base, load_base
from ie.base.instructions import Readings
from ie.data.dataset import Dataset
from ie.editor.kinds import Kinds
from ie.evaluation.instructions import heldout_instructions
from ie.evaluation.metrics import mean
from ie.training.episodes import draw_instruction
from ie.training.settings import TrainSettings

HELD_OUT = "zsre"
_COLUMNS = ("of none", "others of their own", "told apart", "others by their words alone")
_WORDS = "Description: "  # what they stand behind in a template's layout


def fitted(base: Base, dataset: Dataset, tasks: Sequence[str], rng: random.Random) -> Kinds:
    """Kinds of these tasks, fitted as training fits them."""
    kinds: Kinds | None = None
    for kind, task in enumerate(tasks):
        drawn = rng.choices(dataset.records("train", [task]), k=TrainSettings().n_fit)
        read = base.read([draw_instruction(record, rng) for record in drawn])
        kinds = kinds or Kinds(read.inputs.shape[1], len(tasks))
        kinds.observe(read, kind)
    assert kinds is not None
    kinds.fit()
    return kinds


def asked(base: Base, dataset: Dataset, task: str, limit: int) -> tuple[Readings, Readings]:
    """Held-out wordings of validation records (of zsre test records, for it has no others), and their words alone."""
    records = dataset.records("test" if task == HELD_OUT else "validation", [task])
    told = heldout_instructions(random.Random(0).sample(records, min(limit, len(records))))
    return base.read(told), base.read([text.split(_WORDS, 1)[1] for text in told if text is not None])


def judge(kinds: Kinds, unknown: Readings, known: Sequence[Readings], by_words: Sequence[Readings]) -> dict[str, float]:
    """Shares of none and of their own, and how often an unknown wording has more of none than a known one."""
    of_none = kinds(unknown)[:, -1]
    known_of_none = torch.cat([kinds(read)[:, -1] for read in known])
    values = (float(of_none.mean()), _own(kinds, known), _above(of_none, known_of_none), _own(kinds, by_words))
    return dict(zip(_COLUMNS, values, strict=True))


def _own(kinds: Kinds, reads: Sequence[Readings]) -> float:
    """The mean share that each kind's readings have of their own."""
    return float(torch.cat([kinds(read)[:, kind] for kind, read in enumerate(reads)]).mean())


def _above(some: Tensor, others: Tensor) -> float:
    """The area under the curve: how often one of some is larger than one of the others, half where they are equal."""
    larger, equal = some[:, None] > others, some[:, None] == others
    return float((larger.float() + equal.float() / 2).mean())


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each kind that was left out, the mean of training's kinds below."""
    yield f"| kind left out | {' | '.join(_COLUMNS)} |"
    yield "|---" * (len(_COLUMNS) + 1) + "|"
    groups = {kind: [row for row in rows if row["kind"] == kind] for kind in (*TASKS, HELD_OUT)}
    groups["mean without zsre"] = [row for row in rows if row["kind"] != HELD_OUT]
    for kind, found in groups.items():
        cells = [f"{100 * mean([row[column] for row in found]):.1f}" for column in _COLUMNS]
        yield f"| {kind} | {' | '.join(cells)} |"


def main() -> None:
    """Judge every kind and seed and print a table, or one JSON array."""
    args = arguments(__doc__, "quality").parse_args()
    build(args.out, args.data)
    base, dataset = load_base(str(args.base), dtype="float32"), Dataset.load(Path(args.out) / "data")
    reads = {task: asked(base, dataset, task, args.limit) for task in (*TASKS, HELD_OUT)}
    rows = []
    for seed in map(int, args.seeds.split(",")):
        for left_out in reads:
            tasks = [task for task in TASKS if task != left_out]
            kinds = fitted(base, dataset, tasks, random.Random(seed))
            known, by_words = zip(*(reads[task] for task in tasks), strict=True)
            figures = judge(kinds, reads[left_out][0], known, by_words)
            rows.append({"kind": left_out, "seed": seed, **figures})
    sys.stdout.write((json.dumps(rows) if args.json else "\n".join(table(rows))) + "\n")


if __name__ == "__main__":
    main()
