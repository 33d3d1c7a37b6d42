"""What a training tells whoever watches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Event", "OnEvent"]


@dataclass(frozen=True)
class Event:
    """Something that a user watching the training may want to see.

    Attributes:
        kind: `note`, `step`, `validation` or `done`.
        text: for people.
        step: optimiser steps done.
        n_steps: optimiser steps planned.
        metrics: losses, speed or validation figures by name.
        seconds: since training began.
        seconds_left: as far as can be told.
    """

    kind: Literal["note", "step", "validation", "done"]
    text: str = ""
    step: int = 0
    n_steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    seconds_left: float | None = None


OnEvent = Callable[[Event], None]
