"""All of it on the bundled base and facts: build, train, edit, apply, report."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ie.data.build import build
from ie.data.dataset import Dataset
from ie.editor.editing import EditSettings, RequestSettings, edit
from ie.evaluation import evaluate
from ie.patch.apply import apply_patch
from ie.training import Event, TrainSettings, train

__all__ = ["run"]


def run(
    *,
    out: Path | None = None,
    minutes: float | None = None,
    seed: int = 0,
    force: bool = False,
    on_note: Callable[[str], None] = lambda text: None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> dict[str, Any]:
    """Run every step and return each step's JSON object under its command's name.

    Args:
        out: folder to keep everything in; None uses a temporary one.
        minutes: at most so long in training; None for the default number of steps.
        seed: of dataset and training.
        force: overwrite what is in `out`.
        on_note: called with a sentence before each step.
        on_event: called with training's progress.
    """
    with nullcontext(str(out)) if out is not None else tempfile.TemporaryDirectory(prefix="ie-demo-") as place:
        folder = Path(place)
        data, editor, patch = folder / "ie-data", folder / "ie-editor", folder / "patch.safetensors"
        on_note("1/5 build: an instruction dataset from the bundled facts and templates")
        built = build(data, seed=seed, force=force)
        on_note("2/5 train: an editor for the bundled base; the task zsre is held out")
        trained = train(
            TrainSettings(data=data, out=editor, minutes=minutes, seed=seed, force=force), on_event=on_event
        )
        record = Dataset.load(data).records("test", ["general"])[0]
        probe = record.locality[0].prompt
        on_note(f"3/5 edit: {record.prompt!r} shall be answered with {record.target!r}")
        request = RequestSettings(
            instruction=record.instruction.heldout[0], prompt=record.prompt, target=record.target, probes=(probe,)
        )
        edited = edit(EditSettings(requests=(request,), editor=editor, out=patch))
        on_note("4/5 apply-patch: the same patch, read from its file, asked in other words")
        applied = apply_patch([patch], prompts=[*record.rephrases[:2], probe])
        on_note("5/5 eval: test records, before and after, the held-out task among them")
        report = evaluate(editors=[editor], data=data, limit=40, seed=seed, on_note=on_note)
        return {"build": built, "train": trained, "edit": edited, "apply-patch": applied, "eval": report}
