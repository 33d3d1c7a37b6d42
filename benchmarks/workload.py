"""What is measured on: episodes of a dataset, an editor off its start, and training steps as the trainer takes them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch

from ie.base.model import Base
from ie.data.dataset import Dataset
from ie.editor.editor import Editor, EditorSettings
from ie.training.episodes import Episodes, Relations, make_episodes
from ie.training.loss import Loss, backward
from ie.training.settings import TrainSettings
from ie.training.stream import RecordStream

__all__ = ["Training", "draw_episodes", "moved_editor", "regroup"]

SETTINGS = TrainSettings()


def draw_episodes(data: Path, n_batches: int, seed: int = 0) -> list[Episodes]:
    """Batches as the trainer draws them, of all tasks but the hold-out."""
    dataset = Dataset.load(data)
    tasks = [task for task in dataset.tasks if task not in SETTINGS.holdout]
    rng = random.Random(seed)
    records = dataset.records("train", tasks)
    stream = RecordStream(records, SETTINGS.balance, rng)
    return [
        make_episodes(
            [next(stream) for _ in range(SETTINGS.batch_size)],
            rng,
            relations=Relations(records) if SETTINGS.related_negatives else None,
            told_share=1 - SETTINGS.instruction_dropout,
            plain_share=SETTINGS.plain_share,
            n_negatives=SETTINGS.n_negatives,
        )
        for _ in range(n_batches)
    ]


def regroup(batches: Sequence[Episodes], seed: int = 1) -> list[Episodes]:
    """The same episodes in other batches: texts whose prefix is kept, in shapes that were not seen."""
    size = SETTINGS.batch_size
    places = [(batch, edit) for batch in batches for edit in range(size)]
    random.Random(seed).shuffle(places)
    out = []
    for start in range(0, len(places), size):
        fresh = Episodes([], [], [])
        for edit, (batch, old) in enumerate(places[start : start + size]):
            fresh.requests.append(batch.requests[old])
            fresh.wanted.extend(replace(ask, edit=edit) for ask in batch.wanted if ask.edit == old)
            fresh.kept.extend(replace(ask, edit=edit) for ask in batch.kept if ask.edit == old)
        out.append(fresh)
    return out


def moved_editor(base: Base, episodes: Sequence[Episodes]) -> Editor:
    """A default editor off its start, where half of its network would be zero, that knows the episodes' kinds of edits:
    those whose instructions begin with the same line.
    """
    torch.manual_seed(0)
    told = {one.instruction for batch in episodes for one in batch.requests if one.instruction is not None}
    kinds = [list(group) for _, group in groupby(sorted(told), key=lambda text: text.splitlines()[0])]
    settings = EditorSettings.model_validate(SETTINGS, from_attributes=True).for_tasks(len(kinds))
    editor = Editor(base.targets, settings).to(base.device)
    if editor.kinds is not None:
        for kind, instructions in enumerate(kinds):
            editor.kinds.observe(base.read(instructions), kind)
        editor.kinds.fit()
    with torch.no_grad():
        for parameter in editor.networks.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return editor


class Training:
    """Training steps of an editor."""

    def __init__(self, base: Base, editor: Editor) -> None:
        self.base, self.editor = base, editor
        self.optimiser = torch.optim.Adam(self.editor.parameters(), lr=1e-6)

    def step(self, episodes: Episodes) -> Loss:
        """Gradient, clipping, optimiser."""
        self.optimiser.zero_grad(set_to_none=True)
        loss = backward(self.base, self.editor, episodes, SETTINGS.locality_weight)
        self.editor.clip_gradients(1.0)
        self.optimiser.step()
        return loss
