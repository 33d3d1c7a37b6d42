"""The negative log-likelihood of labels and its gradient, in closed form and slice by slice.

With a large vocabulary the float32 copies of all logits would be the largest tensors of a run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["nll", "slices"]

_SLICE_LOGITS, _GPU_SLICE_LOGITS = 2**19, 2**22  # float32 copies that fit a CPU's caches; that keep a GPU busy


def nll(logits: Tensor, labels: Tensor, weight: float = 1.0, gradient: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood, () float32, summed over labels, and its gradient: the softmax less one at the label.

    Args:
        logits: (n, n_vocab).
        labels: (n,) int64.
        weight: what the gradient, and not the loss, is multiplied by.
        gradient: (n, n_vocab) in the logits' dtype, to be set to the gradient; None makes one.

    Returns:
        The loss and its gradient (n, n_vocab) in the logits' dtype.
    """
    loss = logits.new_zeros((), dtype=torch.float32)
    gradient = torch.empty_like(logits) if gradient is None else gradient
    for part in slices(logits):
        probabilities = logits[part].float().log_softmax(-1)
        place = (torch.arange(len(probabilities), device=logits.device), labels[part])
        loss -= probabilities[place].sum()
        probabilities.exp_()[place] -= 1
        gradient[part] = probabilities.mul_(weight)
    return loss, gradient


def slices(logits: Tensor) -> Iterator[slice]:
    """Rows of logits (n, n_vocab) to look at together."""
    n_logits = _SLICE_LOGITS if logits.device.type == "cpu" else _GPU_SLICE_LOGITS
    n_rows = max(1, n_logits // logits.shape[1])
    return (slice(start, start + n_rows) for start in range(0, len(logits), n_rows))
