"""Training one editor on the episodes of many tasks.

Each step draws a batch of records, edits all of them at once, asks their queries, and moves the editor by Adam. The
best editor on validation records (which no training saw, under instructions that no training saw) is the one kept.
"""

from __future__ import annotations

import copy
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ie.base.load import load_base
from ie.base.model import Base
from ie.data.dataset import Dataset
from ie.data.record import Record
from ie.editor.editor import Editor, EditorSettings
from ie.editor.files import save_editor
from ie.editor.methods import editor_method
from ie.editor.request import EditRequest, collate_requests
from ie.errors import InputError
from ie.evaluation.instructions import heldout_instructions
from ie.evaluation.metrics import harmonic_mean, mean
from ie.evaluation.respondent import Respondent
from ie.evaluation.tuning import forced_figures
from ie.training.episodes import Relations, draw_records, make_episodes
from ie.training.loss import Loss, backward
from ie.training.settings import TrainSettings

__all__ = ["Event", "train"]

_CLIP_NORM = 1.0
_WARMUP_STEPS = 50


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


def train(settings: TrainSettings, *, on_event: OnEvent = lambda event: None) -> dict[str, Any]:
    """Train an editor and write it.

    Args:
        settings: what to train, on what, how long.
        on_event: called with progress.

    Returns:
        The JSON object of `ie train`.

    Raises:
        InputError: if the dataset has no record to train on.
        KeyboardInterrupt: after the best editor so far has been written.
    """
    dataset = Dataset.load(settings.data)
    tasks = tuple(task for task in settings.tasks or dataset.tasks if task not in settings.holdout)
    records = dataset.records("train", tasks)
    if not records:
        raise InputError(f"{settings.data} has no training record of {', '.join(tasks) or 'any task'}")
    base = load_base(settings.model, quant=settings.quant, dtype=settings.dtype, device=settings.device)
    on_event(Event("note", f"{len(records)} records of {', '.join(tasks)}; base {base.id}, {_how(base)}"))
    run = _Run(settings, base, records, dataset.records("validation", tasks), on_event)
    interrupted = False
    try:
        run.steps()
    except KeyboardInterrupt:
        if run.best is None:
            raise
        interrupted = True
    result = run.finish(tasks, dataset.fingerprint)
    if interrupted:
        raise KeyboardInterrupt(f"the best editor so far is in {settings.out}")
    return result


