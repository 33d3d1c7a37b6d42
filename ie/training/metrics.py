"""The figures of a run: one JSON object a line, always; and, if asked for, a tracker's through accelerate.

A line has `kind` (step or validation), `step`, `seconds` and the figures. A resumed run cuts off what the killed one
wrote after its last checkpoint: no step stands twice.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ie.errors import InputError
from ie.files import new_file
from ie.training.settings import TrainSettings

__all__ = ["METRICS", "Metrics", "check_tracker"]

METRICS = "metrics.jsonl"


class Metrics:
    """Where a run's figures go.

    Args:
        folder: the run's folder.
        settings: of the run; `report_to` names the tracker.
        step: the run goes on after this one.
        on_note: called when the file cannot be written, once.
    """

    def __init__(self, folder: Path, settings: TrainSettings, step: int, on_note: Callable[[str], None]) -> None:
        self.path = folder / METRICS
        self._on_note = on_note
        self._failed = False
        if step and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            with new_file(self.path) as fresh:
                fresh.write_text("".join(line for line in lines if _is_before(line, step)), encoding="utf-8")
        else:
            self.path.write_text("", encoding="utf-8")
        self._tracker = _start_tracker(folder, settings)

    def write(self, kind: str, step: int, seconds: float, figures: Mapping[str, float]) -> None:
        """Add one line."""
        line = {"kind": kind, "step": step, "seconds": round(seconds, 3), **figures}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            # Figures are no reason to lose a training; but nothing is lost without a word.
            if not self._failed:
                self._on_note(f"{self.path} cannot be written: {error.strerror}; figures are missing from here on")
            self._failed = True
        if self._tracker is not None:
            names = {name if kind == "step" else f"validation/{name}": value for name, value in figures.items()}
            with redirect_stdout(sys.stderr):
                self._tracker.log(names, step=step)

    def close(self) -> None:
        """Let the tracker finish."""
        if self._tracker is not None:
            with redirect_stdout(sys.stderr):
                self._tracker.end_training()


def check_tracker(name: str | None) -> None:
    """Refuse a tracker that is not installed.

    Raises:
        InputError: naming it.
    """
    if name is not None and find_spec(name) is None:
        raise InputError(
            f"--report-to {name}: the package {name} is not installed",
            hint=f"pip install {name}",
        )


def _start_tracker(folder: Path, settings: TrainSettings) -> Any:
    if settings.report_to is None:
        return None
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=settings.device == "cpu", log_with=settings.report_to, project_dir=folder.parent)
    values = {
        name: value if isinstance(value, int | float | str | bool) else str(value)
        for name, value in settings.model_dump(mode="json").items()
    }
    with redirect_stdout(sys.stderr):  # some speak there, and our standard output is the result's alone
        accelerator.init_trackers(f"{settings.out.name}.{settings.report_to}", config=values)
    return accelerator


def _is_before(line: str, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError):
        return False  # half a line, from a process that was killed
