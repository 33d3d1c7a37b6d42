"""How well editors edit a base model on published data, side by side: `python -m benchmarks.quality BASE DATA`.

DATA is a folder of the published files below. For each seed one InstructEdit editor, one of MEND, a specialist for each
judged task and one for two tasks that contradict each other are trained, with zsre held out: the editors of all five
tasks for the time that five specialists have together. Then all of them and the training-free methods are measured on
the same test records under instructions in held-out wordings, plain queries, with the controls beside
(`controls-SEED.md`, `conflicting-SEED.md`). What was trained is kept in --out and not trained again. Ends with 1 where
a figure is below what it is meant to reach.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.commands import ie
from benchmarks.verdict import CONFLICTING, JUDGED, SPECIALISTS, shortfalls, tables

# Of zsre those of its test records that the base has read: its answers to what it cannot answer change with any edit.
SOURCES = (
    "counterfact=counterfact/counterfact-train.json",
    "counterfact=counterfact/counterfact-val.json",
    "recent=knowedit/recent_train.json",
    "recent=knowedit/train_cf.json",
    "convsent=convsent/blender_val.json",
    "wikifactdiff=wikifactdiff/wfd-train.json",
    "personality=personality/train.json",
    "zsre:test=zsre/ZsRE-test-first100.json",
)
# The same facts twice: in one task the instruction says that other wordings follow, in the other that they must not.
SCOPES = tuple(f"{task}=counterfact/counterfact-{part}.json" for task in CONFLICTING for part in ("train", "val"))

CONFIG = "published-facts"
COMPARED: dict[str, tuple[str, ...]] = {
    "instructedit": (),
    "mend": ("--method", "mend"),
    **{f"only-{task}": ("--tasks", task) for task in SPECIALISTS},
}
EDITORS = {**COMPARED, "scopes": ("--data", "scopes")}
OF_ALL_TASKS = ("instructedit", "mend")
TASKS = ("counterfact", "recent", "convsent", "wikifactdiff", "personality")  # that they are trained on
# One thread each wastes least of a small base; a GPU is for one at a time.
THREADS, N_AT_ONCE = (None, 1) if torch.cuda.is_available() else (1, os.cpu_count())


def arguments(description: str | None, out: str) -> argparse.ArgumentParser:
    """What every benchmark on published data is told."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path, help="folder of the published files")
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--limit", type=int, default=150, help="records of a task to be judged on")
    parser.add_argument("--json", action="store_true")
    return parser


def build(folder: Path, published: Path) -> None:
    """The dataset of all published files, and one of two tasks that contradict each other on the same records."""
    folder.mkdir(parents=True, exist_ok=True)
    for data, sources in (("data", SOURCES), ("scopes", SCOPES)):
        if not (folder / data).exists():
            paths = [one.replace("=", f"={published.resolve()}/", 1) for one in sources]
            ie(folder, "build", "--out", data, *(part for one in paths for part in ("--source", one)))


def train(folder: Path, base: Path, name: str, seed: int, minutes: float, *more: str) -> None:
    """An editor of a method or a specialist, unless it is there already; one that was stopped goes on."""
    out = f"{name}-{seed}"
    begun = (folder / f"{out}.training").exists()
    if begun or not (folder / out / "editor.json").exists():
        common = ("--model", str(base.resolve()), "--data", "data", "--out", out, "--seed", str(seed))
        config = ("--config", CONFIG, "--minutes", str(minutes), "--steps", "1000000")
        ie(folder, "train", *common, *config, "--resume" if begun else "--force", *more, threads=THREADS)


def train_all(folder: Path, base: Path, seeds: Sequence[int], minutes: float) -> None:
    """Every editor of every seed, as many at once as there are cores."""
    of_one_task = minutes / len(TASKS)
    with ThreadPoolExecutor(N_AT_ONCE) as pool:
        running = [
            pool.submit(train, folder, base, name, seed, minutes if name in OF_ALL_TASKS else of_one_task, *more)
            for seed in seeds
            for name, more in EDITORS.items()
        ]
        for one in running:
            one.result()


def report(folder: Path, seed: int, limit: int) -> dict[str, Any]:
    """All editors of a seed and the training-free methods on the same records, and both controls' reports."""
    common = ("--limit", str(limit), "--seed", str(seed), "--force")

    def evaluate(name: str, *args: str) -> dict[str, Any]:
        files = ("--out", f"{name}-{seed}.json", "--markdown", f"{name}-{seed}.md")
        return ie(folder, "eval", *args, *common, *files, threads=THREADS)

    judged = ("--data", "data", "--holdout", "zsre", "--tasks", ",".join(JUDGED))
    scopes = ("--data", "scopes", "--editor", f"scopes-{seed}", "--tasks", ",".join(CONFLICTING))
    controls = evaluate("controls", *judged, "--editor", f"instructedit-{seed}", "--controls", "--no-generate")
    conflicting = evaluate("conflicting", *scopes, "--controls", "--no-generate")
    flags = [part for name in COMPARED for part in ("--editor", f"{name}-{seed}")]
    compared = evaluate("report", *judged, *flags, "--methods", "none,finetune,gradient")
    return {"compared": compared, "controls": controls, "conflicting": conflicting}


def main() -> int:
    """Measure every seed, print the tables and what falls short."""
    parser = arguments(__doc__, "quality")
    parser.add_argument("--minutes", type=float, default=28.0, help="of training; a fifth for few tasks")
    args = parser.parse_args()
    build(args.out, args.data)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    train_all(args.out, args.base, seeds, args.minutes)
    with ThreadPoolExecutor(N_AT_ONCE) as pool:
        results = dict(zip(seeds, pool.map(lambda seed: report(args.out, seed, args.limit), seeds), strict=True))
    missed = list(shortfalls(results))
    sys.stdout.write((json.dumps(results) if args.json else "\n".join([*tables(results), "", *missed])) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
