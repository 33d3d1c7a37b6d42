"""The outer loss of a batch of episodes (MEND, eq. 4; InstructEdit, eq. 3).

    L = NLL(edited model | wanted answers) + c · KL(base || edited model | answers to keep)

NLL is taken on the edit prompt and on a rephrase, not on the edit prompt alone as published code does: generalization
is trained, not hoped for. KL is taken at the positions that predict the answer, over the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ie.base.asking import Ask
from ie.base.capture import answer_nll, row_mean
from ie.base.model import Base
from ie.base.update import Update
from ie.editor.editor import Editor
from ie.editor.request import collate_requests
from ie.training.episodes import Episodes

__all__ = ["Loss", "episode_loss"]


@dataclass(frozen=True)
class Loss:
    """Losses of a batch of episodes, each a mean over its queries, () float32."""

    edit: Tensor
    locality: Tensor

    def total(self, locality_weight: float) -> Tensor:
        """The outer loss."""
        return self.edit + locality_weight * self.locality


def episode_loss(base: Base, editor: Editor, episodes: Episodes) -> Loss:
    """Edit, ask every query under its edit, and compare."""
    update = editor.update(base.signals(collate_requests(base, episodes.requests)))
    zero = torch.zeros((), device=base.device)
    edit, locality = zero, zero
    for asks in _by_length(episodes.wanted):
        edit = edit + _nll(base, asks, update).sum() / len(episodes.wanted)
    for asks in _by_length(episodes.kept):
        locality = locality + _kl(base, asks, update).sum() / len(episodes.kept)
    return Loss(edit, locality)


def _by_length(asks: Sequence[Ask]) -> list[list[Ask]]:
    """Plain and instructed queries apart: the latter are several times longer, and padding is not free."""
    groups = ([ask for ask in asks if ask.instruction is None], [ask for ask in asks if ask.instruction is not None])
    return [group for group in groups if group]


def _nll(base: Base, asks: Sequence[Ask], update: Update) -> Tensor:
    batch = base.collate([base.encode(ask.prompt, ask.answer, ask.instruction) for ask in asks])
    rows = torch.tensor([ask.edit for ask in asks], device=base.device)
    return answer_nll(base.logits(batch, update, rows), batch.labels, batch.rows, len(asks))


def _kl(base: Base, asks: Sequence[Ask], update: Update) -> Tensor:
    batch = base.collate([base.encode(ask.prompt, ask.answer, ask.instruction) for ask in asks])
    rows = torch.tensor([ask.edit for ask in asks], device=base.device)
    with torch.no_grad():
        before = base.logits(batch).float().log_softmax(-1)
    after = base.logits(batch, update, rows).float().log_softmax(-1)
    divergence = nn.functional.kl_div(after, before, reduction="none", log_target=True).sum(-1)
    return row_mean(divergence, batch.rows, len(asks))
