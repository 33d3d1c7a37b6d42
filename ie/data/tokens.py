"""Tokenised texts and the batches that models read.

A text is `instruction + prompt + " " + answer`. It is tokenised once, as a whole: tokenising prompt and answer apart
would put a beginning-of-text token or a lost space inside the answer. Where the answer begins is the length of the
common start with the prompt's own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ie.data.templates import instructed
from ie.errors import DataError

__all__ = ["Text", "TextEncoder", "TokenBatch", "collate"]

_N_KEPT = 2**15


@dataclass(frozen=True)
class Text:
    """One tokenised text.

    Attributes:
        ids: all token ids.
        n_instruction: how many of the first tokens belong to the instruction (and to a beginning-of-text token).
        n_prompt: where the answer begins; `ids[n_prompt:]` are the answer's tokens.
    """

    ids: tuple[int, ...]
    n_instruction: int
    n_prompt: int

    @property
    def n_answer(self) -> int:
        """How many tokens the answer has."""
        return len(self.ids) - self.n_prompt


class TextEncoder:
    """Turns prompts and answers into `Text`, of the last 32,768 each different text once.

    Args:
        tokenizer: a transformers tokenizer.
        max_length: the longest text in tokens; longer ones lose tokens from the front, as a served prompt would.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._kept = lru_cache(maxsize=_N_KEPT)(self._encode)
        # Prompts and instructions come in many texts; "" stands for what the tokenizer puts before every text.
        self._ids = lru_cache(maxsize=_N_KEPT)(self._tokenise)

    def __call__(
        self, prompt: str, answer: str = "", instruction: str | None = None, ending: int | None = None
    ) -> Text:
        """Tokenise a prompt with its answer, behind an instruction or plain; `ending` becomes the answer's last token.

        Raises:
            DataError: if the answer adds no token to the prompt.
        """
        return self._kept(prompt, answer, instruction, ending)

    def _encode(self, prompt: str, answer: str, instruction: str | None, ending: int | None) -> Text:
        shown = prompt if instruction is None else instructed(instruction, prompt)
        ids = self._tokenise(f"{shown} {answer}") if answer else self._ids(shown)
        n_prompt = _common(ids, self._ids(shown)) if answer else len(ids)
        if answer and n_prompt == len(ids):
            raise DataError(f"the answer {answer!r} adds no token to the prompt {prompt!r}")
        lead = "" if instruction is None else instructed(instruction, "").rstrip()
        n_instruction = _common(ids, self._ids(lead))
        ids = ids if ending is None else (*ids, ending)
        dropped = max(0, len(ids) - self._max_length)
        if n_prompt - dropped < 1:
            raise DataError(
                f"prompt and answer have {len(ids)} tokens, the base model reads {self._max_length}",
                hint="Shorten the answer.",
            )
        return Text(ids[dropped:], max(0, n_instruction - dropped), n_prompt - dropped)

    def _tokenise(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text)["input_ids"])


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    n = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        n += 1
    return n


@dataclass(frozen=True)
class TokenBatch:
    """Texts of one forward pass, padded on the right.

    Attributes:
        texts: the texts, in row order.
        ids: (n, t) int64.
        mask: (n, t) bool, False on padding.
        predicts: (n, t) bool, True where the next token is an answer token.
        labels: (n_answer,) int64, the answer tokens, row by row.
        rows: (n_answer,) int64, the row of each answer token.
        editable: (n, t) bool, True on tokens of prompt and answer, the instruction's left out.
        opening: (n, t) bool, True on a prompt's last token, which predicts the answer's first.
    """

    texts: tuple[Text, ...]
    ids: Tensor
    mask: Tensor
    predicts: Tensor
    labels: Tensor
    rows: Tensor
    editable: Tensor
    opening: Tensor


def collate(texts: Sequence[Text], pad_id: int, device: torch.device) -> TokenBatch:
    """Pad texts on the right into one batch on `device`."""
    width = max(len(text.ids) for text in texts)
    ids = torch.tensor([(*text.ids, *[pad_id] * (width - len(text.ids))) for text in texts])
    lengths = torch.tensor([len(text.ids) for text in texts])[:, None]
    prompts = torch.tensor([text.n_prompt for text in texts])[:, None]
    instructions = torch.tensor([text.n_instruction for text in texts])[:, None]
    position = torch.arange(width)[None, :]
    mask = position < lengths
    answers = mask & (position >= prompts)
    return TokenBatch(
        texts=tuple(texts),
        ids=ids.to(device),
        mask=mask.to(device),
        predicts=(mask & (position >= prompts - 1) & (position < lengths - 1)).to(device),
        labels=ids[answers].to(device),
        rows=answers.nonzero()[:, 0].to(device),
        editable=(mask & (position >= instructions)).to(device),
        opening=(position == prompts - 1).to(device),
    )
