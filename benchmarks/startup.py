"""Start-up of the command line: `python -m benchmarks.startup`.

`ie --help` and `ie inspect` against importing typer and Rich's console, whole processes, A and B alternating; medians.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FLOOR = [sys.executable, "-c", "import typer, rich.console"]
N_RUNS = 15


def seconds(command: list[str]) -> float:
    """Wall time of one run of a command."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def ratio(command: list[str], floor: list[str]) -> float:
    """Median time of a command over that of another, run in turn."""
    pairs = [(seconds(command), seconds(floor)) for _ in range(N_RUNS + 1)][1:]
    return statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs)


def measure() -> dict[str, float]:
    """Both ratios."""
    with tempfile.TemporaryDirectory() as place:
        data = str(Path(place) / "data")
        subprocess.run(["ie", "build", "--out", data, "--limit", "10"], check=True, stdout=subprocess.DEVNULL)
        return {
            "help_over_imports": ratio(["ie", "--help"], FLOOR),
            "inspect_over_help": ratio(["ie", "inspect", data], ["ie", "--help"]),
        }


if __name__ == "__main__":
    for name, value in measure().items():
        sys.stdout.write(f"{name.replace('_', ' ')}: {value:.2f}\n")
