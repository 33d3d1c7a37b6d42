"""What a base model makes of an instruction: read once and kept, however many requests stand behind it.

Attention is causal, so an instruction's own tokens see nothing of a prompt behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ie.base.capture import recording
from ie.base.prefix import PrefixStore
from ie.base.store import TextStore
from ie.base.suffix import Decoder, run_to_head
from ie.base.targets import EditTarget
from ie.data.tokens import Text, collate

__all__ = ["InstructionReader", "Readings"]

_BUDGET_BYTES = 256 * 1024**2


@dataclass(frozen=True)
class Readings:
    """What was read of n instructions.

    Attributes:
        inputs: (n, d_in) float32, the mean input of an edit target over the instruction's tokens.
        given: (n,) bool, False where there is no instruction and the row is zero.
    """

    inputs: Tensor
    given: Tensor


class InstructionReader:
    """Reads instructions.

    Args:
        decoder: the split base model.
        target: the edit target whose inputs are taken.
        prefixes: hidden states that enter the first edited block.
    """

    def __init__(self, decoder: Decoder, target: EditTarget, prefixes: PrefixStore) -> None:
        self._decoder = decoder
        self._target = target
        self._prefixes = prefixes
        self.store = TextStore(_BUDGET_BYTES)

    def __call__(self, texts: Sequence[Text | None], device: torch.device, beside: Sequence[Text] = ()) -> Readings:
        """Read the instructions of a batch of requests; None for a request without one.

        What stands `beside` them and is about to be run shares the prefix's run with those that are new.
        """
        told = [text for text in texts if text is not None]
        new = [text for text in told if text not in self.store]
        if new:
            self._prefixes.get([*new, *beside])
        kept = iter(self.store.get(told, self._compute))
        nothing = torch.zeros(self._target.d_in)
        rows = torch.stack([nothing if text is None else next(kept) for text in texts])
        return Readings(rows.to(device), torch.tensor([text is not None for text in texts], device=device))

    def _compute(self, texts: list[Text]) -> list[Tensor]:
        model = self._decoder.model
        batch = collate(texts, pad_id=0, device=next(model.parameters()).device)
        hidden = self._prefixes.hidden(batch)
        with torch.no_grad(), recording(model, [self._target]) as recorder:
            run_to_head(self._decoder, batch, hidden)
        weights = (batch.mask / batch.mask.sum(-1, keepdim=True))[:, None].cpu()  # (n, 1, t)
        seen = recorder.inputs[self._target.name].float().cpu().view(*batch.ids.shape, -1)
        return list((weights @ seen)[:, 0].unbind())
