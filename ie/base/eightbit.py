"""Modules in 8 bits, as bitsandbytes stores them, multiplied in the dtype of what comes in.

bitsandbytes multiplies in int8: it rounds what comes in as well, all but the features with an outlier, which it looks
for in each module anew (LLM.int8(), arXiv 2208.07339); its gradient is that of the weights alone. On a GPU that is
some twenty kernels and several waits for each module, more than all else in a training step (benchmarks/README.md).
Here a module's weights are spread out for one product and forgotten, forwards and backwards, as in 4 bits: the memory
is the same, nothing but weights is rounded, and the gradient is that of what is computed.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["multiply_in_own_dtype"]


def multiply_in_own_dtype(model: nn.Module) -> None:
    """Let the 8-bit modules of a frozen model compute as if their weights were in the dtype of their input."""
    from bitsandbytes.nn.modules import Linear8bitLt  # here: loading it takes a while, and not all bases need it

    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            # Hooks that move inputs between devices keep what they call under another name.
            name = "_old_forward" if hasattr(module, "_old_forward") else "forward"
            setattr(module, name, MethodType(_forward, module))


def _forward(module: Any, x: Tensor) -> Tensor:
    if module.weight.CB is not None:  # where bitsandbytes keeps the weights until the first run
        module.init_8bit_state()
    product: Tensor = _Product.apply(x, module.state.CB, module.state.SCB)  # type: ignore[no-untyped-call]
    return product if module.bias is None else product + module.bias


class _Product(torch.autograd.Function):
    """x Wᵀ; W is made again for the gradient, so that no graph holds it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: Tensor, scales: Tensor) -> Tensor:
        ctx.steps, ctx.scales = steps, scales
        return nn.functional.linear(x, _weight(steps, scales, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ _weight(ctx.steps, ctx.scales, gradient.dtype), None, None


def _weight(steps: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(d_out, d_in) in `dtype`, of int8 `steps` and the float32 scale of 127 of them for each output."""
    return steps.to(dtype).mul_((scales / 127)[:, None])
