"""How far an edit of a kind that training never saw should go: `python -m benchmarks.unknown BASE DATA`.

Its rates are those of training's kinds in the mean, times `ie.editor.editor._CARE`. Here three kinds are left out in
turn, zsre always, and the editor of the others edits validation records of the kind that it never saw, with several
such factors. Instructions in held-out wordings, plain questions, forced, percent. What was trained is kept in --out and
not trained again; as many at a time as there are cores, one thread each.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import ie.editor.editor
from benchmarks.quality import N_AT_ONCE, TASKS, THREADS, arguments, build, train
from ie.base import load_base
from ie.data.dataset import Dataset
from ie.editor.files import load_editor
from ie.editor.methods import editor_method
from ie.editor.request import EditRequest
from ie.evaluation.comparison import HARMONIC, harmonic_means
from ie.evaluation.instructions import heldout_instructions
from ie.evaluation.metrics import mean
from ie.evaluation.protocol import measure
from ie.evaluation.respondent import Respondent

KINDS = ("counterfact", "recent", "wikifactdiff")
CARES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
METRICS = ("reliability", "generalization", "locality")


def judge(folder: Path, base_folder: Path, kind: str, seed: int, minutes: float, limit: int) -> list[dict[str, Any]]:
    """Train the editor that never saw a kind, and measure its edits of that kind with each factor."""
    name = f"no-{kind}"
    train(folder, base_folder, name, seed, minutes, "--tasks", ",".join(task for task in TASKS if task != kind))
    if THREADS is not None:
        torch.set_num_threads(THREADS)
    base = load_base(str(base_folder), dtype="float32")
    editor, _ = load_editor(folder / f"{name}-{seed}", base)
    records = Dataset.load(folder / "data").records("validation", [kind])
    records = random.Random(seed).sample(records, min(limit, len(records)))
    told = heldout_instructions(records)
    requests = [EditRequest.of(*one) for one in zip(records, told, strict=True)]
    edit = editor_method(editor)
    plain = {"generate": False, "queries": ("plain",), "metrics": METRICS, "before": Respondent(base)}
    rows = []
    for care in CARES:
        ie.editor.editor._CARE = care
        figures = measure(base, records, told, edit(base, requests), **plain)
        values = {one.metric: mean(list(one.values.values())) for one in figures}
        values |= {one.metric: one.value for one in harmonic_means(figures)}
        rows.append({"kind": kind, "seed": seed, "care": care, **values})
    return rows


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each kind and seed with a column for each factor; then the harmonic means' mean."""
    yield f"| kind left out | seed | {' | '.join(map(str, CARES))} |"
    yield "|---" * (len(CARES) + 2) + "|"
    for kind, seed in dict.fromkeys((row["kind"], row["seed"]) for row in rows):
        cells = [_cell(row) for row in rows if (row["kind"], row["seed"]) == (kind, seed)]
        yield f"| {kind} | {seed} | {' | '.join(cells)} |"
    means = [mean([row[HARMONIC] for row in rows if row["care"] == care]) for care in CARES]
    yield f"| mean | | {' | '.join(f'{100 * value:.2f}' for value in means)} |"


def _cell(row: dict[str, Any]) -> str:
    figures = " / ".join(f"{100 * row[metric]:.1f}" for metric in METRICS if metric in row)
    return f"{figures}, {100 * row[HARMONIC]:.1f}"


def main() -> None:
    """Measure every kind and seed and print a table, or one JSON array."""
    parser = arguments(__doc__, "unknown")
    parser.add_argument("--minutes", type=float, default=18.0, help="of training")
    args = parser.parse_args()
    build(args.out, args.data)
    with ProcessPoolExecutor(N_AT_ONCE, mp_context=get_context("spawn")) as pool:
        running = [
            pool.submit(judge, args.out, args.base, kind, int(seed), args.minutes, args.limit)
            for kind in KINDS
            for seed in args.seeds.split(",")
        ]
        rows = [row for one in running for row in one.result()]
    sys.stdout.write((json.dumps(rows) if args.json else "\n".join(table(rows))) + "\n")


if __name__ == "__main__":
    main()
