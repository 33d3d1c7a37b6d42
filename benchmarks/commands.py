"""Running `ie` as a user does."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["ie"]


def ie(folder: Path, *args: str) -> dict[str, Any]:
    """Run a command in `folder` and return its JSON object."""
    done = subprocess.run(["ie", *args, "--json", "--quiet"], cwd=folder, check=True, stdout=subprocess.PIPE)
    result: dict[str, Any] = json.loads(done.stdout)
    return result
