"""The low-rank update, the one form that every edit has.

A linear module with input u and output gradient δ changes by ΔW = BᵀA, with A (r, d_in) and B (r, d_out); B already
carries the minus sign and the rate of the update. Applied, the module's output y becomes y + (x Aᵀ) B. The base model
is never touched. A batch of n independent edits gives A and B a first dimension n.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Factors", "Update", "adding", "bounded", "on_top", "stacked", "whole"]

Factors = tuple[Tensor, Tensor]  # A (n, r, d_in), B (n, r, d_out)
Update = Mapping[str, Factors]  # by module path


@contextmanager
def adding(model: nn.Module, update: Update, rows: Tensor | None = None) -> Iterator[None]:
    """Let `model` compute as if edited, while the context lasts.

    Args:
        model: the base model; its weights are not changed.
        update: n edits' factors for each module.
        rows: (n_rows,) int64, which edit each row of a batch is under; None if row i is under edit i, or if there is
            a single edit and every row is under it.
    """
    handles = []
    try:
        for name, (a, b) in update.items():
            if a.shape[1]:
                handles.append(model.get_submodule(name).register_forward_hook(_adder(a, b, rows)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def on_top(update: Update, more: Update) -> dict[str, Factors]:
    """The sum of a batch of n edits, or of one for all, and another batch of n on the same modules."""
    return {
        name: (
            torch.cat((a.expand(len(more[name][0]), -1, -1), more[name][0]), 1),
            torch.cat((b.expand(len(more[name][1]), -1, -1), more[name][1]), 1),
        )
        for name, (a, b) in update.items()
    }


def stacked(update: Update, n_stacks: int) -> dict[str, Factors]:
    """Sums of edits: of a batch of n, edit i is part of sum i modulo `n_stacks`, as k blocks of r rows of it."""

    def rows(factor: Tensor) -> Tensor:
        factor = nn.functional.pad(factor, (0, 0, 0, 0, 0, -len(factor) % n_stacks))
        return factor.reshape(-1, n_stacks, *factor.shape[1:]).transpose(0, 1).flatten(1, 2)

    return {name: (rows(a), rows(b)) for name, (a, b) in update.items()}


def whole(change: Tensor) -> Factors:
    """ΔWᵀ (n, d_in, d_out) of n edits as factors of rank min(d_in, d_out), one of them the identity."""
    n, d_in, d_out = change.shape
    eye = torch.eye(min(d_in, d_out), dtype=change.dtype, device=change.device).expand(n, -1, -1)
    return (eye, change) if d_in <= d_out else (change.mT.contiguous(), eye)


def bounded(update: Update) -> dict[str, Factors]:
    """The same update in factors of no higher rank than its modules can have."""
    out = {}
    for name, (a, b) in update.items():
        out[name] = whole(a.mT @ b) if a.shape[1] > min(a.shape[2], b.shape[2]) else (a, b)
    return out


def _adder(a: Tensor, b: Tensor, rows: Tensor | None) -> Any:
    if rows is not None:
        a, b = a.index_select(0, rows), b.index_select(0, rows)  # its gradient is far cheaper than that of a[rows]

    def add(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # In the module's dtype, on its device: casting activations up costs more than the low-rank products themselves.
        x, into, out_of = args[0], a.to(args[0]), b.to(output)
        # OPT flattens (rows, tokens) before its MLP; the leading rows are recovered from the factors.
        low = torch.bmm(x.reshape(len(into), -1, x.shape[-1]), into.mT).to(output.dtype)
        return torch.baddbmm(output.reshape(len(into), -1, output.shape[-1]), low, out_of).view_as(output)

    return add
