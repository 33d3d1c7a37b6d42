"""What is read of an instruction, against a whole run of the model on it alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ie.base import Base
from ie.base.targets import read_target
from tests.models import ARCHITECTURES

INSTRUCTIONS = (
    "Task: people\nDescription: Change who somebody works for, and leave everything else as it is.",
    None,
    "Move the town.",
)


def whole_run(base: Base, instruction: str) -> Tensor:
    """Mean input (d_in,) of the last block's first edit target over the tokens of one instruction."""
    seen: list[Tensor] = []
    module = base.model.get_submodule(read_target(base.targets).name)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        base.model(input_ids=torch.tensor([base.encode("", "", instruction).ids]), use_cache=False)
    handle.remove()
    return seen[0].float().mean(0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_readings_are_means_of_a_whole_run(load: Callable[..., Base], name: str) -> None:
    base = load(name)
    readings = base.read(INSTRUCTIONS)
    assert readings.given.tolist() == [True, False, True]
    for row, instruction in enumerate(INSTRUCTIONS):
        wanted = torch.zeros(readings.inputs.shape[1]) if instruction is None else whole_run(base, instruction)
        # Float32, padded to the longer instruction: sums in another order.
        torch.testing.assert_close(readings.inputs[row], wanted, atol=1e-5, rtol=1e-4)


def test_an_instruction_is_read_once(load: Callable[..., Base], monkeypatch: pytest.MonkeyPatch) -> None:
    base = load("gpt2")
    first = base.read(INSTRUCTIONS)
    monkeypatch.setattr("ie.base.instructions.run_to_head", None)  # a second run of the blocks would fail
    again = base.read([*reversed(INSTRUCTIONS), INSTRUCTIONS[0]])
    assert torch.equal(again.inputs, first.inputs[[2, 1, 0, 0]])


def test_no_instruction_at_all(load: Callable[..., Base]) -> None:
    readings = load("llama").read([None])
    assert not readings.given.any() and not readings.inputs.any()
