"""The base model: loaded once, frozen wholly, read through its prefix and its suffix."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ie.base.capture import Signals, recording
from ie.base.ending import find_ending
from ie.base.instructions import InstructionReader, Readings
from ie.base.likelihood import nll
from ie.base.prefix import PrefixStore
from ie.base.statefile import StateFile
from ie.base.store import TextStore
from ie.base.suffix import Decoder, run_head, run_suffix, run_to_head
from ie.base.targets import EditTarget, read_target
from ie.base.update import Update, adding
from ie.data.tokens import Text, TextEncoder, TokenBatch, collate

__all__ = ["Base"]

PREFIX_BUDGET_BYTES = 2 * 1024**3
PREFIX_FILE_BUDGET_BYTES = 32 * 1024**3
REFERENCE_BUDGET_BYTES = 512 * 1024**2
_MAX_TEXT_TOKENS = 1024
_FEW_TOKENS, _GPU_FEW_TOKENS = 512, 4096  # a GPU waits longer to be told than to read padding


@dataclass(frozen=True)
class Base:
    """A frozen causal LM with what editing needs to know of it.

    Attributes:
        id: the name it was loaded by: `toy`, a hub id, or a folder.
        folder: its checkpoint.
        fingerprint: names its weights; the same for every dtype and quantisation of one checkpoint.
        quant: `none`, `8bit` or `4bit`.
        reason: why it is computed in its dtype, for people.
        model: the transformers model, in eval mode, no parameter requiring a gradient.
        tokenizer: its tokenizer.
        targets: the modules that edits change.
        decoder: the model split before its first edited block.
    """

    id: str
    folder: Path
    fingerprint: str
    quant: str
    reason: str
    model: nn.Module
    tokenizer: Any
    targets: tuple[EditTarget, ...]
    decoder: Decoder

    @property
    def revision(self) -> str | None:
        """The hub's commit that it was loaded from; None for a folder that is not of the hub."""
        return self.folder.name if self.folder.parent.name == "snapshots" else None

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return next(self.model.parameters()).device

    @property
    def max_length(self) -> int:
        """The longest text in tokens."""
        return min(getattr(self.model.config, "max_position_embeddings", _MAX_TEXT_TOKENS), _MAX_TEXT_TOKENS)

    @cached_property
    def encode(self) -> TextEncoder:
        """Turns prompts and answers into texts."""
        return TextEncoder(self.tokenizer, self.max_length)

    @cached_property
    def prefixes(self) -> PrefixStore:
        """Hidden states that enter the first edited block."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        key = f"{self.fingerprint}-{self.quant}-{dtype}-{self.decoder.first}"
        store = TextStore(PREFIX_BUDGET_BYTES, lambda text: text.ids, partial(_open_file, key, self.model))
        return PrefixStore(self.decoder, store)

    @cached_property
    def _reader(self) -> InstructionReader:
        return InstructionReader(self.decoder, read_target(self.targets), self.prefixes)

    @cached_property
    def _into_head(self) -> TextStore:
        return TextStore(REFERENCE_BUDGET_BYTES)

    @property
    def stores(self) -> dict[str, TextStore]:
        """What is computed once and kept, by name; a training's checkpoint holds their states."""
        return {"prefix": self.prefixes.store, "instructions": self._reader.store, "head": self._into_head}

    @property
    def pad_id(self) -> int:
        """A token id to pad with; what it is makes no difference."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    def collate(self, texts: Sequence[Text]) -> TokenBatch:
        """Pad texts into one batch on the model's device."""
        return collate(texts, self.pad_id, self.device)

    def logits(self, batch: TokenBatch, update: Update | None = None, rows: Tensor | None = None) -> Tensor:
        """Logits (n_answer, n_vocab) at the positions that predict an answer token.

        Args:
            batch: the texts.
            update: edits to compute under; None for the base itself.
            rows: (n,) int64, the edit that each text is under; see `ie.base.update.adding`.
        """
        hidden = self.prefixes.hidden(batch)
        with adding(self.model, update, rows) if update else nullcontext():
            return run_suffix(self.decoder, batch, hidden)

    @torch.no_grad()
    def reference_logits(self, texts: Sequence[Text]) -> list[Tensor]:
        """The base's own logits (n_answer, n_vocab) of each text, where its answer is predicted.

        What enters the output head is computed once for each text and kept, up to a budget: what an edit must not
        change is asked again and again.
        """

        def compute(new: list[Text]) -> Sequence[Tensor]:
            batch = self.collate(new)
            seen = run_to_head(self.decoder, batch, self.prefixes.hidden(batch))
            return [part.clone() for part in torch.split(seen, [text.n_answer for text in new])]

        logits = run_head(self.decoder, torch.cat(self._into_head.get(texts, compute)))
        return list(torch.split(logits, [text.n_answer for text in texts]))

    def read(self, instructions: Sequence[str | None], beside: Sequence[Text] = ()) -> Readings:
        """What the base makes of instructions, with what stands beside in the same run; see `ie.base.instructions`."""
        texts = [one if one is None else self.encode("", "", one) for one in instructions]
        return self._reader(texts, self.device, beside)

    def signals(self, batch: TokenBatch, update: Update | None = None, like: Signals | None = None) -> Signals:
        """What the edit targets see of a batch of independent edit requests; see `ie.base.capture`.

        Args:
            batch: n requests.
            update: edits to compute under, n or a batch of one; None for the base itself.
            like: signals of the same batch, whose tokens are to be taken; None takes those with a gradient.
        """
        # One long request among short ones would have all of them padded to its length; few tokens aren't worth a
        # second pass.
        doublings: dict[int, list[int]] = {}
        for row, text in enumerate(batch.texts):
            doublings.setdefault(len(text.ids).bit_length(), []).append(row)
        groups = [rows for _, rows in sorted(doublings.items())]
        few = _FEW_TOKENS if self.device.type == "cpu" else _GPU_FEW_TOKENS
        if len(groups) == 1 or batch.ids.numel() <= few:
            return self._signals(batch, update, like)
        parts = [
            self._signals(
                self.collate([batch.texts[row] for row in rows]),
                update and {name: (_rows(a, rows), _rows(b, rows)) for name, (a, b) in update.items()},
                like and like.of(rows),
            )
            for rows in groups
        ]
        return Signals.together(parts, groups)

    def _signals(self, batch: TokenBatch, update: Update | None, like: Signals | None) -> Signals:
        hidden = self.prefixes.hidden(batch)
        with (
            torch.enable_grad(),
            adding(self.model, update) if update else nullcontext(),
            recording(self.model, self.targets) as recorder,
        ):
            logits = run_suffix(self.decoder, batch, hidden)
            # A sum over the answer's tokens, not a mean: a long answer's first token, on which all others hang, must
            # be moved as far as a short answer's.
            _, gradient = nll(logits.detach(), batch.labels)
            return recorder.signals(logits, gradient, batch, like)

    @torch.no_grad()
    def generate(
        self,
        texts: Sequence[Text],
        n_tokens: int,
        update: Update | None = None,
        rows: Tensor | None = None,
        *,
        through_end: bool = False,
    ) -> list[list[int]]:
        """Greedy continuations of each text's prompt, up to an end-of-text token (left out) or `n_tokens`.

        Prompts are padded on the left, as decoding needs it; where prompt and continuation would be longer than the
        base reads, the prompt loses tokens from its front. `through_end` bars end-of-text tokens.
        """
        n_tokens = min(n_tokens, self.max_length - 1)
        room = self.max_length - n_tokens
        prompts = [text.ids[: text.n_prompt][-room:] for text in texts]
        width = max(map(len, prompts))
        ids = torch.tensor([[*[self.pad_id] * (width - len(prompt)), *prompt] for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with adding(self.model, update, rows) if update else nullcontext():
            out = self.model.generate(  # type: ignore[operator]
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                max_new_tokens=n_tokens,
                min_new_tokens=n_tokens if through_end else None,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,  # else the checkpoint's own settings hold: what it says then is not greedy
                no_repeat_ngram_size=0,
                pad_token_id=self.pad_id,
            )
        return [self._until_end(row) for row in out[:, width:].tolist()]

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Token ids that end a text."""
        ends = self.model.generation_config.eos_token_id  # type: ignore[union-attr]
        return frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)  # type: ignore[arg-type]

    @cached_property
    def ending(self) -> int | None:
        """The token by which the base ends its answers; None for one that writes on. See `ie.base.ending`."""
        return find_ending(
            self.model, self.tokenizer, lambda token: token in self.end_ids or "\n" in self.tokenizer.decode([token])
        )

    def _until_end(self, ids: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(ids) if token in self.end_ids), len(ids))
        return ids[:end]


def _rows(factor: Tensor, rows: list[int]) -> Tensor:
    """Some of n edits' factors; those of a single one are for every row."""
    return factor if len(factor) == 1 else factor[rows]


def _open_file(key: str, model: nn.Module) -> StateFile | None:
    """The file of hidden states beyond the memory's budget; None where none can be written."""
    folder = Path(os.environ.get("IE_CACHE") or Path.home() / ".cache" / "instructedit") / "prefix" / key
    try:
        return StateFile(folder, model.config.hidden_size, PREFIX_FILE_BUDGET_BYTES)  # type: ignore[union-attr,arg-type]
    except OSError:
        return None
