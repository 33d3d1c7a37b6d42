"""The dtype of a base on a CPU: fp32 for small matrices, else what was measured to be faster; elsewhere as planned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ie.base import precision
from ie.base.plan import plan_load
from ie.base.precision import with_faster_dtype


def test_small_matrices_stay_in_fp32(checkpoint: Callable[..., Path]) -> None:
    plan = with_faster_dtype(plan_load("none", device="cpu"), str(checkpoint("gpt2")))
    assert plan.dtype == torch.float32 and "64 x" in plan.reason


@pytest.mark.parametrize(("bf16_s", "chosen"), [(0.69, torch.bfloat16), (0.71, torch.float32)])
def test_large_ones_take_what_is_faster(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, bf16_s: float, chosen: torch.dtype
) -> None:
    monkeypatch.setattr(precision, "_SMALL", 1)
    monkeypatch.setattr(precision, "product_seconds", lambda dtype, *sizes: bf16_s if dtype == torch.bfloat16 else 1.0)
    plan = with_faster_dtype(plan_load("none", device="cpu"), str(checkpoint("llama")))
    assert plan.dtype == chosen and f"{bf16_s:.2f}" in plan.reason


def test_a_moment_of_load_does_not_decide(checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    bf16 = iter([3.0, 0.5, 0.6])
    monkeypatch.setattr(precision, "_SMALL", 1)
    monkeypatch.setattr(precision, "product_seconds", lambda dtype, *_: next(bf16) if dtype == torch.bfloat16 else 1.0)
    plan = with_faster_dtype(plan_load("none", device="cpu"), str(checkpoint("llama")))
    assert plan.dtype == torch.bfloat16 and "0.50" in plan.reason


def test_it_measures_this_machine() -> None:
    assert precision.product_seconds(torch.float32, 256, 256) > 0
    assert precision.product_seconds(torch.bfloat16, 256, 256) > 0


def test_a_quantised_base_keeps_its_dtype(checkpoint: Callable[..., Path]) -> None:
    plan = plan_load("8bit", device="cpu")
    assert with_faster_dtype(plan, str(checkpoint("gpt2"))) == plan
