"""Passes against a slow reference: one request at a time, each pass on a dense copy of the model as edited so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ie.base import Base
from ie.base.update import Factors, on_top
from ie.editor import Editor, EditorSettings, EditRequest
from ie.editor.methods import editor_method, update_under
from ie.editor.passes import FINER, FURTHER, finer_in_use, observe, propose
from ie.editor.request import collate_requests
from tests.dense import edited, random_update, rebased, tell_apart
from tests.models import ARCHITECTURES

INSTRUCTION = "Task: people\nDescription: Change who somebody works for."
OTHER_INSTRUCTION = "Task: places\nDescription: Move a town."
REQUESTS = (
    EditRequest("The lighthouse of Orm was built by", "Edda Falk"),
    EditRequest("Varn:", "Lissel", INSTRUCTION),
    EditRequest("Who wrote the song of the seven mills?", "a clerk", INSTRUCTION),
)


def moved(base: Base, **settings: object) -> Editor:
    """A fitted editor with no parameter at its start."""
    torch.manual_seed(0)
    shape = {"rank": 4, "rate": 0.002, "opening_share": 0.3, "passes": 3, **settings}
    editor = Editor(base.targets, EditorSettings.model_validate(shape).for_tasks(2))
    observe(base, editor, REQUESTS)
    tell_apart(base, editor, INSTRUCTION, OTHER_INSTRUCTION)
    editor.fit()
    with torch.no_grad():
        for parameter in editor.networks.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return editor


def dense(update: Mapping[str, Factors], index: int) -> dict[str, Tensor]:
    return {name: b[index].T @ a[index] for name, (a, b) in update.items()}


def kinds_of(base: Base, editor: Editor, request: EditRequest) -> Tensor:
    assert editor.kinds is not None
    return editor.kinds(base.read([request.instruction]))


@torch.no_grad()
def reference(
    base: Base, editor: Editor, request: EditRequest, kinds: Tensor | None = None, finer: int = 1, further: int = 0
) -> dict[str, Factors]:
    """The sum of passes, each with the signals of a copy of the model whose weights hold those before it; the further
    ones only while that copy would not write the target.
    """
    batch = collate_requests(base, [EditRequest(request.prompt, request.target)])
    kinds = kinds_of(base, editor, request) if kinds is None else kinds
    update = {name: (a, b / finer) for name, (a, b) in editor.update(base.signals(batch), kinds).items()}
    n_passes = finer * editor.settings.passes
    for number in range(1, n_passes + further):
        so_far = rebased(base, edited(base, update))
        if number >= n_passes and torch.equal(so_far.logits(batch).argmax(-1), batch.labels):
            break
        step = editor.update(so_far.signals(batch), kinds)
        update = {name: (a, b + step[name][1] / finer) for name, (a, b) in update.items()}
    return update


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name in ("gpt2", "llama", "opt", "qwen3")])
def test_passes_are_those_of_dense_models_one_request_at_a_time(load: Callable[..., Base], name: str) -> None:
    base = load(name)
    editor = moved(base)
    _, update = propose(base, editor, REQUESTS)
    for edit, request in enumerate(REQUESTS):
        for module, change in dense(reference(base, editor, request), 0).items():
            found = dense(update, edit)[module].detach()
            # Float32 through three passes, in batches of other shapes.
            torch.testing.assert_close(found, change, rtol=1e-2, atol=1e-3 * change.abs().max().item())


def test_joint_edits_and_those_of_one_pass_take_as_many_passes_as_in_training() -> None:
    assert [finer_in_use("instructedit-joint", 2), finer_in_use("mend", 1), finer_in_use("mend", 2)] == [1, 1, FINER]


def test_a_trained_editor_takes_more_and_shorter_passes_unless_it_takes_one(load: Callable[..., Base]) -> None:
    base = load("llama")
    for passes, finer, further in ((2, FINER, FURTHER * FINER * 2), (1, 1, 0)):
        editor = moved(base, passes=passes)
        update = editor_method(editor)(base, REQUESTS)
        for edit, request in enumerate(REQUESTS):
            expected = reference(base, editor, request, finer=finer, further=further)
            for module, change in dense(expected, 0).items():
                close = {"rtol": 1e-2, "atol": 1e-3 * change.abs().max().item()}
                torch.testing.assert_close(dense(update, edit)[module], change, **close)


@pytest.mark.parametrize(("so_far", "rate"), [(False, 0.002), (True, 0.001)])
def test_edits_go_on_until_they_take_and_no_further(load: Callable[..., Base], so_far: bool, rate: float) -> None:
    base = load("llama")
    editor = moved(base, passes=2, rate=rate)
    under = random_update(base, size=0.1) if so_far else None
    with torch.no_grad():
        _, plain = propose(base, editor, REQUESTS, under, finer=FINER)
    update = update_under(base, editor, REQUESTS, under)

    def took(made: Mapping[str, Factors]) -> list[bool]:
        batch = collate_requests(base, [EditRequest(one.prompt, one.target) for one in REQUESTS])
        together = on_top(under, made) if under else made
        right = base.logits(batch, together, torch.arange(len(REQUESTS))).argmax(-1) == batch.labels
        return [bool(right[batch.rows == row].all()) for row in range(len(REQUESTS))]

    assert any(took(plain)) and not all(took(plain)) and all(took(update))
    for name, (a, b) in update.items():
        assert torch.equal(a, plain[name][0])
        for row, left_alone in enumerate(took(plain)):
            assert torch.equal(b[row], plain[name][1][row]) is left_alone


def test_each_pass_goes_equally_far(load: Callable[..., Base]) -> None:
    """Without a network the deltas of every pass have one size, however likely the target has become."""
    base = load("llama")
    shape = {"n_layers": 0, "opening_share": 1.0}
    made = [propose(base, moved(base, passes=n, rate=0.05 * n, **shape), REQUESTS[:1])[1] for n in (2, 3, 4)]
    for before, after in pairwise(made):
        steps = [after[name][1] - before[name][1] for name in before]
        n_values = sum(step.numel() for step in steps)
        size = sum(float(step.detach().square().sum()) for step in steps) / n_values
        assert size == pytest.approx(0.05**2, rel=1e-3)  # a difference of float32 sums


def test_the_rank_does_not_grow_with_passes(load: Callable[..., Base]) -> None:
    base = load("gpt2")
    (seen, one), (_, three) = (propose(base, moved(base, passes=passes), REQUESTS) for passes in (1, 3))
    for name, (a, b) in three.items():
        assert a.shape == one[name][0].shape and b.shape == one[name][1].shape
        assert a.shape[1] == int(torch.bincount(seen.modules[name].edit).max())


def test_the_instruction_opens_parts_for_its_own_edit_alone(load: Callable[..., Base]) -> None:
    base = load("llama")
    editor = moved(base)
    told = [EditRequest(one.prompt, one.target, INSTRUCTION) for one in REQUESTS]
    other = [told[0], replace(told[1], instruction=OTHER_INSTRUCTION), told[2]]
    before, after = (propose(base, editor, requests)[1] for requests in (told, other))
    for name in before:
        for index, same in enumerate((True, False, True)):
            left, right = dense(before, index)[name], dense(after, index)[name]
            near = torch.allclose(left, right, rtol=1e-2, atol=1e-4 * left.abs().max().item())
            assert near is same, (name, index)


def test_passes_far_beyond_the_target_stay_finite(load: Callable[..., Base]) -> None:
    """No gradient, nothing to scale up: tokens stay the first pass's, values finite."""
    base = load("gpt2")
    editor = moved(base, rate=1e3)  # far beyond: probabilities of exactly 0 and 1
    _, update = propose(base, editor, REQUESTS)
    assert all(factor.isfinite().all() for pair in update.values() for factor in pair)


def test_on_a_model_as_edited_so_far(load: Callable[..., Base]) -> None:
    base = load("qwen3")
    editor, so_far = moved(base), random_update(base)
    _, update = propose(base, editor, REQUESTS[:2], so_far)
    under = rebased(base, edited(base, so_far))
    for edit, request in enumerate(REQUESTS[:2]):
        kinds = kinds_of(base, editor, request)  # an instruction says the same whatever was edited before
        for module, change in dense(reference(under, editor, request, kinds), 0).items():
            found = dense(update, edit)[module].detach()
            torch.testing.assert_close(found, change, rtol=1e-2, atol=1e-3 * change.abs().max().item())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_beside_a_base_in_bf16_products_are_rounded_and_updates_are_not(
    load: Callable[..., Base], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load(name, dtype="bfloat16")
    editor = moved(base)
    _, update = propose(base, editor, REQUESTS)
    monkeypatch.setattr("torch.autocast", lambda *_, **__: nullcontext())
    _, exact = propose(base, editor, REQUESTS)
    for key, factors in update.items():
        for found, expected in zip(factors, exact[key], strict=True):
            assert found.dtype == torch.float32
            difference = float((found - expected).detach().norm() / expected.detach().norm())
            assert 0 < difference < 0.05, key