class _Run:
    """The state of one training run."""

    def __init__(
        self,
        settings: TrainSettings,
        base: Base,
        records: Sequence[Record],
        validation: Sequence[Record],
        on_event: OnEvent,
    ) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.base, self.on_event = settings, base, on_event
        self.rng = random.Random(settings.seed)
        self.stream = draw_records(records, settings.balance, self.rng)
        self.relations = Relations(records)
        self.validation = _spread(validation, settings.n_validation, settings.seed)
        shape = EditorSettings(
            method=settings.method, rank=settings.rank, n_layers=settings.n_layers, rate=settings.rate
        )
        self.before = Respondent(base)
        self.editor = Editor(base.targets, shape).to(base.device)
        self.optimiser = torch.optim.Adam(
            [
                {"params": list(self.editor.networks.parameters()), "lr": settings.learning_rate},
                {"params": list(self.editor.log_rates.parameters()), "lr": settings.rate_learning_rate},
            ],
            betas=(0.9, 0.99),
        )
        self.peaks = [group["lr"] for group in self.optimiser.param_groups]
        self.best: dict[str, torch.Tensor] | None = None
        self.figures: dict[str, float] = {}
        self.best_score, self.n_stale, self.n_steps_done = -1.0, 0, 0
        self.began = time.monotonic()

    def steps(self) -> None:
        """Fit the normaliser, then take steps until they, the time, or the patience are used up."""
        self._fit()
        self._validate()
        recent: list[tuple[float, float]] = []
        while self._progress() < 1 and not self._exhausted():
            loss = self._step()
            recent = [*recent[-49:], (loss.edit.item(), loss.locality.item())]
            self.n_steps_done += 1
            self._report(recent)
            if self.n_steps_done % self.settings.validate_every == 0:
                self._validate()
        if self.n_steps_done % self.settings.validate_every:
            self._validate()

    def _exhausted(self) -> bool:
        return self.settings.patience is not None and self.n_stale >= self.settings.patience

    def _progress(self) -> float:
        """Share of the run that is done, by steps or by time, whichever is further."""
        share = self.n_steps_done / self.settings.steps
        if self.settings.minutes is None:
            return share
        return max(share, (time.monotonic() - self.began) / (60 * self.settings.minutes))

    def _batch(self) -> list[Record]:
        return [next(self.stream) for _ in range(self.settings.batch_size)]

    def _fit(self) -> None:
        reads = self.settings.method == "instructedit"
        for _ in range(-(-self.settings.n_fit // self.settings.batch_size)):
            requests = [
                EditRequest.of(record, self.rng.choice(record.instruction.train) if reads else None)
                for record in self._batch()
            ]
            self.editor.observe(self.base.signals(collate_requests(self.base, requests)))
        self.editor.fit()

    def _step(self) -> Loss:
        warm = min(1.0, (self.n_steps_done + 1) / _WARMUP_STEPS)
        for group, peak in zip(self.optimiser.param_groups, self.peaks, strict=True):
            group["lr"] = peak * warm * (1 - self._progress())
        episodes = make_episodes(
            self._batch(),
            self.rng,
            relations=self.relations,
            instructed=self.settings.method == "instructedit",
            plain_share=self.settings.plain_share,
            n_negatives=self.settings.n_negatives,
        )
        self.optimiser.zero_grad(set_to_none=True)
        loss = backward(self.base, self.editor, episodes, self.settings.locality_weight)
        torch.nn.utils.clip_grad_norm_(self.editor.parameters(), _CLIP_NORM)
        self.optimiser.step()
        return loss

    def _validate(self) -> None:
        if not self.validation:
            self.best = copy.deepcopy(self.editor.state_dict())
            return
        figures = forced_figures(
            self.base, editor_method(self.editor), self.validation, heldout_instructions(self.validation), self.before
        )
        score = harmonic_mean(list(figures.values()))
        if score > self.best_score:
            self.best_score, self.n_stale = score, 0
            self.best, self.figures = copy.deepcopy(self.editor.state_dict()), figures
        else:
            self.n_stale += 1
        self._event("validation", figures)

    def _report(self, recent: Sequence[tuple[float, float]]) -> None:
        seconds = time.monotonic() - self.began
        self._event(
            "step",
            {
                "edit_loss": mean([edit for edit, _ in recent]),
                "locality_loss": mean([locality for _, locality in recent]),
                "episodes_per_second": self.n_steps_done * self.settings.batch_size / seconds,
            },
        )

    def _event(self, kind: Literal["step", "validation", "done"], metrics: dict[str, float]) -> None:
        seconds = time.monotonic() - self.began
        done = self._progress()
        left = seconds * (1 - done) / done if done > 0 else None
        self.on_event(Event(kind, "", self.n_steps_done, self.settings.steps, dict(metrics), seconds, left))

    def finish(self, tasks: tuple[str, ...], data_fingerprint: str) -> dict[str, Any]:
        """Write the best editor and say how the run went."""
        seconds = time.monotonic() - self.began
        if self.best is not None:
            self.editor.load_state_dict(self.best)
        n_episodes = self.n_steps_done * self.settings.batch_size
        save_editor(
            self.settings.out,
            self.editor,
            self.base,
            tasks=tasks,
            holdout=self.settings.holdout,
            training={
                **self.settings.model_dump(mode="json", exclude={"out", "force"}),
                "data_fingerprint": data_fingerprint,
                "steps_done": self.n_steps_done,
                "seconds": round(seconds, 1),
            },
            validation=self.figures,
        )
        self._event("done", self.figures)
        kept = self.base.prefixes.store
        return {
            "editor": str(self.settings.out),
            "base": self.base.id,
            "tasks": list(tasks),
            "holdout": list(self.settings.holdout),
            "steps": self.n_steps_done,
            "episodes": n_episodes,
            "seconds": seconds,
            "episodes_per_second": n_episodes / seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            "prefix_kept": {"texts": len(kept), "memory_bytes": kept.n_bytes, "file_bytes": kept.n_file_bytes},
            "validation": self.figures,
        }


def _how(base: Base) -> str:
    return f"{str(base.model.dtype).removeprefix('torch.')}, quant {base.quant}, on {base.device} ({base.reason})"


def peak_memory_bytes() -> int:
    """The most memory that this process has held: of the GPU if there is one, else of the machine."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the parent held when it started this process
        peak = next(line for line in status.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _spread(records: Sequence[Record], n: int, seed: int) -> list[Record]:
    """At most n records, drawn evenly from the tasks."""
    stream = _rounds(records, random.Random(seed))
    return [record for record, _ in zip(stream, range(n), strict=False)]


def _rounds(records: Sequence[Record], rng: random.Random) -> Iterator[Record]:
    by_task: dict[str, list[Record]] = {}
    for record in records:
        by_task.setdefault(record.task, []).append(record)
    for group in by_task.values():
        rng.shuffle(group)
    for place in range(max(map(len, by_task.values()), default=0)):
        yield from (group[place] for group in by_task.values() if place < len(group))
