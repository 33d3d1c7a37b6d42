"""Which precision to compute in on a CPU, found by measuring once.

Some CPUs multiply bf16 matrices several times as fast as fp32 ones. Their kernels are built anew for each new shape,
though, and the rest of a step is no faster: with small matrices little is gained (docs/experiments.md), and fp32, which
is exact, stays. Statistics, rates, updates and losses are fp32 in any case; beside a base in bf16 the hypernetwork's
products are bf16 too (`ie.editor.passes`).
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from ie.base.plan import Plan, meta_model
from ie.base.targets import find_targets

__all__ = ["product_seconds", "with_faster_dtype"]

_SMALL = 2**20  # weights of a matrix below which bf16 gains little
_N_TOKENS, _N_SHAPES, _N_TURNS = 256, 7, 3
_CPU = torch.device("cpu")
_WORTHWHILE = 0.7  # of fp32's time


def with_faster_dtype(plan: Plan, name: str) -> Plan:
    """The plan for a base model with the dtype that is faster on this CPU, and why; on a GPU or quantised, as it is.

    Args:
        plan: how it would be loaded.
        name: the base model.
    """
    if plan.device.type != "cpu" or plan.quant != "none":
        return plan
    target = max(find_targets(meta_model(name)), key=lambda one: one.d_in * one.d_out)
    size = f"{target.d_in} x {target.d_out}"
    if target.d_in * target.d_out < _SMALL:
        return replace(plan, reason=f"bf16 gains little with matrices of {size}")
    # In turns, as others may use this machine for a moment.
    turns = [
        [
            product_seconds(dtype, target.d_in, target.d_out, _CPU, _N_TOKENS + turn * _N_SHAPES)
            for dtype in (torch.bfloat16, torch.float32)
        ]
        for turn in range(_N_TURNS)
    ]
    fast, exact = map(min, zip(*turns, strict=True))
    share = fast / exact
    reason = f"a product with a matrix of {size} takes {share:.2f} of fp32's time in bf16 here"
    return replace(plan, dtype=torch.bfloat16 if share < _WORTHWHILE else torch.float32, reason=reason)


def product_seconds(
    dtype: torch.dtype, d_in: int, d_out: int, device: torch.device = _CPU, n_tokens: int = _N_TOKENS
) -> float:
    """The least time of a linear map of some tokens, each time of a number not seen before."""
    weight = torch.zeros(d_out, d_in, dtype=dtype, device=device)
    times = []
    for extra in range(_N_SHAPES):
        x = torch.zeros(n_tokens + extra, d_in, dtype=dtype, device=device)
        began = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)
