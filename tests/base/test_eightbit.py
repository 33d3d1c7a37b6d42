"""8-bit modules: products of their weights; beside bitsandbytes' own, and under another library's hooks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ie.base.eightbit import multiply_in_own_dtype
from ie.base.model import Base
from tests.dense import dequantised, logits_of

NAMES = ["gpt2", "llama"]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def stock(checkpoint: Callable[..., Path], name: str) -> nn.Module:
    """As bitsandbytes itself computes."""
    config = BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    options = {"quantization_config": config, "dtype": torch.float32, "device_map": {"": "cpu"}}
    return AutoModelForCausalLM.from_pretrained(checkpoint(name), **options).eval()  # type: ignore[no-any-return]


def eight_bit_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ == "Linear8bitLt"]


def test_logits_are_those_of_the_dequantised_weights(load: Callable[..., Base], name: str) -> None:
    base = load(name, "8bit")
    assert len(eight_bit_modules(base.model)) >= 16
    expected = logits_of(dequantised(load(name), base))
    torch.testing.assert_close(logits_of(base), expected, atol=1e-5, rtol=1e-5)


def test_bitsandbytes_itself_is_further_from_them(load: Callable[..., Base], stock: nn.Module, name: str) -> None:
    base, exact = load(name, "8bit"), logits_of(load(name))
    own, theirs = ((logits_of(base, model) - exact).norm() for model in (base.model, stock))
    assert 0 < own < 0.8 * theirs


def test_hooks_that_move_inputs_stay(load: Callable[..., Base], stock: nn.Module, name: str) -> None:
    base = load(name, "8bit")
    for module in eight_bit_modules(stock):
        add_hook_to_module(module, AlignDevicesHook("cpu"))
    multiply_in_own_dtype(stock)
    assert torch.equal(logits_of(base, stock), logits_of(base))
    calls = []
    first = eight_bit_modules(stock)[0]
    first._hf_hook.pre_forward = lambda module, *args, **kwargs: calls.append(module) or (args, kwargs)  # type: ignore[assignment, union-attr, func-returns-value]
    logits_of(base, stock)
    assert calls == [first]
