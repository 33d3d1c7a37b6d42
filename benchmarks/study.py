"""What each choice is worth: `python -m benchmarks.study BASE DATA [--only NAME,...]`.

Each row changes one setting of those that `benchmarks.quality` trains with, for equally many steps and two seeds; zsre
is held out. Test records under instructions in held-out wordings, plain questions, forced. What was trained and
measured is kept in --out and not done again; as many rows at a time as there are cores.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.commands import ie
from benchmarks.quality import CONFIG, N_AT_ONCE, THREADS, arguments, build
from benchmarks.verdict import JUDGED
from ie.training.config import find_config, read_config

ROWS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "no instruction": {"method": "mend"},
    "1 task": {"tasks": ["counterfact"]},
    "2 tasks": {"tasks": ["counterfact", "recent"]},
    "3 tasks": {"tasks": ["counterfact", "recent", "wikifactdiff"]},
    "tasks drawn evenly": {"balance": True},
    "1 pass": {"passes": 1},
    "4 passes": {"passes": 4},
    "rank 32": {"rank": 32},
    "rank 128": {"rank": 128},
    "no instruction dropout": {"instruction_dropout": 0.0},
    "no layer": {"n_layers": 0},
    "1 layer": {"n_layers": 1},
    "4 layers": {"n_layers": 4},
    "keys not whitened": {"n_whitened": 0},
    "opening share 1": {"opening_share": 1.0},
    "rates from half": {"rate": 7.5e-4},
    "rates from twice": {"rate": 3e-3},
    "plain questions alone": {"plain_share": 1.0},
    "half of the questions instructed": {"plain_share": 0.5},
    "no sums": {"stacked_share": 0.0},
    "no negative": {"n_negatives": 0},
    "unrelated negative": {"related_negatives": False},
    "2 negatives": {"n_negatives": 2},
    "locality weight half": {"locality_weight": 0.5},
    "locality weight twice": {"locality_weight": 2.0},
    "learning rate half": {"learning_rate": 1e-3},
    "learning rate twice": {"learning_rate": 4e-3},
    "in bf16": {"dtype": "bfloat16"},
}
_SHOWN = {
    "counterfact": ("reliability", "generalization", "locality", "locality-known", "harmonic-mean"),
    "recent": ("reliability", "locality", "harmonic-mean"),
    "zsre": ("reliability", "generalization", "locality", "harmonic-mean"),
}


def measure(folder: Path, base: Path, name: str, seed: int, steps: int, limit: int) -> dict[str, Any]:
    """Train and judge one row of one seed: steps per second, and figures by task and metric."""
    key = f"{name.replace(' ', '-')}-{seed}-{steps}-{limit}"
    found = folder / f"{key}.json"
    if not found.exists():
        settings = read_config(find_config(CONFIG)) | ROWS[name]
        (folder / f"{key}.yaml").write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
        common = ("--model", str(base.resolve()), "--data", "data", "--seed", str(seed), "--force")
        config = ("--config", f"{key}.yaml", "--steps", str(steps), "--out", key)
        trained = ie(folder, "train", *common, *config, threads=THREADS)
        judged = ("--holdout", "zsre", "--tasks", ",".join(JUDGED), "--limit", str(limit), "--no-generate")
        rows = ie(folder, "eval", *common, "--editor", key, *judged, threads=THREADS)["rows"]
        figures = {
            f"{row['task']} {row['metric']}": row["value"]
            for row in rows
            if row["method"] != "none" and (row["query"], row["decoding"]) == ("plain", "forced")
        }
        speed = trained["steps"] / trained["seconds"]
        result = {"row": name, "seed": seed, "speed": speed, "figures": figures}
        found.write_text(json.dumps(result), encoding="utf-8")
    kept: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    return kept


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each row and seed."""
    heads = [f"{task}: {' / '.join(metrics)}" for task, metrics in _SHOWN.items()]
    yield f"| | seed | steps per second | {' | '.join(heads)} |"
    yield "|---" * (len(heads) + 3) + "|"
    for one in results:
        cells = [_cell(one["figures"], task) for task in _SHOWN]
        yield f"| {one['row']} | {one['seed']} | {one['speed']:.2f} | {' | '.join(cells)} |"


def _cell(figures: Mapping[str, float], task: str) -> str:
    return " / ".join(f"{100 * figures[f'{task} {metric}']:.1f}" for metric in _SHOWN[task])


def main() -> int:
    """Measure the rows asked for and print a table, or one JSON array."""
    parser = arguments(__doc__, "study")
    parser.add_argument("--only", default=",".join(ROWS))
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    build(args.out, args.data)
    with ThreadPoolExecutor(N_AT_ONCE) as pool:
        running = [
            pool.submit(measure, args.out, args.base, name, int(seed), args.steps, args.limit)
            for name in args.only.split(",")
            for seed in args.seeds.split(",")
        ]
        results = [one.result() for one in running]
    sys.stdout.write((json.dumps(results) if args.json else "\n".join(table(results))) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
