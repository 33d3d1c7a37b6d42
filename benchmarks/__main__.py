"""Every speed and memory figure: `python -m benchmarks [--only a,b] [--tokenizer DIR] [--data DIR] [--json]`.

Without --data the bundled facts, without --tokenizer the bundled base's. `benchmarks/README.md` says what each is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.bases import gpt2_small, save
from benchmarks.commands import ie
from benchmarks.speed import MEASUREMENTS
from benchmarks.startup import measure as startup
from ie.source import TOY_FOLDER
from ie.versions import versions


def measure(only: set[str], tokenizer: Path, data: Path | None, place: Path) -> dict[str, Any]:
    """The measurements asked for, by letter."""
    if data is None:
        data = place / "data"
        ie(place, "build", "--out", str(data))
    folder = save(gpt2_small(), tokenizer, place / "gpt2")
    found: dict[str, Any] = {}
    for letter, work in MEASUREMENTS.items():
        if letter in only:
            found[letter] = work(place, tokenizer, data) if letter in ("e", "f") else work(folder, data)  # type: ignore[operator]
            sys.stderr.write(f"{letter}: {json.dumps(found[letter])}\n")
    if "h" in only:
        found["h"] = startup()
    return {"measured": found, "versions": versions(), "cores": os.cpu_count()}


def main() -> None:
    """Measure and print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join([*MEASUREMENTS, "h"]))
    parser.add_argument("--tokenizer", type=Path, default=TOY_FOLDER)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    unknown = set(args.only.split(",")) - {*MEASUREMENTS, "h"}
    if unknown:
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}, only {', '.join([*MEASUREMENTS, 'h'])}")
    with tempfile.TemporaryDirectory() as place:
        result = measure(set(args.only.split(",")), args.tokenizer, args.data, Path(place))
    if args.json:
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
        return
    lines = ["| | figure | value |", "|---|---|---|"]
    for letter, figures in result["measured"].items():
        for name, value in figures.items():
            shown = f"{value:.3g}" if isinstance(value, float) else value
            lines.append(f"| {letter} | {name.replace('_', ' ')} | {shown} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
