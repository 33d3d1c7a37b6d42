"""Peak memory of one training process: `python -m benchmarks.memory ours|reference|reference-1920 BASE DATA`.

The GPU's memory where there is one, else the machine's.
Ours trains four batches of the default size, the reference the episodes of one of them, one at a time, both with Adam.
Its editor has ours' rank, or the paper's 1,920.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from benchmarks.reference import Reference
from benchmarks.workload import SETTINGS, Training, draw_episodes, moved_editor
from ie.base.load import load_base
from ie.base.plan import meta_model, plan_load
from ie.base.targets import find_targets
from ie.data.dataset import Dataset
from ie.editor.editor import Editor, EditorSettings
from ie.training.memory import peak_memory_bytes

_N_BATCHES = 4


def train_ours(folder: Path, data: Path) -> None:
    """Steps of a default editor."""
    batches = draw_episodes(data, _N_BATCHES)
    base = load_base(str(folder), quant="none")
    run = Training(base, moved_editor(base, batches))
    for episodes in batches:
        run.step(episodes)


def train_reference(folder: Path, data: Path, settings: EditorSettings) -> None:
    """The same episodes, one at a time."""
    editor = Editor(find_targets(meta_model(str(folder))), settings).to(plan_load().device)
    reference = Reference(folder, editor)
    optimiser = torch.optim.Adam(editor.parameters(), lr=1e-6)
    for episodes in draw_episodes(data, 1):
        for index in range(len(episodes.requests)):
            gradients = reference.gradients(episodes, index, SETTINGS.locality_weight)
            for parameter, gradient in zip(editor.parameters(), gradients, strict=True):
                parameter.grad = gradient
            optimiser.step()


def main(side: str, folder: str, data: str) -> None:
    """Train, then write the peak as JSON."""
    if side == "ours":
        train_ours(Path(folder), Path(data))
    elif side.endswith("1920"):  # the paper's, which makes no difference between kinds
        train_reference(Path(folder), Path(data), EditorSettings(rank=1920))
    else:
        n_tasks = len(set(Dataset.load(Path(data)).tasks) - set(SETTINGS.holdout))
        ours = EditorSettings.model_validate(SETTINGS, from_attributes=True).for_tasks(n_tasks)
        train_reference(Path(folder), Path(data), ours)
    sys.stdout.write(json.dumps({"peak_bytes": peak_memory_bytes()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
