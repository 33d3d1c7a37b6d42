"""What the benchmarks compare with does the same: its update, loss and gradient are ours."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.reference import Reference
from benchmarks.workload import moved_editor, regroup
from ie.base import Base
from ie.base.targets import is_transposed
from ie.base.update import Update
from ie.data.record import Record
from ie.editor.passes import FINER, FURTHER, propose, propose_in_use
from ie.training.episodes import Episodes, make_episodes
from ie.training.loss import backward
from tests.training.test_episodes import RECORDS

WEIGHT = 0.7


def episodes(n: int = 4) -> Episodes:
    return _made(RECORDS[:n], 1)


def _made(records: list[Record], seed: int) -> Episodes:
    rng = random.Random(seed)
    return make_episodes(records, rng, relations=None, told_share=1.0, plain_share=0.5, n_negatives=2)


def _held_equal(
    update: Update, base: Base, made: Episodes, reference: Reference, finer: int = 1, further: int = 0
) -> None:
    for index, request in enumerate(made.requests):
        for module, dense in reference.update(request, finer, further).items():
            ours = torch.einsum("ri,ro->io", update[module][0][index], update[module][1][index])
            ours = ours if is_transposed(base.model.get_submodule(module)) else ours.T
            # Sums of some hundred float32 products in another order; in use through up to two dozen passes.
            share, rtol = (1e-3, 1e-2) if further else (1e-6, 1e-4)
            torch.testing.assert_close(ours, dense.detach(), atol=share * dense.abs().max().item(), rtol=rtol)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_update_loss_and_gradient_are_the_reference_s(
    load: Callable[..., Base], checkpoint: Callable[..., Path], name: str
) -> None:
    base, made = load(name), episodes()
    editor = moved_editor(base, [made])
    reference = Reference(checkpoint(name), editor)
    with torch.no_grad():
        _, update = propose(base, editor, made.requests)
    _held_equal(update, base, made, reference)
    in_use = propose_in_use(base, editor, made.requests)
    _held_equal(in_use, base, made, reference, FINER, FURTHER * FINER * editor.settings.passes)

    theirs = [reference.loss(made, index) for index in range(len(made.requests))]
    gradients = [reference.gradients(made, index, WEIGHT) for index in range(len(made.requests))]
    found = backward(base, editor, made, WEIGHT)
    torch.testing.assert_close(found.edit, torch.stack([edit for edit, _ in theirs]).sum().detach(), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        # A KL near 0 is a sum of differences of log-probabilities near 10.
        found.locality,
        torch.stack([kept for _, kept in theirs]).sum().detach(),
        rtol=1e-4,
        atol=1e-6,
    )
    for parameter, *parts in zip(editor.parameters(), *gradients, strict=True):
        expected = torch.stack(parts).sum(0)
        assert parameter.grad is not None and expected.abs().max() > 0
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("chunk_tokens", [1, 64, 10_000])
def test_chunks_and_slices_change_nothing(
    load: Callable[..., Base], monkeypatch: pytest.MonkeyPatch, chunk_tokens: int
) -> None:
    base, made = load("gemma2"), episodes(8)
    whole, editor = moved_editor(base, [made]), moved_editor(base, [made])
    expected = backward(base, whole, made, WEIGHT)
    monkeypatch.setattr("ie.training.loss._CHUNK_TOKENS", chunk_tokens)
    monkeypatch.setattr("ie.base.likelihood._SLICE_LOGITS", 3 * base.model.config.vocab_size)
    found = backward(base, editor, made, WEIGHT)
    torch.testing.assert_close(found.edit, expected.edit, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.locality, expected.locality, rtol=1e-4, atol=1e-8)
    for ours, theirs in zip(editor.parameters(), whole.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        # Texts padded to other widths: attention sums in another order.
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4 * theirs.grad.abs().max().item())


def test_regrouped_episodes_are_the_same_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.workload.SETTINGS", type("S", (), {"batch_size": 4}))
    batches = [episodes(), _made(RECORDS[4:8], 2)]

    def whole(some: list[Episodes]) -> list[tuple[object, ...]]:
        return sorted(
            (
                batch.requests[edit].prompt,
                *sorted(ask.prompt for ask in batch.wanted if ask.edit == edit),
                *sorted(ask.prompt for ask in batch.kept if ask.edit == edit),
            )
            for batch in some
            for edit in range(4)
        )

    assert whole(regroup(batches)) == whole(batches)
    assert regroup(batches)[0].requests != batches[0].requests
