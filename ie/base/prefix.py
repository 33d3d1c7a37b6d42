"""The prefix store: hidden states that enter the first edited block, each text's computed once and kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
        store: where they are kept.
    """

    def __init__(self, decoder: Decoder, store: TextStore) -> None:
        self._decoder = decoder
        self.store = store

    def hidden(self, batch: TokenBatch) -> Tensor:
        """Hidden states (n, t, d_model) of a batch in the model's dtype, zero on padding."""
        found = self.get(batch.texts)
        dtype: torch.dtype = self._decoder.model.dtype  # type: ignore[assignment]
        return pad_sequence([one.to(dtype) for one in found], batch_first=True).to(batch.ids.device)

    def get(self, texts: Sequence[Text]) -> list[Tensor]:
        """Hidden states (t, d_model) of each text; those that are missing are computed in one run."""

        def compute(missing: list[Text]) -> list[Tensor]:
            # Any id will do on padding: causal attention never looks to the right.
            device = next(self._decoder.model.parameters()).device
            hidden = run_prefix(self._decoder, collate(missing, pad_id=0, device=device)).cpu()
            return [hidden[row, : len(text.ids)].clone() for row, text in enumerate(missing)]

        return self.store.get(texts, compute)
