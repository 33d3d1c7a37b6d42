"""A run in two parts is a full run, for every architecture, and leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ie.base import Base
from ie.base.prefix import PrefixStore
from ie.base.statefile import StateFile
from ie.base.store import TextStore
from ie.base.suffix import run_head, run_prefix, run_suffix, run_to_head
from ie.data.tokens import TokenBatch
from tests.models import ARCHITECTURES

# Lengths differ, so rows are padded; the longest is longer than the sliding windows (8) of Mistral and Gemma 2.
TEXTS = (
    ("The lighthouse of Orm was built by", "Edda Falk"),
    ("Varn:", "Lissel"),
    ("Who wrote the song of the seven mills and who sang it at the ferry?", "a clerk"),
)


def batch_of(base: Base, texts: Sequence[tuple[str, str]] = TEXTS) -> TokenBatch:
    return base.collate([base.encode(prompt, answer) for prompt, answer in texts])


def full_run(base: Base, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Logits (n_answer, n_vocab) of the plain model, and the hidden states (n, t, d_model) that enter its head."""
    seen: list[Tensor] = []
    head = base.model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        logits = base.model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits
    handle.remove()
    return logits[batch.predicts], seen[0]


def suffix_run(base: Base, batch: TokenBatch, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the hidden states (n_answer, d_model) that enter the head."""
    seen: list[Tensor] = []
    head = base.model.get_output_embeddings()  # type: ignore[operator]
    with torch.no_grad():
        logits_of = head.register_forward_hook(lambda _, args, output: seen.append(args[0]))
        logits = run_suffix(base.decoder, batch, hidden)
        logits_of.remove()
    return logits, seen[0][0]


def methods(model: nn.Module) -> dict[str, Any]:
    """What a run may replace: instance forwards and hooks of every module."""
    return {
        name: (module.__dict__.get("forward"), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_suffix_run_is_the_full_run(load: Callable[..., Base], name: str) -> None:
    base = load(name)
    batch = batch_of(base)
    before = methods(base.model)
    logits, into_head = full_run(base, batch)
    found, found_into_head = suffix_run(base, batch, run_prefix(base.decoder, batch))
    assert torch.equal(found_into_head, into_head[batch.predicts])
    # The head sees fewer rows than in the full run: another blocking of its matrix product rounds otherwise.
    torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)
    assert methods(base.model) == before


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_changes_nothing(load: Callable[..., Base], name: str) -> None:
    base = load(name)
    batch = batch_of(base)
    assert not batch.mask.all()
    alone = [base.logits(batch_of(base, [text])) for text in TEXTS]
    # Batched attention and matrix products of other shapes sum in another order.
    torch.testing.assert_close(base.logits(batch), torch.cat(alone), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama"])
def test_the_suffix_skips_the_prefix_blocks(load: Callable[..., Base], name: str) -> None:
    base = load(name)
    batch = batch_of(base)
    hidden = run_prefix(base.decoder, batch)
    changed = base.logits(batch)
    found = run_suffix(base.decoder, batch, torch.zeros_like(hidden))
    assert (found - changed).abs().max() > 0.1  # what is put in is what is used
    ran: list[int] = []
    hooks = [
        next(block.children()).register_forward_hook(lambda *_, index=index: ran.append(index))
        for index, block in enumerate(base.decoder.blocks)
    ]
    try:
        run_suffix(base.decoder, batch, hidden)
        assert ran == list(range(base.decoder.first, len(base.decoder.blocks)))
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", ["gpt2", "gptj", "gemma2"])
def test_the_model_is_restored_after_an_exception(load: Callable[..., Base], name: str) -> None:
    base = load(name)
    batch = batch_of(base)
    before, logits = methods(base.model), base.logits(batch)
    hidden = run_prefix(base.decoder, batch)
    with pytest.raises(RuntimeError):
        run_suffix(base.decoder, batch, hidden[..., :-1])  # one feature is missing
    assert methods(base.model) == before
    assert torch.equal(base.logits(batch), logits)


def test_a_forward_of_its_own_is_put_back(load: Callable[..., Base]) -> None:
    base = load("llama")
    block = base.decoder.blocks[0]
    own = block.forward
    block.forward = own
    try:
        base.logits(batch_of(base))
        assert block.__dict__["forward"] is own
    finally:
        del block.__dict__["forward"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_enters_the_head_gives_the_logits_again(load: Callable[..., Base], name: str) -> None:
    base = load(name)
    batch = batch_of(base)
    before = methods(base.model)
    into_head = run_to_head(base.decoder, batch, run_prefix(base.decoder, batch))
    assert into_head.shape == (int(batch.predicts.sum()), base.model.config.hidden_size)
    # Scaling and soft caps behind the head (Gemma 2) included; the head's product has another shape.
    torch.testing.assert_close(run_head(base.decoder, into_head), base.logits(batch), atol=1e-5, rtol=1e-5)
    assert methods(base.model) == before


def test_reference_logits_are_kept(load: Callable[..., Base], monkeypatch: pytest.MonkeyPatch) -> None:
    base = load("gemma2")
    texts = batch_of(base).texts
    first = base.reference_logits(texts)
    assert [len(logits) for logits in first] == [text.n_answer for text in texts]
    torch.testing.assert_close(torch.cat(first), base.logits(batch_of(base)), atol=1e-5, rtol=1e-5)
    monkeypatch.setattr("ie.base.model.run_to_head", None)  # a second run of the blocks would fail
    assert torch.equal(torch.cat(base.reference_logits(texts)), torch.cat(first))


def store_of(base: Base, budget_bytes: int, file: Callable[[], StateFile | None] = lambda: None) -> PrefixStore:
    return PrefixStore(base.decoder, TextStore(budget_bytes, lambda text: text.ids, file))


class TestPrefixStore:
    def test_it_returns_what_a_fresh_run_does(self, load: Callable[..., Base]) -> None:
        base = load("llama")
        prefixes, batch = store_of(base, 2**20), batch_of(base)
        fresh = run_prefix(base.decoder, batch) * batch.mask[..., None]
        first = prefixes.hidden(batch)
        assert torch.equal(first, fresh)
        assert torch.equal(prefixes.hidden(batch), first)
        assert len(prefixes.store) == 3

    def test_kept_texts_join_new_ones_in_any_order(self, load: Callable[..., Base]) -> None:
        base = load("gpt2")
        prefixes = store_of(base, 2**20)
        prefixes.hidden(batch_of(base, TEXTS[:1]))
        batch = batch_of(base, (TEXTS[2], TEXTS[0], TEXTS[1], TEXTS[2]))
        fresh = run_prefix(base.decoder, batch) * batch.mask[..., None]
        # Texts were run in batches of other shapes.
        torch.testing.assert_close(prefixes.hidden(batch), fresh, atol=1e-6, rtol=1e-6)
        assert len(prefixes.store) == 3

    def test_it_respects_its_budget(self, load: Callable[..., Base]) -> None:
        base = load("llama")
        batch = batch_of(base)
        sizes = [len(text.ids) * 64 * 4 for text in batch.texts]
        prefixes = store_of(base, sizes[0] + sizes[1])
        fresh = prefixes.hidden(batch)
        assert (len(prefixes.store), prefixes.store.n_bytes) == (2, sizes[0] + sizes[1])
        assert torch.equal(prefixes.hidden(batch)[2], fresh[2])  # beyond the budget: computed again
        nothing = store_of(base, 0)
        assert torch.equal(nothing.hidden(batch), fresh)
        assert (len(nothing.store), nothing.store.n_bytes) == (0, 0)

    def test_a_file_that_keeps_nothing_is_opened_once(self, load: Callable[..., Base], tmp_path: Path) -> None:
        base, opened = load("llama"), []

        def file() -> StateFile:
            opened.append(StateFile(tmp_path, 64, 0))
            return opened[-1]

        prefixes, batch = store_of(base, 0, file), batch_of(base)
        fresh = prefixes.hidden(batch)
        assert torch.equal(prefixes.hidden(batch), fresh)
        assert (len(opened), len(prefixes.store), prefixes.store.n_file_bytes) == (1, 0, 0)

    def test_beyond_the_budget_a_file_keeps_bf16(
        self, load: Callable[..., Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base = load("llama")
        batch = batch_of(base)
        prefixes = store_of(base, len(batch.texts[0].ids) * 64 * 4, lambda: StateFile(tmp_path, 64, 2**20))
        fresh = prefixes.hidden(batch)
        n_tokens = sum(len(text.ids) for text in batch.texts[1:])
        assert (len(prefixes.store), prefixes.store.n_file_bytes) == (3, n_tokens * 64 * 2)
        monkeypatch.setattr("ie.base.prefix.run_prefix", None)  # a second run would fail
        again = prefixes.hidden(batch)
        assert torch.equal(again[0], fresh[0])
        assert torch.equal(again[1:], fresh[1:].bfloat16().float())
