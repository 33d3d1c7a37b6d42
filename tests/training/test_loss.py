"""The outer loss of edits that are in force together: against autograd straight through dense sums, query by query."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ie.base import Base
from ie.base.asking import Ask
from ie.base.capture import Signals
from ie.base.update import Update
from ie.editor.editor import JOINT, Editor, EditorSettings, Method
from ie.editor.passes import propose
from ie.editor.request import EditRequest, collate_requests, plain
from ie.training.episodes import Episodes, make_episodes
from ie.training.loss import backward
from tests.dense import dense_joint, tell_apart
from tests.training.test_episodes import RECORDS

WEIGHT = 0.7


def episodes(n: int) -> Episodes:
    rng = random.Random(0)
    return make_episodes(RECORDS[:n], rng, relations=None, told_share=1.0, plain_share=0.5, n_negatives=1)


def moved(base: Base, signals: Signals, method: Method, passes: int = 1) -> Editor:
    """An editor with no parameter at its start."""
    torch.manual_seed(0)
    rate = 0.1 if passes == 1 else 0.005  # further, and a second pass would see little but rounding
    shape = EditorSettings(method=method, rank=8, rate=rate, passes=passes).for_tasks(2)
    editor = Editor(base.targets, shape)
    editor.observe(signals)
    tell_apart(base, editor, "Task: one", "Task: two")
    editor.fit()
    with torch.no_grad():
        for parameter in editor.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return editor


def dense_sums(base: Base, editor: Editor, requests: Sequence[EditRequest], n_stacks: int) -> list[Update]:
    """Each stack's BᵀA of all its edits."""
    _, update = propose(base, editor, requests)
    out = []
    for stack in range(n_stacks):
        changes = {
            name: torch.einsum("nri,nro->io", a[stack::n_stacks], b[stack::n_stacks]) for name, (a, b) in update.items()
        }
        out.append({name: (torch.eye(len(change))[None], change[None]) for name, change in changes.items()})
    return out


def assert_agrees(
    base: Base, editor: Editor, made: Episodes, update_of: Callable[[int], Update], tolerance: float = 1e-3
) -> None:
    """Loss and gradient are those of autograd through each edit's dense update; `tolerance` of the largest entry."""
    found = backward(base, editor, made, WEIGHT)
    gradients = [parameter.grad for parameter in editor.parameters()]
    editor.zero_grad()

    def logits(ask: Ask, edited: bool) -> tuple[Tensor, Tensor]:
        batch = base.collate([base.encode(ask.prompt, ask.answer, ask.instruction)])
        return base.logits(batch, update_of(ask.edit) if edited else None).log_softmax(-1), batch.labels

    edit = torch.zeros(())
    for ask in made.wanted:
        after, labels = logits(ask, True)
        edit = edit - after.gather(-1, labels[:, None]).sum() / len(made.wanted)
    kept = torch.zeros(())
    for ask in made.kept:
        before, after = logits(ask, False)[0].detach(), logits(ask, True)[0]
        kept = kept + (before.exp() * (before - after)).sum(-1).mean() / len(made.kept)
    (edit + WEIGHT * kept).backward()

    # Float32 sums in another order; a KL near 0 is a sum of differences of log-probabilities near 10.
    torch.testing.assert_close(found.edit, edit.detach(), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.locality, kept.detach(), rtol=1e-3, atol=1e-6)
    for gradient, (where, parameter) in zip(gradients, editor.named_parameters(), strict=True):
        assert gradient is not None and parameter.grad is not None, where
        assert parameter.grad.abs().max() > 0, where
        largest = parameter.grad.abs().max().item()
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-2, atol=tolerance * largest)


# Few tokens are solved in the dual form, many in the primal one.
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("n_edits", [2, 12])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_gradient_reaches_editor_and_regularisation_through_the_solve(
    load: Callable[..., Base], name: str, n_edits: int, passes: int
) -> None:
    base, made = load(name), episodes(n_edits)
    editor = moved(base, base.signals(collate_requests(base, plain(made.requests))), JOINT, passes)
    changes = dense_joint(base, editor, made.requests, editor.regularisations())
    update = {name: (torch.eye(len(change))[None], change.float()[None]) for name, change in changes.items()}
    assert_agrees(base, editor, made, lambda edit: update, 3e-3)  # the solve amplifies the products' rounding


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_stacked_edits_are_asked_under_their_sum(load: Callable[..., Base], name: str) -> None:
    base, made = load(name), replace(episodes(5), n_stacks=2)
    editor = moved(base, base.signals(collate_requests(base, plain(made.requests))), "instructedit")
    updates = dense_sums(base, editor, made.requests, 2)
    assert_agrees(base, editor, made, lambda edit: updates[edit % 2])


def test_edits_of_few_and_of_many_tokens_in_a_batch(load: Callable[..., Base]) -> None:
    base, made = load("gpt2"), episodes(4)
    long = replace(made.requests[1], prompt="Of the rivers that were ever seen from a tower, " * 3 + "the first is the")
    made.requests[1] = long
    made.wanted.append(Ask(long.prompt, long.target, None, 1, ended=True))
    editor = moved(base, base.signals(collate_requests(base, plain(made.requests))), "instructedit")
    ranks = propose(base, editor, made.requests)[0].n_tokens()
    assert ranks[1] > 32 >= max(ranks[0], *ranks[2:])
    updates = dense_sums(base, editor, made.requests, 4)
    assert_agrees(base, editor, made, lambda edit: updates[edit])
