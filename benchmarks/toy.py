"""How well a default editor edits the bundled base: `python -m benchmarks.toy [--seeds 0,1] [--json]`.

Build, train and report with the commands' own defaults, on test records and held-out instructions; plain queries,
greedy generated answers. Ends with 1 where a figure is below what the project promises.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.commands import ie

PROMISED = {
    **{
        task: {"reliability": 0.95, "generalization": 0.85, "locality": 0.90}
        for task in ("general", "people", "places")
    },
    "zsre": {"reliability": 0.90, "generalization": 0.80, "locality": 0.92},
}


def measure(seed: int) -> dict[str, Any]:
    """Figures of one seed: seconds of training, and value and n by task and metric."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        ie(folder, "build")
        trained = ie(folder, "train", "--seed", str(seed))
        rows = ie(folder, "eval", "--holdout", "zsre")["rows"]
    figures: dict[str, dict[str, Any]] = {}
    for row in rows:
        if (row["method"], row["query"], row["decoding"]) == ("instructedit", "plain", "generated"):
            figures.setdefault(row["task"], {})[row["metric"]] = {"value": row["value"], "n": row["n"]}
    return {"seed": seed, "train_seconds": trained["seconds"], "figures": figures}


def main() -> int:
    """Measure every seed and print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = [measure(int(seed)) for seed in args.seeds.split(",")]
    kept = True
    lines = ["| seed | task | reliability | generalization | locality | training, s |", "|---|---|---|---|---|---|"]
    for result in results:
        for task, promised in PROMISED.items():
            found = result["figures"][task]
            cells = [f"{found[metric]['value']:.3f}" for metric in promised]
            kept &= all(found[metric]["value"] >= least for metric, least in promised.items())
            lines.append(f"| {result['seed']} | {task} | {' | '.join(cells)} | {result['train_seconds']:.0f} |")
    sys.stdout.write((json.dumps(results) if args.json else "\n".join(lines)) + "\n")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
