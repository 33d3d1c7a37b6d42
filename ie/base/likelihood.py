"""The negative log-likelihood of labels and its gradient, in closed form and slice by slice.

With a large vocabulary the float32 copies of all logits would be the largest tensors of a run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["nll", "slices"]

_SLICE_LOGITS = 2**22  # logits whose float32 copies are held at once


def nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood, () float32, summed over labels, and its gradient: the softmax less one at the label.

    Args:
        logits: (n, n_vocab).
        labels: (n,) int64.

    Returns:
        The loss and its gradient (n, n_vocab) in the logits' dtype.
    """
    loss, gradient = logits.new_zeros((), dtype=torch.float32), torch.empty_like(logits)
    for part in slices(logits):
        probabilities = logits[part].float().log_softmax(-1)
        place = (torch.arange(len(probabilities), device=logits.device), labels[part])
        loss -= probabilities[place].sum()
        probabilities.exp_()[place] -= 1
        gradient[part] = probabilities
    return loss, gradient


def slices(logits: Tensor) -> Iterator[slice]:
    """Rows of logits (n, n_vocab) to look at together."""
    n_rows = max(1, _SLICE_LOGITS // logits.shape[1])
    return (slice(start, start + n_rows) for start in range(0, len(logits), n_rows))
