"""Which precision to train in, found by measuring once.

Some CPUs multiply bf16 matrices several times as fast as fp32 ones. Their kernels are built anew for each new shape,
though, and the rest of a step is no faster: with small matrices nothing is gained (benchmarks/README.md), and fp32 it
stays. Statistics, rates, update and losses are fp32 in any case.
"""

from __future__ import annotations

import time

import torch

from ie.base.load import Plan, meta_model
from ie.base.targets import find_targets

__all__ = ["training_dtype"]

_SMALL = 2**20  # weights of a matrix below which bf16 gains nothing
_N_TOKENS, _N_SHAPES = 256, 7
_WORTHWHILE = 0.7  # of fp32's time


def training_dtype(name: str, plan: Plan) -> tuple[str, str]:
    """The name of the dtype to load a base model in for training, and why.

    Args:
        name: the base model.
        plan: how it would be loaded; another device than the CPU, or a quantised base, keeps its dtype.
    """
    if plan.device.type != "cpu" or plan.quant != "none":
        return str(plan.dtype).removeprefix("torch."), plan.reason
    target = max(find_targets(meta_model(name)), key=lambda one: one.d_in * one.d_out)
    size = f"{target.d_in} x {target.d_out}"
    if target.d_in * target.d_out < _SMALL:
        return "float32", f"bf16 gains nothing with matrices of {size}"
    share = _seconds(torch.bfloat16, target.d_in, target.d_out) / _seconds(torch.float32, target.d_in, target.d_out)
    chosen = "bfloat16" if share < _WORTHWHILE else "float32"
    return chosen, f"a product with a matrix of {size} takes {share:.2f} of fp32's time in bf16 here"


def _seconds(dtype: torch.dtype, d_in: int, d_out: int) -> float:
    """The least time of a linear map of some tokens, each time of a number not seen before."""
    weight = torch.zeros(d_out, d_in, dtype=dtype)
    times = []
    for extra in range(_N_SHAPES):
        x = torch.zeros(_N_TOKENS + extra, d_in, dtype=dtype)
        began = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        times.append(time.perf_counter() - began)
    return min(times)
