"""Many edits at once: `python -m benchmarks.many --editor DIR --data DIR [--model M] [--methods joint,stack,ultra]`.

Where DIR is no editor yet, one is trained for joint edits of published facts (zsre is held out), on M.
At each size random test records of all tasks are edited together: in one joint patch of a trained editor, in the sum of
its single patches, and in a joint update without training (`ultra`). Asked plainly, each record under all edits:
reliability, generalization and locality, forced and generated. Each size of each method is a process of its own, so
that its peak memory is its own; seconds an edit are those of making the update, the base being loaded. λ is what the
editor learned; ultra's λ and rate are those with the highest harmonic mean at `--tuned-at` edits of validation records.
Last, the seconds an edit of a whole patch, joint and single, are compared in one process.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.commands import ie
from benchmarks.timing import seconds
from ie.base.load import load_base
from ie.base.model import Base
from ie.base.update import Update
from ie.data.dataset import Dataset
from ie.data.record import Record
from ie.editor.editing import RequestSettings, make_joint_patch, make_patches
from ie.editor.editor import Editor
from ie.editor.files import load_editor, load_info
from ie.editor.methods import editor_method, fitted_editor, joint_update
from ie.editor.request import EditRequest
from ie.evaluation.instructions import heldout_instructions
from ie.evaluation.metrics import mean
from ie.evaluation.protocol import is_opinion, measure
from ie.evaluation.tuning import SETTINGS, VALIDATED, best_setting
from ie.patch.lowrank import compress, select, stack
from ie.training.memory import peak_memory_bytes
from ie.versions import versions

__all__ = ["make", "measure_size"]

SETTINGS_OF_TRAINING = {
    "method": "instructedit-joint", "tasks": ["counterfact", "recent", "wikifactdiff"], "balance": False,
    "batch_size": 64, "passes": 6, "rate": 6e-3, "rate_learning_rate": 3e-2, "learning_rate": 2e-3, "steps": 200,
    "related_negatives": True, "n_negatives": 1, "locality_weight": 1.5, "n_validation": 0,
}  # fmt: skip
_BATCH = 32
_N_FIT, _N_SINGLE = 256, 21


def train(folder: Path, data: Path, model: str) -> None:
    """An editor for joint edits of published facts."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = folder.with_suffix(".yaml")
    config.write_text(json.dumps(SETTINGS_OF_TRAINING), encoding="utf-8")  # JSON is YAML
    told = ("--model", model, "--data", str(data.resolve()), "--out", str(folder.resolve()))
    ie(Path(), "train", "--config", str(config), *told)


def draw(dataset: Dataset, split: str, n: int, seed: int = 0) -> list[Record]:
    """Random records of facts, no two with the same prompt: what contradicts itself cannot all take."""
    records = {one.prompt: one for one in dataset.records(split) if not is_opinion(one)}  # type: ignore[arg-type]
    return random.Random(seed).sample(list(records.values()), min(n, len(records)))


def requests_of(records: Sequence[Record]) -> list[EditRequest]:
    """Each with an instruction that no training saw."""
    return [EditRequest.of(one, text) for one, text in zip(records, heldout_instructions(records), strict=True)]


def make(
    method: str, base: Base, editor: Editor, requests: Sequence[EditRequest], regularisation: float | None = None
) -> Update:
    """One update for all edits; λ is the editor's own if none is given."""
    if method != "stack":
        return joint_update(base, editor, requests, regularisation)
    single = editor_method(editor)
    patches: list[Update] = []
    for start in range(0, len(requests), _BATCH):
        part = requests[start : start + _BATCH]
        batch = single(base, part)
        patches += [compress(select(batch, index)) for index in range(len(part))]
    return stack(patches)


def editor_of(base: Base, folder: Path, dataset: Dataset, rate: float | None = None) -> Editor:
    """The trained editor; with a rate ultra's."""
    if rate is None:
        return load_editor(folder, base)[0]
    seen = random.Random(0).sample(list(dataset.records("train")), _N_FIT)
    return fitted_editor(base, [EditRequest.of(record, None) for record in seen], rate)


def tune(base: Base, folder: Path, dataset: Dataset, n: int) -> dict[str, float]:
    """Ultra's λ and rate, on validation records."""
    records = draw(dataset, "validation", n)
    requests = requests_of(records)

    def maker(rate: float, regularisation: float) -> Any:
        editor = editor_of(base, folder, dataset, rate)
        return lambda base, _: make("ultra", base, editor, requests, regularisation)

    return dict(best_setting(base, maker, SETTINGS["ultra"], records))


