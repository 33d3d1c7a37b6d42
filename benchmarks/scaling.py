"""Two processes with a thread each against one process with one thread: `python -m benchmarks.scaling [--model M]`.

The same global batch; seconds a step from the runs' own figures, without start, fit and validation. The two sides take
turns; the fastest run of each counts, since whatever else the machine does only slows a run down.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.commands import ie
from ie.training.metrics import METRICS

_FIRST = 5  # steps that are not counted: kernels and prefixes are new


def seconds_a_step(place: Path, n_processes: int, args: argparse.Namespace) -> float:
    """Train for some steps; seconds of one of them."""
    out = place / f"by-{n_processes}"
    config = place / "scaling.yaml"
    config.write_text(f"validate_every: 100000\nn_validation: 1\nn_fit: 32\nbatch-size: {args.batch_size}\n")
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", n_processes] if n_processes > 1 else []
    command = [sys.executable, *launcher, "-m", "ie.cli", "train", "--model", args.model, "--data", place / "data"]
    command += ["--out", out, "--config", config, "--steps", args.steps, "--device", "cpu", "--quiet", "--force"]
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([*map(str, command)], check=True, env=threads, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    times = [line["seconds"] for line in lines if line["kind"] == "step"]
    return (times[-1] - times[_FIRST]) / (len(times) - 1 - _FIRST)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turn."""
    times: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        ie(place, "build", "--out", "data")
        for _ in range(args.runs):
            for n_processes in times:
                times[n_processes].append(seconds_a_step(place, n_processes, args))
    one, two = (min(found) for found in times.values())
    return {"seconds_a_step": {str(n): found for n, found in times.items()}, "speed_up": one / two}


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="toy")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--runs", type=int, default=2)
    sys.stdout.write(json.dumps(measure(parser.parse_args()), indent=1) + "\n")


if __name__ == "__main__":
    main()
