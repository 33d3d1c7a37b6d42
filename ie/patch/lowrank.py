"""Algebra of low-rank updates: picking one edit of a batch, summing edits, compressing without loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ie.base.update import Factors, Update

__all__ = ["compress", "energy_kept", "norm", "select", "side_by_side", "stack"]


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


def side_by_side(updates: Sequence[Update]) -> dict[str, Factors]:
    """Single edits as one batch of edits, so that each question can be asked under its own; missing rows are zero."""
    names = {name: None for update in updates for name in update}
    batch = {}
    for name in names:
        like = next(update[name] for update in updates if name in update)
        rank = max(update[name][0].shape[1] for update in updates if name in update)
        batch[name] = tuple(
            torch.stack(
                [
                    torch.nn.functional.pad(update[name][side][0], (0, 0, 0, rank - update[name][side].shape[1]))
                    if name in update
                    else like[side].new_zeros(rank, like[side].shape[2])
                    for update in updates
                ]
            )
            for side in (0, 1)
        )
    return batch  # type: ignore[return-value]


def norm(a: Tensor, b: Tensor) -> Tensor:
    """Frobenius norm of BᵀA, () float64, without forming it: ‖BᵀA‖² is the sum of (AAᵀ) ∘ (BBᵀ).

    Args:
        a: (r, d_in), b: (r, d_out).
        b: see `a`.
    """
    a, b = a.double(), b.double()  # what remains of a difference of two updates cancels in fp32
    if len(a) ** 2 > a.shape[1] * b.shape[1]:  # of a huge rank the product is smaller than the Gram matrices
        dense: Tensor = torch.linalg.matrix_norm(b.T @ a)
        return dense
    return ((a @ a.T) * (b @ b.T)).sum().clamp(min=0).sqrt()


def energy_kept(before: Update, after: Update) -> float:
    """Share of ‖ΔW‖² that is left, over all modules of two single edits: 1 - ‖ΔW - ΔW'‖² / ‖ΔW‖²."""
    total = lost = 0.0
    for name, (a, b) in before.items():
        new_a, new_b = after[name]
        total += float(norm(a[0], b[0]) ** 2)
        lost += float(norm(torch.cat((a[0], new_a[0])), torch.cat((b[0], -new_b[0]))) ** 2)
    return 1.0 - lost / total if total else 1.0


def compress(update: Update, energy: float = 0.999, max_rank: int | None = None) -> dict[str, Factors]:
    """The smallest factors that keep a share of a single edit's energy.

    QR of both factors, then the singular values of the small core: exact, and no module's rank is larger than it was.
    What is left out are the least singular values of all modules together, so each module keeps as many rows as its
    part of the edit is worth.

    Args:
        update: one edit, a batch of one.
        energy: the share of ‖ΔW‖² (squared Frobenius norm over all modules) to keep.
        max_rank: the largest rank of a module; None for no bound.

    Returns:
        A (1, k, d_in) and B (1, k, d_out), float32, with k of 1 at least unless the module's ΔW is zero.
    """
    cores = {name: _core(a[0], b[0]) for name, (a, b) in update.items()}
    squares = torch.cat([values.square() for _, values, _ in cores.values()]).sort(descending=True).values
    kept = squares.cumsum(0)
    enough = (kept < energy * kept[-1]).sum() if len(kept) else 0
    least = squares[enough] if len(kept) else 0.0
    out = {}
    for name, (left, values, right) in cores.items():
        rank = max(int((values.square() >= least).sum()), 1)
        rank = min(rank, int((values > 0).sum()), max_rank or len(values))
        root = values[:rank].sqrt()
        out[name] = (
            (right[:, :rank] * root).T.float().contiguous()[None],
            (left[:, :rank] * root).T.float().contiguous()[None],
        )
    return out


def _core(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of BᵀA: left (d_out, r), values (r,) descending, right (d_in, r), float64."""
    q_a, r_a = torch.linalg.qr(a.double().T)
    q_b, r_b = torch.linalg.qr(b.double().T)
    left, values, right = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ left, values, q_a @ right.T
