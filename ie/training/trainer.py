"""Training one editor on the episodes of many tasks.

Each step draws a batch of records, edits all of them at once, asks their queries, and moves the editor by Adam. The
best editor on validation records (which no training saw, under instructions that no training saw) is the one kept.

Several processes train one editor together (`ie.training.distributed`); the first of them validates and writes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ie.base.load import load_base
from ie.base.model import Base
from ie.base.plan import plan_load
from ie.data.dataset import Dataset
from ie.editor.editor import JOINT
from ie.errors import IEError, InputError
from ie.training.checkpoint import Checkpoint, discard_leftovers, newest_checkpoint
from ie.training.distributed import Processes, joined
from ie.training.events import Event, OnEvent
from ie.training.memory import enough_memory
from ie.training.metrics import check_tracker
from ie.training.place import check_not_begun, checkpoints, training_folder
from ie.training.run import Run
from ie.training.settings import TrainSettings

__all__ = ["train"]

# Settings that a resumed run may have otherwise than the run that it goes on with.
_MAY_CHANGE = {
    *("model", "data", "out", "device", "steps", "minutes", "patience", "force", "resume"),
    *("checkpoint_every", "checkpoint_minutes", "report_to", "device_map"),
}


def train(settings: TrainSettings, *, on_event: OnEvent = lambda event: None) -> dict[str, Any]:
    """Train an editor and write it.

    Args:
        settings: what to train, on what, how long.
        on_event: called with progress, in the first process.

    Returns:
        The JSON object of `ie train`.

    Raises:
        InputError: if the dataset has no record to train on, `resume` finds a run that it cannot go on with, or another
            process trains an editor for the same folder.
        BaseMismatchError: if `resume` finds a run for another base model.
        IEError: if a gradient is not finite, after the best editor so far (without validation the last) was written.
        KeyboardInterrupt: after a checkpoint and that editor have been written.
    """
    check_tracker(settings.report_to)
    with joined(settings.device) as processes:
        return _train(settings, processes, on_event if processes.is_first else lambda event: None)


def _train(settings: TrainSettings, processes: Processes, on_event: OnEvent) -> dict[str, Any]:
    for name in ("batch_size", "n_fit"):
        if getattr(settings, name) < processes.n:
            raise InputError(f"{name} {getattr(settings, name)} cannot be shared by {processes.n} processes")
    if settings.device_map is not None and processes.n > 1:
        raise InputError(
            f"--device-map {settings.device_map} is for one process, here are {processes.n}",
            hint="give one or the other: every process of several has a base of its own",
        )
    if settings.method == JOINT and processes.n > 1:
        raise InputError(f"--method {JOINT} is for one process, here are {processes.n}: a batch is one update")
    dataset = Dataset.load(settings.data)
    tasks = _trained(dataset, settings, on_event)
    plan = plan_load(settings.quant, settings.dtype, processes.device or settings.device)
    with _only_one(settings.out) if processes.is_first else nullcontext():
        saved = processes.from_first(_saved(settings, dataset.fingerprint, on_event) if processes.is_first else None)
        with enough_memory(settings.model, plan, settings):
            return _run(settings, processes, dataset, tasks, saved, on_event)


def _trained(dataset: Dataset, settings: TrainSettings, on_event: OnEvent) -> tuple[str, ...]:
    """The tasks that are trained on: those asked for, else all that have training records and aren't held out."""
    asked = [task for task in settings.tasks or dataset.tasks if task not in settings.holdout]
    tasks = tuple(task for task in asked if dataset.records("train", (task,)))
    missing = ", ".join(task for task in asked if task not in tasks)
    if not tasks or (settings.tasks and missing):
        raise InputError(f"{settings.data} has no training record of {missing or 'any task'}")
    if missing:
        on_event(Event("note", f"{settings.data} has no training record of {missing}: not trained on"))
    return tasks


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Keep other processes from training an editor for the same folder: they would remove each other's files."""
    place = Path(f"{training_folder(out)}.lock")
    lock = FileLock(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"another process is training the editor {out}", hint="give another --out") from error
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        place.unlink(missing_ok=True)
        lock.release()


def _run(
    settings: TrainSettings,
    processes: Processes,
    dataset: Dataset,
    tasks: tuple[str, ...],
    saved: Checkpoint | None,
    on_event: OnEvent,
) -> dict[str, Any]:
    base = load_base(
        settings.model,
        # `auto` may come out otherwise on another device, or when it is measured again.
        quant=saved.values["quant"] if saved else settings.quant,
        dtype=saved.values["dtype"] if saved else settings.dtype,
        device=processes.device or settings.device,
        device_map=settings.device_map,
    )
    n_records = len(dataset.records("train", tasks))
    on_event(Event("note", f"{n_records} records of {', '.join(tasks)}; base {base.id}, {_how(base)}"))
    run = Run(settings, base, dataset, tasks, processes, on_event)
    if saved is not None:
        run.load(saved)
        on_event(Event("note", f"going on from step {saved.step}"))
    run.open()
    try:
        run.steps()
    except (KeyboardInterrupt, IEError) as error:
        if not run.n_steps_done:
            raise  # an untrained editor is of no use
        run.finish(early=True)
        said = f"the {'last' if run.best is None else 'best'} editor so far is in {settings.out}"
        if isinstance(error, IEError):
            on_event(Event("note", said))
            raise
        if checkpoints(training_folder(settings.out)):
            said += f"; `ie train --resume --out {settings.out}` goes on from the last checkpoint"
        elif processes.is_first:
            shutil.rmtree(training_folder(settings.out), ignore_errors=True)
        raise KeyboardInterrupt(*([said] if processes.is_first else [])) from None
    result = run.finish()
    if processes.is_first:
        shutil.rmtree(training_folder(settings.out), ignore_errors=True)
    return result


def _saved(settings: TrainSettings, data_fingerprint: str, on_event: OnEvent) -> Checkpoint | None:
    """What to go on from; without `resume` nothing, and then nothing of an unfinished run may be lost either."""
    folder = training_folder(settings.out)
    if not settings.resume:
        if not settings.force:
            check_not_begun(settings.out)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    if settings.out.exists() and not folder.exists():
        raise InputError(
            f"--resume: {settings.out} is finished, there is nothing to go on with",
            hint="give --force instead to train it anew",
        )
    discard_leftovers(folder)
    saved = newest_checkpoint(folder, lambda text: on_event(Event("note", text)))
    if saved is None:
        on_event(Event("note", f"no checkpoint in {folder} yet: starting at the beginning"))
        return None
    then, now = saved.values["settings"], settings.model_dump(mode="json", exclude=_MAY_CHANGE)
    other = [f"{name} {then.get(name)!r}, not {value!r}" for name, value in now.items() if then.get(name) != value]
    if saved.values["data"] != data_fingerprint:
        other.append(f"records {saved.values['data']}, not {data_fingerprint}")
    if other:
        raise InputError(
            f"--resume: the run in {folder} has {'; '.join(other)}",
            hint="leave these as they were, or start anew with --force",
        )
    return saved


def _how(base: Base) -> str:
    return f"{str(base.model.dtype).removeprefix('torch.')}, quant {base.quant}, on {base.device} ({base.reason})"
