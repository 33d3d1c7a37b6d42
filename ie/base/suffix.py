"""Running a decoder in two parts: the frozen prefix of blocks, then the suffix that edits may change.

Blocks before the first edited one are the same before and after any edit. `run_prefix` runs them once, without
gradients, and returns the hidden states that enter the first edited block; `run_suffix` runs the rest from there.
Embeddings, masks, rotary tables and the output head stay the model's own: the first blocks pass their input through
and a pre-hook puts the kept hidden states in, so no architecture needs a line of code here. In fp32 the logits are
those of a full run, bit for bit.

Only the positions that predict an answer token reach the output head: its cost follows the number of answer tokens,
and whatever the model does to its logits afterwards (scaling, soft caps) still happens. What enters the head there can
be kept, d_model values for a position where logits are a whole vocabulary, and `run_head` makes the logits of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ie.data.tokens import TokenBatch

__all__ = ["Decoder", "run_head", "run_prefix", "run_suffix", "run_to_head"]


class _SeenEnoughError(Exception):
    """Ends a run where the rest is of no interest; never leaves this file."""


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

        def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            seen.append(output)
            raise _SeenEnoughError

        handle = blocks[0].register_forward_hook(keep)
        try:
            with torch.no_grad(), suppress(_SeenEnoughError):
                model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
        finally:
            handle.remove()
        return cls(model, blocks, first, isinstance(seen[0], tuple))


def run_prefix(decoder: Decoder, batch: TokenBatch) -> Tensor:
    """Hidden states (n, t, d_model) that enter the first edited block, without gradients."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append(args[0] if args else kwargs["hidden_states"])
        raise _SeenEnoughError

    handle = decoder.blocks[decoder.first].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.no_grad(), suppress(_SeenEnoughError):
            decoder.model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False)
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
    with _heading(decoder, lambda into_head: into_head[batch.predicts.to(into_head.device)][None]):
        return _run_blocks(decoder, batch, hidden).squeeze(0)  # [0] would fill a gradient with zeros first


def run_to_head(decoder: Decoder, batch: TokenBatch, hidden: Tensor) -> Tensor:
    """What enters the output head at those positions, (n_answer, d_model), without gradients; see `run_suffix`."""
    kept: list[Tensor] = []

    def keep(into_head: Tensor) -> Tensor:
        kept.append(into_head[batch.predicts.to(into_head.device)])
        raise _SeenEnoughError

    with torch.no_grad(), suppress(_SeenEnoughError), _heading(decoder, keep):
        _run_blocks(decoder, batch, hidden)
    return kept[0]


def run_head(decoder: Decoder, into_head: Tensor) -> Tensor:
    """Logits (n, n_vocab) of what entered the output head, (n, d_model); through the model's own forward."""
    one = torch.zeros(1, 1, dtype=torch.long, device=into_head.device)
    with _skipping(decoder, decoder.blocks), _heading(decoder, lambda _: into_head[None]):
        logits: Tensor = decoder.model(input_ids=one, use_cache=False).logits
    return logits[0]


def _run_blocks(decoder: Decoder, batch: TokenBatch, hidden: Tensor) -> Tensor:
    prefix = decoder.blocks[: decoder.first]
    with _skipping(decoder, prefix), _entering(decoder.blocks[decoder.first], hidden):
        out = decoder.model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False)
    logits: Tensor = out.logits
    return logits


@contextmanager
def _skipping(decoder: Decoder, skipped: Iterable[nn.Module]) -> Iterator[None]:
    """Let some blocks return their input unchanged."""

    def pass_through(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if decoder.returns_tuple else hidden

    skipped = list(skipped)
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
def _heading(decoder: Decoder, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change what enters the output head."""
    head = decoder.model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()
