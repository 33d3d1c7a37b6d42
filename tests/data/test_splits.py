"""Splits: decided by subject and seed alone, in the right shares."""

from __future__ import annotations

from collections import Counter

import pytest

from ie.data.splits import normal_subject, quotas, rank, split_of


def test_shares_are_about_80_10_10():
    counts = Counter(split_of(f"subject {n}", 0) for n in range(5000))
    assert 0.78 < counts["train"] / 5000 < 0.82
    assert 0.08 < counts["validation"] / 5000 < 0.12
    assert 0.08 < counts["test"] / 5000 < 0.12


def test_case_and_white_space_do_not_count():
    assert normal_subject("  New \t Ulmarket\n") == normal_subject("new ULMARKET")
    assert all(split_of(f"New  TOWN {n}", 0) == split_of(f"new town {n} ", 0) for n in range(50))


def test_the_seed_decides():
    splits = [[split_of(f"subject {n}", seed) for n in range(200)] for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]


def test_ranks_do_not_change_between_versions():
    # Pinned: other numbers would move records of existing datasets between train and test.
    assert rank(0, "split", "ulmarket") == 0.29300247860085804
    assert 0 <= rank(3, "a") < 1 and rank(0, "ab", "c") != rank(0, "a", "bc")


@pytest.mark.parametrize(
    ("counts", "limit", "expected"),
    [
        ((80, 10, 10), 1000, (80, 10, 10)),
        ((80, 10, 10), 10, (8, 1, 1)),
        ((800, 100, 100), 20, (16, 2, 2)),
        ((98, 1, 1), 10, (8, 1, 1)),
        ((5, 0, 5), 4, (2, 0, 2)),
        ((80, 10, 10), 1, (1, 0, 0)),
        ((0, 0, 7), 3, (0, 0, 3)),
    ],
)
def test_quotas(counts, limit, expected):
    names = ("train", "validation", "test")
    assert tuple(quotas(dict(zip(names, counts, strict=True)), limit).values()) == expected


@pytest.mark.parametrize("limit", range(1, 120))
def test_quotas_never_exceed_limit_or_counts(limit):
    counts = {"train": 61, "validation": 30, "test": 2}
    kept = quotas(counts, limit)
    assert sum(kept.values()) == min(limit, 93)
    assert all(kept[split] <= counts[split] for split in counts)
