"""Running a decoder in two parts: the frozen prefix of blocks, then the suffix that edits may change.

Blocks before the first edited one are the same before and after any edit. `run_prefix` runs them once, without
gradients, and returns the hidden states that enter the first edited block; `run_suffix` runs the rest from there.
Embeddings, masks, rotary tables and the output head stay the model's own: the first blocks pass their input through
and a pre-hook puts the kept hidden states in, so no architecture needs a line of code here. In fp32 the logits are
those of a full run, bit for bit.

Only the positions that predict an answer token reach the output head: its cost follows the number of answer tokens,
and whatever the model does to its logits afterwards (scaling, soft caps) still happens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ie.data.tokens import TokenBatch

__all__ = ["Decoder", "run_prefix", "run_suffix"]


class _ReachedSuffixError(Exception):
    """Ends a prefix run at the first edited block; never leaves this file."""


@dataclass(frozen=True)
class Decoder:
    """A causal LM split before its first edited block.

    Attributes:
        model: the whole causal LM.
        blocks: its decoder blocks.
        first: index of the first edited block; the blocks before it are the prefix.
        returns_tuple: whether a block returns its hidden states in a tuple (GPT-J does) or bare.
    """

    model: nn.Module
    blocks: nn.ModuleList
    first: int
    returns_tuple: bool

    @classmethod
    def split(cls, model: nn.Module, blocks: nn.ModuleList, first: int, device: torch.device) -> Decoder:
        """Split `model` before block `first`; one token is run to see what a block returns."""
        seen: list[Any] = []
        handle = blocks[0].register_forward_hook(lambda _, args, output: seen.append(output))
        try:
            with torch.no_grad():
                model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
        finally:
            handle.remove()
        return cls(model, blocks, first, isinstance(seen[0], tuple))


def run_prefix(decoder: Decoder, batch: TokenBatch) -> Tensor:
    """Hidden states (n, t, d_model) that enter the first edited block, without gradients."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append(args[0] if args else kwargs["hidden_states"])
        raise _ReachedSuffixError

    handle = decoder.blocks[decoder.first].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad():
            decoder.model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False)
    except _ReachedSuffixError:
        pass
    finally:
        handle.remove()
    return kept[0]


def run_suffix(decoder: Decoder, batch: TokenBatch, hidden: Tensor) -> Tensor:
    """Logits (n_answer, n_vocab) at the positions that predict an answer token, row by row.

    Args:
        decoder: the split model.
        batch: the texts.
        hidden: (n, t, d_model), what `run_prefix` returned for these texts.
    """
    with _skipping(decoder), _entering(decoder.blocks[decoder.first], hidden), _predicting(decoder, batch.predicts):
        logits: Tensor = decoder.model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits
    return logits[0]


@contextmanager
def _skipping(decoder: Decoder) -> Iterator[None]:
    """Let the prefix blocks return their input unchanged."""

    def pass_through(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if decoder.returns_tuple else hidden

    skipped = decoder.blocks[: decoder.first]
    # A forward of its own (as quantised loads may have) lies in the instance and is put back; most have none.
    own = [block.__dict__.get("forward") for block in skipped]
    try:
        for block in skipped:
            block.__dict__["forward"] = pass_through
        yield
    finally:
        for block, forward in zip(skipped, own, strict=True):
            if forward is None:
                del block.__dict__["forward"]
            else:
                block.__dict__["forward"] = forward


@contextmanager
def _entering(block: nn.Module, hidden: Tensor) -> Iterator[None]:
    def put(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    handle = block.register_forward_pre_hook(put, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _predicting(decoder: Decoder, predicts: Tensor) -> Iterator[None]:
    head = decoder.model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(lambda _, args: (args[0][predicts][None], *args[1:]))
    try:
        yield
    finally:
        handle.remove()
