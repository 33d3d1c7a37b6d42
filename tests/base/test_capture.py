"""Signals against autograd: what passes a module, and the loss's gradient at its output."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ie.base import Base
from ie.base.capture import recording, row_mean
from ie.editor.request import EditRequest, collate_requests
from tests.dense import dense_gradients, dequantised, random_update, state_hash
from tests.models import ARCHITECTURES

INSTRUCTION = "Task: people\nDescription: Change who somebody works for."
REQUESTS = (
    EditRequest("The lighthouse of Orm was built by", "Edda Falk"),
    EditRequest("Varn:", "Lissel"),
    EditRequest("Who wrote the song of the seven mills?", "a clerk", INSTRUCTION),
)


def full_signals(base: Base, request: EditRequest) -> dict[str, tuple[Tensor, Tensor]]:
    """u (t, d_in) and δ (t, d_out) of one request from a full run of a trainable copy, all tokens."""
    model = copy.deepcopy(base.model).requires_grad_(True)
    text = base.encode(request.prompt, request.target, request.instruction)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for target in base.targets:

        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = target.name) -> None:
            output.retain_grad()
            seen[name] = (args[0].detach(), output)

        model.get_submodule(target.name).register_forward_hook(keep)
    ids = torch.tensor([text.ids])
    logits = model(input_ids=ids, use_cache=False).logits[0, text.n_prompt - 1 : -1]
    nn.functional.cross_entropy(logits, ids[0, text.n_prompt :], reduction="sum").backward()  # type: ignore[no-untyped-call]
    out = {}
    for name, (u, y) in seen.items():
        assert y.grad is not None
        out[name] = (u.reshape(len(text.ids), -1), y.grad.reshape(len(text.ids), -1))
    return out


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_signals_are_those_of_a_full_run_and_its_backward_pass(load: Callable[..., Base], name: str) -> None:
    base = load(name)
    signals = base.signals(collate_requests(base, REQUESTS))
    assert signals.n_edits == len(REQUESTS)
    for edit, request in enumerate(REQUESTS):
        n_instruction = base.encode(request.prompt, request.target, request.instruction).n_instruction
        for module, (u, delta) in full_signals(base, request).items():
            found = signals.modules[module]
            kept = (delta != 0).any(-1)
            kept[:n_instruction] = False
            own = found.edit == edit
            assert own.sum() == kept.sum() > 0
            # Float32, other batch shapes: sums in another order.
            torch.testing.assert_close(found.u[own], u[kept], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found.delta[own], delta[kept], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_signals_sum_to_the_dense_weight_gradient(load: Callable[..., Base], name: str) -> None:
    base = load(name)
    signals = base.signals(collate_requests(base, REQUESTS[:1]))
    (gradients,) = dense_gradients(base, [(REQUESTS[0].prompt, REQUESTS[0].target, None)])
    start = base.encode(REQUESTS[0].prompt, REQUESTS[0].target).n_instruction
    assert start == (1 if name == "llama" else 0)  # llama: the beginning-of-text token does not enter
    lead = full_signals(base, REQUESTS[0])
    for module, found in signals.modules.items():
        u, delta = lead[module]
        whole = found.delta.T @ found.u + delta[:start].T @ u[:start]
        # Float32 sums of some ten terms of size 1e-1.
        torch.testing.assert_close(whole, gradients[module], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_edits_are_ascending_and_tokens_stay_in_order(load: Callable[..., Base], name: str) -> None:
    for found in load(name).signals(collate_requests(load(name), REQUESTS)).modules.values():
        assert torch.equal(found.edit, found.edit.sort().values)
        assert len(found.u) == len(found.delta) == len(found.edit)
        assert found.u.dtype == found.delta.dtype == torch.float32
        assert not found.u.requires_grad and not found.delta.requires_grad


def test_tokens_of_the_instruction_stay_out(load: Callable[..., Base]) -> None:
    base = load("gpt2")
    request = EditRequest("Who wrote the song?", "a clerk", INSTRUCTION)
    text = base.encode(request.prompt, request.target, request.instruction)
    first = base.signals(collate_requests(base, [request])).modules[base.targets[0].name]
    # In the first edited block every editable token but the last, which predicts nothing, has a gradient.
    assert len(first.u) == len(text.ids) - text.n_instruction - 1
    plain = base.signals(collate_requests(base, [EditRequest(request.prompt, request.target)]))
    assert (first.u[-1] - plain.modules[base.targets[0].name].u[-1]).abs().max() > 1e-3  # yet they are read


def test_only_predicting_tokens_reach_the_last_block(load: Callable[..., Base]) -> None:
    base = load("gpt2")
    batch = collate_requests(base, REQUESTS)
    last = base.signals(batch).modules[base.targets[-1].name]
    assert torch.equal(torch.bincount(last.edit), torch.bincount(batch.rows))


@pytest.mark.parametrize("quant", ["8bit", "4bit"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_signals_of_a_quantised_base_are_those_of_its_dequantised_weights(
    load: Callable[..., Base], name: str, quant: str
) -> None:
    base = load(name, quant)
    dense = dequantised(load(name), base)
    found = base.signals(collate_requests(base, REQUESTS))
    expected = dense.signals(collate_requests(dense, REQUESTS))
    for module, one in found.modules.items():
        assert one.u.isfinite().all() and one.delta.isfinite().all()
        other = expected.modules[module]
        assert torch.equal(one.edit, other.edit)
        limit = 1e-4  # the same weights, float32 rounding
        assert (one.u - other.u).norm() < limit * other.u.norm()
        assert (one.delta - other.delta).norm() < limit * other.delta.norm()


def test_capturing_leaves_no_trace(load: Callable[..., Base]) -> None:
    base = load("llama")
    before = state_hash(base.model)
    base.signals(collate_requests(base, REQUESTS))
    assert state_hash(base.model) == before
    assert all(parameter.grad is None for parameter in base.model.parameters())
    assert not any(module._forward_hooks for module in base.model.modules())


def test_hooks_go_after_an_exception(load: Callable[..., Base]) -> None:
    base = load("llama")
    with pytest.raises(KeyError), recording(base.model, base.targets):
        raise KeyError
    assert not any(module._forward_hooks for module in base.model.modules())


def test_row_mean_is_a_mean_for_each_row() -> None:
    assert row_mean(torch.tensor([1.0, 3.0]), torch.tensor([1, 1]), 2).tolist() == [0.0, 2.0]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_requests_of_other_lengths_change_nothing(load: Callable[..., Base], name: str) -> None:
    """Long and short ones are run apart, also on an edited model and with another's tokens."""
    base = load(name)
    long = EditRequest(" ".join([REQUESTS[0].prompt] * 12), REQUESTS[0].target)
    requests = [REQUESTS[1], long, REQUESTS[0], EditRequest("Varn:", "a clerk", INSTRUCTION), long]
    update = random_update(base, n=len(requests))
    assert collate_requests(base, requests).ids.numel() > 512  # or they'd be run together
    first = base.signals(collate_requests(base, requests))
    for found, edits in ((first, None), (base.signals(collate_requests(base, requests), update, like=first), update)):
        for edit, request in enumerate(requests):
            own = edits and {module: (a[edit][None], b[edit][None]) for module, (a, b) in edits.items()}
            alone = base.signals(collate_requests(base, [request]), own)
            for module, one in found.of([edit]).modules.items():
                expected = alone.modules[module]
                assert torch.equal(one.position, expected.position) and torch.equal(one.opening, expected.opening)
                torch.testing.assert_close(one.u, expected.u, atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(one.delta, expected.delta, atol=1e-5, rtol=1e-3)
    assert all(torch.equal(one.edit, one.edit.sort().values) for one in first.modules.values())
    assert sum(one.opening.sum() for one in first.modules.values()) == len(requests) * len(base.targets)
