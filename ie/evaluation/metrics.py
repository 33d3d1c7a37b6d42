"""What is measured, as pure functions of numbers and texts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Z95", "bootstrap", "harmonic_mean", "mean", "ngram_entropy", "share_equal", "wilson"]

Z95 = 1.959964  # the normal distribution's 97.5 % quantile
_N_RESAMPLES = 2000


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean; of nothing it is nan."""
    return sum(values) / len(values) if values else math.nan


def share_equal(left: Sequence[int], right: Sequence[int]) -> float:
    """Share of positions at which two sequences of one length agree."""
    return mean([float(a == b) for a, b in zip(left, right, strict=True)])


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of n cases (Wilson 1927): it stays in [0, 1] and is right for shares near 0 and 1."""
    if n == 0 or math.isnan(share):
        return math.nan, math.nan
    z2 = Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def harmonic_mean(values: Sequence[float]) -> float:
    """Harmonic mean of shares; 0 if one of them is 0."""
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)


def bootstrap(values: Tensor, statistic: Callable[[Tensor], Tensor]) -> tuple[float, float, float]:
    """A statistic of column means, and its 95 % percentile interval (Efron 1979); records are drawn, so columns stay
    paired.

    Args:
        values: (n_records, k) float; nan where a record has no value.
        statistic: (m, k) means, one row a resample, to (m,) figures.

    Returns:
        The figure, its lower and its upper bound; the same at each call.
    """
    n_records = len(values)
    draws = torch.randint(n_records, (_N_RESAMPLES, n_records), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(_N_RESAMPLES, n_records).scatter_add_(1, draws, torch.ones(draws.shape))
    there = (~values.isnan()).float()
    known = values.float().nan_to_num()
    found = statistic((counts @ known) / (counts @ there))
    low, high = found[~found.isnan()].quantile(torch.tensor([0.025, 0.975])).tolist()
    return statistic(known.sum(0, keepdim=True) / there.sum(0, keepdim=True)).item(), low, high


def ngram_entropy(tokens: Sequence[int]) -> float:
    """Fluency: entropy in bits of the bi-grams (weight 1/3) and tri-grams (weight 2/3) of a text, times 100.

    The measure of ROME (arXiv 2202.05262, section 3.4): a text that repeats itself has a low one.
    """
    return 100 * (_entropy(tokens, 2) / 3 + _entropy(tokens, 3) * 2 / 3)


def _entropy(tokens: Sequence[int], n: int) -> float:
    grams = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    total = sum(grams.values())
    return -sum(count / total * math.log2(count / total) for count in grams.values())
