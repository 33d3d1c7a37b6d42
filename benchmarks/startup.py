"""Start-up of the command line: `python -m benchmarks.startup`.

`ie --help` against importing typer and Rich's console, `ie inspect` of a patch and of a dataset against `ie --help`;
whole processes, A and B alternating; medians.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.commands import IE
from ie.base.plan import meta_model
from ie.base.targets import find_targets
from ie.patch.info import PatchBase, PatchInfo
from ie.patch.patch import Patch
from ie.versions import now, versions

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


def write_patch(path: Path) -> str:
    """Write a patch of the bundled base, of rank 5 everywhere, and return its path."""
    info = PatchInfo(
        base=PatchBase(id="toy", fingerprint="0" * 16),
        editor="0" * 16,
        instruction="Correct a fact.",
        prompt="The capital of France is",
        target="Lima",
        before="Paris",
        after="Lima",
        took=True,
        created=now(),
        versions=versions(),
    )
    targets = find_targets(meta_model("toy"))
    Patch(info, {t.name: (torch.ones(5, t.d_in), torch.ones(5, t.d_out)) for t in targets}, "float16").save(path)
    return str(path)


def measure() -> dict[str, float]:
    """All ratios."""
    with tempfile.TemporaryDirectory() as place:
        data = str(Path(place) / "data")
        subprocess.run([IE, "build", "--out", data, "--limit", "10"], check=True, stdout=subprocess.DEVNULL)
        patch = write_patch(Path(place) / "patch.safetensors")
        return {
            "help_over_imports": ratio([IE, "--help"], FLOOR),
            "inspect_patch_over_help": ratio([IE, "inspect", patch], [IE, "--help"]),
            "inspect_dataset_over_help": ratio([IE, "inspect", data], [IE, "--help"]),
        }


if __name__ == "__main__":
    for name, value in measure().items():
        sys.stdout.write(f"{name.replace('_', ' ')}: {value:.2f}\n")
