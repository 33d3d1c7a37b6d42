"""Adding an update beside frozen modules is changing their dense weights, and leaves them as they were."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ie.base import Base
from ie.base.update import Update, adding, bounded, stacked
from ie.patch.lowrank import select, stack
from tests.dense import PROMPTS, edited, logits_of, random_update, state_hash
from tests.models import ARCHITECTURES


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_adding_is_a_dense_weight_change(load: Callable[..., Base], name: str) -> None:
    base = load(name)
    update = random_update(base)
    before = logits_of(base)
    with adding(base.model, update):
        found = logits_of(base)
    assert (found - before).abs().max() > 0.05
    # Float32: (x Aᵀ) B and x (AᵀB) round differently, and blocks after the first pass that on.
    torch.testing.assert_close(found, logits_of(base, edited(base, update)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_pick_their_edit(load: Callable[..., Base], name: str) -> None:
    base = load(name)
    update = random_update(base, n=3)
    rows = torch.tensor([2, 0, 2])
    with adding(base.model, update, rows):
        found = logits_of(base)
    for row, edit in enumerate(rows.tolist()):
        expected = logits_of(base, edited(base, update, edit))[row]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)  # float32, as above
    with adding(base.model, update):  # row i under edit i
        found = logits_of(base)
    torch.testing.assert_close(found[1], logits_of(base, edited(base, update, 1))[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n_stacks", [1, 2, 3, 5])
def test_stacked_edits_are_their_sum(n_stacks: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 3, 7, generator=generator), torch.randn(5, 3, 4, generator=generator)
    (sum_a, sum_b) = stacked({"m": (a, b)}, n_stacks)["m"]
    assert len(sum_a) == n_stacks
    for first in range(n_stacks):
        expected = sum((b[i].T @ a[i] for i in range(first, 5, n_stacks)), start=torch.zeros(4, 7))
        torch.testing.assert_close(sum_b[first].T @ sum_a[first], expected)


@pytest.mark.parametrize(("d_in", "d_out", "rank"), [(7, 4, 4), (4, 7, 4), (7, 4, 9), (4, 7, 9)])
def test_no_factor_has_a_higher_rank_than_its_module(d_in: int, d_out: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, rank, d_in, generator=generator), torch.randn(3, rank, d_out, generator=generator)
    new_a, new_b = bounded({"m": (a, b)})["m"]
    assert new_a.shape == (3, 4, d_in) and new_b.shape == (3, 4, d_out)
    torch.testing.assert_close(new_b.mT @ new_a, b.mT @ a, atol=1e-5, rtol=1e-5)  # float32


def empty(base: Base) -> Update:
    return {t.name: (torch.zeros(1, 0, t.d_in), torch.zeros(1, 0, t.d_out)) for t in base.targets}


@pytest.mark.parametrize("quant", ["none", "8bit", "4bit"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_an_empty_update_is_the_identity_bit_for_bit(load: Callable[..., Base], name: str, quant: str) -> None:
    base = load(name, quant)
    before = logits_of(base)
    zero = {k: (a, torch.zeros_like(b)) for k, (a, b) in random_update(base).items()}
    for update in ({}, empty(base), zero):
        with adding(base.model, update):
            assert torch.equal(logits_of(base), before)


@pytest.mark.parametrize("quant", ["none", "8bit", "4bit"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_leaving_restores_the_base_bit_for_bit(load: Callable[..., Base], name: str, quant: str) -> None:
    base = load(name, quant)
    before, state = logits_of(base), state_hash(base.model)
    with adding(base.model, random_update(base)):
        assert not torch.equal(logits_of(base), before)
    assert torch.equal(logits_of(base), before)
    with pytest.raises(ZeroDivisionError), adding(base.model, random_update(base)):
        logits_of(base)
        raise ZeroDivisionError
    assert torch.equal(logits_of(base), before)
    assert state_hash(base.model) == state


def test_a_module_that_is_not_there_leaves_no_hook(load: Callable[..., Base]) -> None:
    base = load("llama")
    update = {**random_update(base), "model.layers.9.mlp.up_proj": (torch.zeros(1, 1, 64), torch.zeros(1, 1, 96))}
    with pytest.raises(AttributeError), adding(base.model, update):
        pass
    assert not any(module._forward_hooks for module in base.model.modules())


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_two_updates_are_their_sum_in_any_order(load: Callable[..., Base], name: str) -> None:
    base = load(name)
    one, two = random_update(base, seed=1, size=0.02), random_update(base, rank=2, seed=2, size=0.02)
    del two[base.targets[0].name]  # type: ignore[attr-defined]
    found = []
    for update in (stack([one, two]), stack([two, one])):
        with adding(base.model, update):
            found.append(logits_of(base))
    # The order of a sum of five float32 terms; small updates, so that the blocks after do not blow it up.
    torch.testing.assert_close(found[0], found[1], atol=2e-6, rtol=1e-6)
    with adding(base.model, one), adding(base.model, two):  # nested: one after the other
        torch.testing.assert_close(logits_of(base), found[0], atol=2e-6, rtol=1e-6)
    twice = edited(base, one)
    for name_, (a, b) in two.items():
        module = twice.get_submodule(name_)
        change = a[0].T @ b[0]
        module.weight.data += change if type(module).__name__ == "Conv1D" else change.T  # type: ignore[operator]
    torch.testing.assert_close(found[0], logits_of(base, twice), atol=1e-5, rtol=1e-5)  # as for one update


@pytest.mark.parametrize(("name", "quant"), [("gpt2", "none"), ("llama", "none"), ("opt", "none"), ("llama", "4bit")])
def test_it_works_under_generate(load: Callable[..., Base], name: str, quant: str) -> None:
    base = load(name, quant)
    texts = [base.encode(prompt) for prompt in PROMPTS]
    update = random_update(base, n=2, size=0.5)
    rows = torch.tensor([1, 0, 1])
    together = base.generate(texts, 4, update, rows, through_end=True)
    assert together != base.generate(texts, 4, through_end=True)
    alone = [
        base.generate([text], 4, select(update, edit), through_end=True)[0]
        for text, edit in zip(texts, rows.tolist(), strict=True)
    ]
    assert together == alone


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation_is_that_of_the_dense_change(load: Callable[..., Base], name: str) -> None:
    base = load(name)
    update = random_update(base, size=0.5)
    texts = [base.encode(prompt) for prompt in PROMPTS]
    found = base.generate(texts, 6, update, through_end=True)
    model = edited(base, update)
    for text, ids in zip(texts, found, strict=True):
        whole = list(text.ids)
        for token in ids:  # greedy by hand, without a cache
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([whole])).logits[0, -1]
            logits[0] = -torch.inf  # no end of text
            assert logits.argmax() == token
            whole.append(token)
        assert len(ids) == 6


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_in_bfloat16_the_change_is_near_that_in_float32(load: Callable[..., Base], name: str) -> None:
    exact, half = load(name), load(name, "none", "bfloat16")
    update = random_update(exact)
    with adding(exact.model, update), adding(half.model, update):
        found, expected = logits_of(half), logits_of(exact)
    assert found.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: 0.4 % at every step, some ten steps.
    assert (found.float() - expected).norm() / expected.norm() < 0.04


@pytest.mark.parametrize("n_edits", [1, 3])
def test_a_module_may_answer_in_another_dtype_than_it_is_asked_in(n_edits: int) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    model[0].register_forward_hook(lambda _, args, output: output.double())
    x, (a, b) = torch.randn(3, 4, 8), (torch.randn(n_edits, 2, 8), torch.randn(n_edits, 2, 6))
    with torch.no_grad(), adding(model, {"0": (a, b)}):
        found = model(x)
    with torch.no_grad():
        expected = model(x) + (x @ a.mT @ b).double()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)  # products of ten terms in float32
