"""A training killed by SIGKILL at random moments and resumed each time: `python -m benchmarks.survival [--kills 20]`.

The editor must be, bit for bit, that of a run that nobody disturbed, and after every kill all checkpoints that are
there must be readable. Ends with 1 where that is not so.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event as Flag
from pathlib import Path
from typing import Any

from benchmarks.commands import ie
from ie.training.checkpoint import newest_checkpoint
from ie.training.place import checkpoints, training_folder
from ie.training.settings import TrainSettings

# Processes are forked from a server that has loaded the libraries: a start takes a second and not six.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["ie.training.trainer"])


def work(settings: TrainSettings, begun: Flag) -> None:
    """One process: train, and say when the first step is done."""
    from ie.training.trainer import train

    train(settings, on_event=lambda event: begun.set() if event.kind == "step" else None)


def start(out: Path, data: Path, steps: int) -> tuple[BaseProcess, Flag]:
    """Start a training of the bundled base, or go on with the one that was begun; a checkpoint after every step."""
    settings = TrainSettings(
        data=data, out=out, steps=steps, batch_size=4, rank=16, n_fit=16, n_validation=8, validate_every=7, passes=1,
        patience=None, checkpoint_every=1, resume=training_folder(out).exists(),
    )  # fmt: skip
    begun = SERVER.Event()
    process = SERVER.Process(target=work, args=(settings, begun))
    process.start()
    return process, begun


def finish(out: Path, data: Path, steps: int) -> bytes:
    """Train to the end, undisturbed from here on; the editor's weights."""
    process, _ = start(out, data, steps)
    process.join()
    if process.exitcode:
        raise RuntimeError(f"training ended with {process.exitcode}")
    return (out / "editor.safetensors").read_bytes()


def kill(out: Path, data: Path, steps: int, seconds: float) -> list[str]:
    """Kill a training so long after its first step; what was wrong with the checkpoints then."""
    process, begun = start(out, data, steps)
    begun.wait(timeout=60)
    time.sleep(seconds)
    process.kill()
    process.join()
    wrong: list[str] = []
    newest_checkpoint(training_folder(out), wrong.append)
    return wrong


def survive(place: Path, data: Path, *, n_kills: int, steps: int, span: float, seed: int) -> dict[str, Any]:
    """Both runs, and whether their editors are the same.

    Args:
        place: folder to work in.
        data: dataset folder.
        n_kills: how often to kill.
        steps: of training.
        span: kills fall at random into so many seconds after a process's first step.
        seed: of the moments.
    """
    rng = random.Random(seed)
    undisturbed = finish(place / "undisturbed", data, steps)
    out, reached, wrong = place / "killed", [], []
    for _ in range(n_kills):
        wrong += kill(out, data, steps, rng.uniform(0, span))
        reached.append(next((int(one.name.split("-")[1]) for one in checkpoints(training_folder(out))), 0))
    same = finish(out, data, steps) == undisturbed
    return {"kills": n_kills, "checkpoint_after_each_kill": reached, "unreadable": wrong, "bitwise_equal": same}


def main() -> int:
    """Kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--span", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        ie(place, "build", "--out", "data")
        found = survive(place, place / "data", n_kills=args.kills, steps=args.steps, span=args.span, seed=args.seed)
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    return 0 if found["bitwise_equal"] and not found["unreadable"] else 1


if __name__ == "__main__":
    sys.exit(main())