def patch_seconds(base: Base, folder: Path, dataset: Dataset, n: int) -> dict[str, float]:
    """Seconds an edit of a patch for n and of patches for one: update, compression, what it does, as of `ie edit`."""
    editor, info = load_editor(folder, base)
    single = editor_method(editor)

    def settings(requests: Sequence[EditRequest]) -> list[RequestSettings]:
        return [RequestSettings(prompt=one.prompt, target=one.target, instruction=one.instruction) for one in requests]

    def alone(request: EditRequest) -> None:
        make_patches(base, single(base, [request]), settings([request]), info)

    def together(requests: list[EditRequest]) -> None:
        names = [str(index) for index in range(len(requests))]
        make_joint_patch(base, joint_update(base, editor, requests, None), settings(requests), info, names=names)

    # Texts not seen before, on both sides; what a first call alone costs is left out.
    first, *others = requests_of(draw(dataset, "validation", 1 + _N_SINGLE))
    alone(first)
    one = statistics.median(seconds(lambda request=request: alone(request)) for request in others)  # type: ignore[misc]
    many = requests_of(draw(dataset, "test", n))
    each = seconds(lambda: together(many)) / len(many)
    return {"n": len(many), "joint_s": each, "single_s": one, "share": each / one}


def measure_size(
    method: str, base: Base, folder: Path, data: Path, n: int, setting: dict[str, float], *, generate: bool
) -> dict[str, Any]:
    """Figures of one method at one size."""
    dataset = Dataset.load(data)
    records = draw(dataset, "test", n)
    requests = requests_of(records)
    editor = editor_of(base, folder, dataset, setting.get("rate"))
    given = setting.get("regularisation")
    make(method, base, editor, requests_of(draw(dataset, "validation", 1)), given)  # what a first call alone costs
    began = time.perf_counter()
    update = make(method, base, editor, requests, given)
    each = (time.perf_counter() - began) / len(requests)
    found: dict[str, Any] = {
        "method": method, "n": len(records), **setting, "seconds_per_edit": each,
        "rank": max(a.shape[1] for a, _ in update.values()), "peak_bytes_of_making": peak_memory_bytes(),
    }  # fmt: skip
    # Asked in its exact smallest form: the sum of thousands of patches has more rows than its modules have features.
    update = compress(update, energy=1.0)
    told = [one.instruction for one in requests]
    for one in measure(base, records, told, update, queries=("plain",), metrics=VALIDATED, generate=generate):
        if one.metric in VALIDATED:  # what the base knew is told apart elsewhere
            found[f"{one.metric}_{one.decoding}"] = mean(list(one.values.values()))
    return {**found, "peak_bytes": peak_memory_bytes()}


def _in_processes(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for method in args.methods.split(","):
        setting: dict[str, float] = {}
        own = [sys.executable, "-m", "benchmarks.many", "--editor", args.editor, "--data", args.data, "--one", method]
        own += ["--model", args.model] if args.model else []
        own += [] if args.generate else ["--no-generate"]
        if method == "ultra":
            tuning = subprocess.run([*own, "--sizes", str(args.tuned_at), "--tune"], check=True, stdout=subprocess.PIPE)
            setting = json.loads(tuning.stdout)
        for size in args.sizes.split(","):
            given = [*own, "--sizes", size, "--setting", json.dumps(setting)]
            done = subprocess.run(given, check=True, stdout=subprocess.PIPE)
            yield json.loads(done.stdout)
            sys.stderr.write(f"{done.stdout.decode()}\n")


def _table(rows: Sequence[dict[str, Any]]) -> str:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(key.replace('_', ' ') for key in keys)} |", f"|{'---|' * len(keys)}"]
    for row in rows:
        cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in map(row.get, keys)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--editor", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model")
    parser.add_argument("--methods", default="joint,stack,ultra")
    parser.add_argument("--sizes", default="1,10,100,1000")
    parser.add_argument("--tuned-at", type=int, default=100)
    parser.add_argument("--generate", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", action="store_true")
    for hidden in ("--one", "--setting"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--tune", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is None:
        if not (Path(args.editor) / "editor.json").exists():
            train(Path(args.editor), Path(args.data), args.model or "toy")
        rows = list(_in_processes(args))
        folder, sizes = Path(args.editor), [int(size) for size in args.sizes.split(",")]
        base = load_base(args.model or load_info(folder).base.id)
        speed = patch_seconds(base, folder, Dataset.load(Path(args.data)), max(sizes))
        result = {"measured": rows, "patches": speed, "versions": versions()}
        sys.stdout.write((json.dumps(result, indent=1) if args.json else f"{_table(rows)}\n\n{speed}") + "\n")
        return
    torch.manual_seed(0)
    folder, data, size = Path(args.editor), Path(args.data), int(args.sizes)
    base = load_base(args.model or load_info(folder).base.id)
    if args.tune:
        found = tune(base, folder, Dataset.load(data), size)
    else:
        found = measure_size(args.one, base, folder, data, size, json.loads(args.setting), generate=args.generate)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
