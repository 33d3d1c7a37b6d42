"""What requests behind one instruction share: its keys and values in the suffix's attention, computed once and kept.

Attention is causal, so an instruction's own tokens see nothing of the prompt behind them, and no gradient of theirs is
wanted: they never enter an update (`TokenBatch.editable`). A request then costs its prompt's and target's tokens
alone, a third of the whole. The signals are those of a whole run but for rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from ie.base.prefix import PrefixStore
from ie.base.store import TextStore
from ie.base.suffix import Context, Decoder, run_into_cache
from ie.data.tokens import Text, TokenBatch, collate

__all__ = ["InstructionStore"]

_BUDGET_BYTES = 256 * 1024**2


class InstructionStore:
    """Keeps an instruction's keys and values by its token ids, all of a token's side by side.

    Args:
        decoder: the split base model.
        prefixes: hidden states that enter the first edited block.
    """

    def __init__(self, decoder: Decoder, prefixes: PrefixStore) -> None:
        self._decoder = decoder
        self._prefixes = prefixes
        self.store = TextStore(_BUDGET_BYTES)
        self._heads: list[int] = []
        self._widths: list[int] = []  # of each block's keys and values

    def context(self, batch: TokenBatch) -> Context:
        """What stands before the own tokens of each request of a batch."""
        cut = [Text(text.ids[: text.n_instruction], 0, text.n_instruction) for text in batch.texts]
        kept = iter(self.store.get([text for text in cut if text.ids], self._compute))
        found = [next(kept) if text.ids else torch.zeros(0, sum(self._widths)) for text in cut]
        width, device = max(map(len, found)), batch.ids.device
        dtype: torch.dtype = self._decoder.model.dtype  # type: ignore[assignment]
        # Padded on the left: windows of attention count the places between two tokens.
        states = pad_sequence([one.flip(0) for one in found], batch_first=True).flip(1).to(device, dtype)
        n_before = torch.tensor([len(one) for one in found], device=device)
        mask = torch.arange(width, device=device) >= width - n_before[:, None]
        return Context(self._cache(states), mask, n_before)

    def _compute(self, texts: list[Text]) -> Sequence[Tensor]:
        batch = collate(texts, pad_id=0, device=next(self._decoder.model.parameters()).device)
        layers = run_into_cache(self._decoder, batch, self._prefixes.hidden(batch))
        self._heads = [key.shape[1] for key, _ in layers]
        parts = [part.transpose(1, 2).flatten(2) for layer in layers for part in layer]
        self._widths = [part.shape[-1] for part in parts]
        flat = torch.cat(parts, -1).cpu()
        return [flat[row, : len(text.ids)].clone() for row, text in enumerate(texts)]

    def _cache(self, states: Tensor) -> DynamicCache:
        """Cut (n, t, all side by side) into each block's keys and values (n, heads, t, d_head)."""
        cache = DynamicCache()
        nothing = states.new_zeros(len(states), 1, states.shape[1], 1)
        for block in range(self._decoder.first):
            cache.update(nothing, nothing, block)  # never attended to, but asked how many tokens stand before
        parts = torch.split(states, self._widths, -1)
        for i, heads in enumerate(self._heads):
            key, value = (torch.unflatten(one, -1, (heads, -1)).transpose(1, 2) for one in parts[2 * i : 2 * i + 2])
            cache.update(key, value, self._decoder.first + i)
        return cache
