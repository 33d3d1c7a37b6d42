"""Running `ie` as a user does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["IE", "ie"]

IE = str(Path(sys.executable).with_name("ie"))  # of the environment that runs the benchmark, active or not
_DID_NOT_TAKE = 3  # exit code


def ie(folder: Path, *args: str, threads: int | None = None) -> dict[str, Any]:
    """Run a command in `folder`, with all of the machine's threads or some, and return its JSON object.

    An edit that did not take is a result like any other.
    """
    env = os.environ if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([IE, *args, "--json", "--quiet"], cwd=folder, env=env, stdout=subprocess.PIPE)
    if done.returncode != _DID_NOT_TAKE:
        done.check_returncode()
    result: dict[str, Any] = json.loads(done.stdout)
    return result
