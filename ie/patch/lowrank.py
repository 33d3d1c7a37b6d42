"""Algebra of low-rank updates: picking one edit of a batch, summing edits, compressing without loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ie.base.update import Factors, Update

__all__ = ["compress", "select", "stack"]


def select(update: Update, index: int) -> dict[str, Factors]:
    """One edit out of a batch of edits, as a batch of one, without the rows that are zero."""
    chosen = {}
    for name, (a, b) in update.items():
        used = (b[index] != 0).any(-1)
        chosen[name] = (a[index][used][None], b[index][used][None])
    return chosen


def stack(updates: Sequence[Update]) -> dict[str, Factors]:
    """The sum of single edits, as a batch of one: factors are put on top of each other, so order makes no difference
    beyond rounding.
    """
    names = {name: None for update in updates for name in update}
    return {
        name: (
            torch.cat([update[name][0] for update in updates if name in update], 1),
            torch.cat([update[name][1] for update in updates if name in update], 1),
        )
        for name in names
    }


def compress(a: Tensor, b: Tensor, energy: float = 0.999, max_rank: int | None = None) -> Factors:
    """Factors of the smallest rank that keep a share of an update's energy.

    QR of both factors, then the singular values of the small core: exact, and never larger than the rank it starts
    from.

    Args:
        a: (r, d_in), b: (r, d_out): the factors of ΔW = BᵀA.
        b: see `a`.
        energy: the share of ‖ΔW‖² (squared Frobenius norm) to keep.
        max_rank: the largest rank to return; None for no bound.

    Returns:
        A (k, d_in) and B (k, d_out), float32, with k of 1 at least unless ΔW is zero.
    """
    q_a, r_a = torch.linalg.qr(a.double().T)
    q_b, r_b = torch.linalg.qr(b.double().T)
    left, values, right = torch.linalg.svd(r_b @ r_a.T)
    kept = values.square().cumsum(0)
    total = kept[-1] if len(kept) else torch.zeros(())
    if total == 0:
        return a.new_zeros(0, a.shape[1]).float(), b.new_zeros(0, b.shape[1]).float()
    rank = int((kept < energy * total).sum()) + 1
    rank = min(rank, len(values), max_rank or len(values))
    root = values[:rank].sqrt()
    return (
        (q_a @ right[:rank].T * root).T.float().contiguous(),
        (q_b @ left[:, :rank] * root).T.float().contiguous(),
    )
