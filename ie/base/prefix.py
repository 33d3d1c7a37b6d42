"""The prefix store: hidden states that enter the first edited block, each text's computed once and kept."""

from __future__ import annotations

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ie.base.suffix import Decoder, run_prefix
from ie.data.tokens import Text, TokenBatch, collate

__all__ = ["PrefixStore"]


class PrefixStore:
    """Keeps hidden states by token ids, up to a budget of memory; texts beyond it are computed each time.

    Args:
        decoder: the split base model.
        budget_bytes: how much to keep.
    """

    def __init__(self, decoder: Decoder, budget_bytes: int) -> None:
        self._decoder = decoder
        self._budget_bytes = budget_bytes
        self._kept: dict[tuple[int, ...], Tensor] = {}
        self.n_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def hidden(self, batch: TokenBatch) -> Tensor:
        """Hidden states (n, t, d_model) of a batch, zero on padding."""
        new = {text.ids: text for text in batch.texts if text.ids not in self._kept}
        fresh = self._compute(list(new.values()), batch) if new else {}
        states = [self._kept.get(text.ids, fresh.get(text.ids)) for text in batch.texts]
        return pad_sequence([state for state in states if state is not None], batch_first=True)

    def _compute(self, texts: list[Text], batch: TokenBatch) -> dict[tuple[int, ...], Tensor]:
        # Any id will do on padding: causal attention never looks to the right.
        hidden = run_prefix(self._decoder, collate(texts, pad_id=0, device=batch.ids.device))
        fresh = {text.ids: hidden[row, : len(text.ids)].clone() for row, text in enumerate(texts)}
        for ids, state in fresh.items():
            if self.n_bytes + state.nbytes <= self._budget_bytes:
                self._kept[ids] = state
                self.n_bytes += state.nbytes
        return fresh
