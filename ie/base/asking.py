"""Asking a base model many questions at once, each under an edit of its own or under none.

Questions are sorted by length and cut into batches by tokens, so that little is padded; answers come back in the
order of the questions.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from ie.base.capture import row_mean
from ie.base.model import Base
from ie.base.update import Update
from ie.data.tokens import Text

__all__ = ["Ask", "answers", "by_length", "continuations", "log_likelihoods", "matches", "normalise", "predictions"]

_BATCH_TOKENS = 4096
_MAX_PADDING = 1024  # tokens of a batch, beyond which a run of its own is cheaper for what is longer
_EXTRA_TOKENS = 4  # beyond the target's own: room to see whether the model stops where the target does
_FREE_TOKENS = 16  # where no answer is awaited


@dataclass(frozen=True)
class Ask:
    """One question to the model.

    Attributes:
        prompt: what is asked.
        answer: the answer whose tokens are forced, or waited for; "" where none is awaited.
        instruction: what stands before the prompt; None for a plain question.
        edit: index of the edit that it is asked under; of no matter where there is a single edit.
        ended: whether the token by which the base ends its answers, if it does, belongs to the answer.
    """

    prompt: str
    answer: str
    instruction: str | None = None
    edit: int = 0
    ended: bool = False


def predictions(base: Base, asks: Sequence[Ask], update: Update | None = None) -> list[tuple[int, ...]]:
    """For each question the arg-max tokens at the answer's positions, the answer itself being forced."""
    out: list[tuple[int, ...]] = [()] * len(asks)
    for indices, texts in by_length(base, asks, _BATCH_TOKENS):
        batch = base.collate(texts)
        with torch.no_grad():
            best = base.logits(batch, update, _rows(asks, indices, update, base)).argmax(-1)
        tokens = iter(best.tolist())
        for index, text in zip(indices, texts, strict=True):
            out[index] = tuple(islice(tokens, text.n_answer))
    return out


def log_likelihoods(base: Base, asks: Sequence[Ask], update: Update | None = None) -> list[float]:
    """For each question the mean log-probability of the answer's tokens."""
    out = [0.0] * len(asks)
    for indices, texts in by_length(base, asks, _BATCH_TOKENS):
        batch = base.collate(texts)
        with torch.no_grad():
            logits = base.logits(batch, update, _rows(asks, indices, update, base)).float()
            of_label = logits.log_softmax(-1).gather(-1, batch.labels[:, None])[:, 0]
        for index, value in zip(indices, row_mean(of_label, batch.rows, len(texts)).tolist(), strict=True):
            out[index] = value
    return out


def answers(base: Base, asks: Sequence[Ask], update: Update | None = None) -> list[str]:
    """For each question the greedy answer: what the model writes after the prompt, up to where it ends.

    An answer ends at an end-of-text token or a line break. A model that ends nothing is cut where the awaited answer
    ends, if that is the end of a word.
    """
    out = [""] * len(asks)
    limits = [_limit(base, ask) for ask in asks]
    # A batch is decoded up to its largest limit: no limit in it is more than twice another.
    doublings = [(limit - 1).bit_length() for limit in limits]
    for indices, texts in by_length(base, asks, _BATCH_TOKENS, doublings):
        written = base.generate(texts, max(limits[i] for i in indices), update, _rows(asks, indices, update, base))
        for index, ids in zip(indices, written, strict=True):
            limit = limits[index]
            shown = base.tokenizer.decode(ids[:limit]).lstrip()
            ended = len(ids) < limit or "\n" in shown
            first = shown.split("\n")[0].strip()
            out[index] = first if ended else _cut(first, asks[index].answer)
    return out


def continuations(base: Base, asks: Sequence[Ask], n_tokens: int, update: Update | None = None) -> list[list[int]]:
    """For each question exactly `n_tokens` greedy tokens, ends of text passed over."""
    out: list[list[int]] = [[]] * len(asks)
    for indices, texts in by_length(base, asks, _BATCH_TOKENS):
        written = base.generate(texts, n_tokens, update, _rows(asks, indices, update, base), through_end=True)
        for index, ids in zip(indices, written, strict=True):
            out[index] = ids
    return out


def _limit(base: Base, ask: Ask) -> int:
    """How many tokens an answer may have."""
    text = base.encode(ask.prompt, ask.answer, ask.instruction)
    return (text.n_answer or _FREE_TOKENS) + _EXTRA_TOKENS


def _cut(shown: str, awaited: str) -> str:
    rest = shown[len(awaited) :]
    return awaited if awaited and shown.startswith(awaited) and not rest[:1].isalnum() else shown


def normalise(text: str) -> str:
    """Lower case, no punctuation at either end, single spaces."""
    return re.sub(r"\s+", " ", text).strip(string.punctuation + string.whitespace).casefold()


def matches(answer: str, target: str) -> bool:
    """Whether an answer is the target, word for word after normalising."""
    return normalise(answer) == normalise(target)


def by_length(
    base: Base, asks: Sequence[Ask], n_tokens: int, groups: Sequence[int] | None = None
) -> Iterator[tuple[list[int], list[Text]]]:
    """Questions sorted by length and cut into batches.

    Args:
        base: the base model.
        asks: n questions.
        n_tokens: at most so many tokens in a batch, padding counted; of padding alone at most 1,024.
        groups: n groups; questions of two groups share no batch. None if all may.

    Yields:
        The indices and the texts of a batch.
    """
    endings = [base.ending if ask.ended else None for ask in asks]
    texts = [
        base.encode(ask.prompt, ask.answer, ask.instruction, ending) for ask, ending in zip(asks, endings, strict=True)
    ]
    groups = groups or [0] * len(asks)
    order = sorted(range(len(asks)), key=lambda i: (groups[i], len(texts[i].ids)))
    indices: list[int] = []
    n_own = 0
    for index in order:
        length = len(texts[index].ids)
        padded = (len(indices) + 1) * length  # the longest so far
        full = padded > n_tokens or padded - n_own - length > _MAX_PADDING
        if indices and (full or groups[index] != groups[indices[0]]):
            yield indices, [texts[i] for i in indices]
            indices, n_own = [], 0
        indices.append(index)
        n_own += length
    if indices:
        yield indices, [texts[i] for i in indices]


def _rows(asks: Sequence[Ask], indices: list[int], update: Update | None, base: Base) -> Tensor | None:
    """The edit that each question is under; None without edits, or with one edit, which every question is under."""
    if update is None or all(len(a) == 1 for a, _ in update.values()):
        return None
    return torch.tensor([asks[i].edit for i in indices], device=base.device)
