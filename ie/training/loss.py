"""The outer loss of a batch of episodes (MEND, eq. 4; InstructEdit, eq. 3).

    L = NLL(edited model | wanted answers) + c · KL(base || edited model | answers to keep)

NLL is taken on the edit prompt and on a rephrase, not on the edit prompt alone as published code does: generalization
is trained, not hoped for. It is the whole answer's, a sum over its tokens: greedy decoding must get every token of a
long name right. KL is taken at the positions that predict the answer, over the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ie.base.asking import Ask
from ie.base.capture import row_mean
from ie.base.model import Base
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
    asks = [*episodes.wanted, *episodes.kept]
    edit = locality = torch.zeros((), device=base.device)
    for chosen in _by_length(asks):
        n_wanted = sum(index < len(episodes.wanted) for index in chosen)
        batch = base.collate([base.encode(asks[i].prompt, asks[i].answer, asks[i].instruction) for i in chosen])
        edits = torch.tensor([asks[index].edit for index in chosen], device=base.device)
        logits = base.logits(batch, update, edits).float()
        n_answer = int((batch.rows < n_wanted).sum())
        wanted, kept = logits.tensor_split([n_answer])
        nll = nn.functional.cross_entropy(wanted, batch.labels[:n_answer], reduction="sum")
        edit = edit + nll / len(episodes.wanted)
        if n_answer < len(logits):
            divergence = _kl(base.log_probs(batch.texts[n_wanted:]), kept)
            per_text = row_mean(divergence, batch.rows[n_answer:] - n_wanted, len(chosen) - n_wanted)
            locality = locality + per_text.sum() / len(episodes.kept)
    return Loss(edit, locality)


def _by_length(asks: Sequence[Ask]) -> list[list[int]]:
    """Plain and instructed queries apart: the latter are several times longer, and padding is not free."""
    plain = [index for index, ask in enumerate(asks) if ask.instruction is None]
    instructed = [index for index, ask in enumerate(asks) if ask.instruction is not None]
    return [group for group in (plain, instructed) if group]


def _kl(before: Tensor, logits: Tensor) -> Tensor:
    """KL(base || edited) at each position, (n_answer,) float32, from log-probabilities before and logits after."""
    return nn.functional.kl_div(logits.log_softmax(-1), before, reduction="none", log_target=True).sum(-1)
