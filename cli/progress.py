"""Training progress on stderr: one live line on a terminal, a line now and then in a pipe."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from .render import Render, visible

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from ie.training import Event

__all__ = ["TrainingProgress", "clock", "event_line"]

QUIET_SECONDS = 20.0  # between two lines of steps when there is no terminal


class TrainingProgress:
    """Shows the events of `ie.training.train`; use it as a context manager and as the `on_event` callback."""

    def __init__(self, render: Render) -> None:
        self._render = render
        self._last = time.monotonic()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if self._render.quiet:
            return
        if event.kind == "step":
            self._step(event)
        else:
            if event.kind == "done":
                self._close()
            self.note(event_line(event))

    def note(self, text: str) -> None:
        """Write a line that stays; above the live line if there is one."""
        if self._bar is not None and not self._render.quiet:
            self._bar.console.print(visible(text), soft_wrap=True)
        else:
            self._render.note(text)

    def _step(self, event: Event) -> None:
        line = event_line(event)
        if not self._render.live:
            if time.monotonic() - self._last >= QUIET_SECONDS:
                self._last = time.monotonic()
                self._render.note(line)
            return
        if self._bar is None:
            self._open()
        assert self._bar is not None and self._task is not None
        self._bar.update(self._task, completed=event.step, total=event.n_steps, description=line)

    def _open(self) -> None:
        from rich.progress import Progress, SpinnerColumn, TextColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False))
        self._bar = Progress(*columns, console=self._render.console(stderr=True), transient=True, expand=False)
        self._bar.start()
        self._task = self._bar.add_task("", total=None)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def event_line(event: Event) -> str:
    """Write an event as one line: step, figures, time left, text."""
    parts = [event.text] if event.text else []
    if event.kind == "done" and not parts:
        parts = [f"{event.step} steps in {clock(event.seconds)}"]
    if event.kind in ("step", "validation"):
        head = f"step {event.step}/{event.n_steps}" if event.n_steps else f"step {event.step}"
        parts = [head if event.kind == "step" else f"{head} validation", *parts]
        parts += [_figure(name, value) for name, value in event.metrics.items()]
    if event.kind == "step" and event.seconds_left is not None:
        parts.append(f"{clock(event.seconds_left)} left")
    return "  ".join(parts)


def _figure(name: str, value: float) -> str:
    """Write a figure shortly: the whole line has to fit 80 columns."""
    if name.endswith("_per_second"):
        return f"{value:.1f} {name.removesuffix('_per_second')}/s"
    return f"{name.removesuffix('_loss').replace('_', ' ')} {value:.3f}"


def clock(seconds: float) -> str:
    """Write a duration: 0:07, 12:30, 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
