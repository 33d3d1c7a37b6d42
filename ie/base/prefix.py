"""The prefix store: hidden states that enter the first edited block, each text's computed once and kept."""

from __future__ import annotations

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ie.base.store import TextStore
from ie.base.suffix import Decoder, run_prefix
from ie.data.tokens import Text, TokenBatch, collate

__all__ = ["PrefixStore"]


class PrefixStore:
    """Keeps hidden states by token ids.

    Args:
        decoder: the split base model.
        budget_bytes: how much to keep; texts beyond it are computed each time.
    """

    def __init__(self, decoder: Decoder, budget_bytes: int) -> None:
        self._decoder = decoder
        self._store = TextStore(budget_bytes, key=lambda text: text.ids)

    @property
    def n_bytes(self) -> int:
        """How much is kept."""
        return self._store.n_bytes

    def __len__(self) -> int:
        return len(self._store)

    def hidden(self, batch: TokenBatch) -> Tensor:
        """Hidden states (n, t, d_model) of a batch, zero on padding."""

        def compute(texts: list[Text]) -> list[Tensor]:
            # Any id will do on padding: causal attention never looks to the right.
            hidden = run_prefix(self._decoder, collate(texts, pad_id=0, device=batch.ids.device))
            return [hidden[row, : len(text.ids)].clone() for row, text in enumerate(texts)]

        return pad_sequence(self._store.get(batch.texts, compute), batch_first=True)
