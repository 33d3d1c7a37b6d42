"""Metrics against values worked out by hand or taken from tables."""

from __future__ import annotations

import math

import pytest
import torch

from ie.evaluation.metrics import bootstrap, harmonic_mean, mean, ngram_entropy, share_equal, wilson


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),  # z² / (n + z²)
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
        (1, 1, 0.2065, 1.0),
        (15, 148, 0.0624, 0.1605),  # Newcombe 1998, table I
        (81, 263, 0.2553, 0.3662),  # the same
    ],
)
def test_wilson_interval(successes: int, n: int, low: float, high: float) -> None:
    # Tables print four digits.
    assert wilson(successes / n, n) == pytest.approx((low, high), abs=6e-5)


def test_wilson_of_nothing_is_not_a_number() -> None:
    assert all(math.isnan(bound) for bound in (*wilson(0.5, 0), *wilson(math.nan, 3)))


def test_means() -> None:
    assert mean([1.0, 0.0, 0.5]) == 0.5
    assert math.isnan(mean([]))
    assert harmonic_mean([1.0, 0.5]) == pytest.approx(2 / 3)  # float
    assert harmonic_mean([1.0, 0.0]) == 0.0


def test_share_equal() -> None:
    assert share_equal((1, 2, 3, 4), (1, 9, 3, 9)) == 0.5
    with pytest.raises(ValueError):
        share_equal((1, 2), (1,))


def test_ngram_entropy_by_hand() -> None:
    assert ngram_entropy([7] * 20) == 0
    # 1 2 1 2 1: bi-grams 12, 21, 12, 21 (1 bit); tri-grams 121, 212, 121 (log2 3 - 2/3 bits).
    expected = 100 * (1 / 3 * 1 + 2 / 3 * (math.log2(3) - 2 / 3))
    assert ngram_entropy([1, 2, 1, 2, 1]) == pytest.approx(expected)  # float
    # All different: log2 of how many there are.
    assert ngram_entropy(range(10)) == pytest.approx(100 * (math.log2(9) / 3 + math.log2(8) * 2 / 3))
    assert ngram_entropy([]) == ngram_entropy([1]) == 0


def test_bootstrap_of_a_share_agrees_with_wilson_where_both_hold() -> None:
    values = torch.tensor([[1.0]] * 60 + [[0.0]] * 40)
    value, low, high = bootstrap(values, lambda means: means[:, 0])
    assert value == pytest.approx(0.6)  # float
    # Standard deviation of a mean of 100: 0.049; 2,000 resamples give the ends to about 0.01.
    assert (low, high) == pytest.approx(wilson(0.6, 100), abs=0.02)
    assert (value, low, high) == bootstrap(values, lambda means: means[:, 0])


def test_bootstrap_keeps_columns_paired_and_leaves_out_what_is_missing() -> None:
    left = torch.rand(50, 1, generator=torch.Generator().manual_seed(0))
    found = bootstrap(torch.cat((left, left - 0.25), 1), lambda means: means[:, 0] - means[:, 1])
    assert found == pytest.approx((0.25, 0.25, 0.25), abs=1e-5)  # float32 sums: unpaired it would be 0.11 wide
    missing = torch.tensor([[0.5], [math.nan], [0.5]])
    assert bootstrap(missing, lambda means: means[:, 0]) == pytest.approx((0.5, 0.5, 0.5))
