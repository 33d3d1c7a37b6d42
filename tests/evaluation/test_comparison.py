"""Harmonic means and paired differences, against values worked out by hand."""

from __future__ import annotations

import pytest

from ie.evaluation.comparison import HARMONIC, differences, harmonic_means
from ie.evaluation.protocol import Figures


def figures(reliability: float, locality: float, *, n: int = 4) -> list[Figures]:
    return [
        Figures("reliability", "plain", "forced", dict.fromkeys(range(n), reliability)),
        Figures("reliability", "instructed", "forced", dict.fromkeys(range(n), 1.0)),
        Figures("generalization", "plain", "forced", dict.fromkeys(range(n - 1), 1.0)),
        Figures("locality", "plain", "forced", dict.fromkeys(range(1, n), locality)),
    ]


def test_harmonic_mean_of_the_three_metrics() -> None:
    found = {(one.query, one.decoding): one for one in harmonic_means(figures(1.0, 0.5))}
    assert found["plain", "forced"].value == pytest.approx(3 / (1 + 1 + 2))  # float
    # Instructed: no generalization was measured, and the plain locality stands for it.
    assert found["instructed", "forced"].value == pytest.approx(2 / (1 + 2))
    assert all(one.metric == HARMONIC and one.n == 4 for one in found.values())


def test_a_metric_of_zero_makes_the_harmonic_mean_zero() -> None:
    (plain, *_) = harmonic_means(figures(0.0, 1.0))
    assert plain.value == pytest.approx(0.0, abs=1e-8)


def test_without_locality_there_is_no_harmonic_mean() -> None:
    assert harmonic_means(figures(1.0, 1.0)[:3]) == []


def test_differences_are_taken_record_by_record() -> None:
    left, right = figures(1.0, 0.5), figures(0.75, 0.5)
    found = {(one.metric, one.query): one for one in differences(left, right)}
    gap = found["reliability", "plain"]
    assert (gap.value, gap.low, gap.high, gap.n) == (0.25, 0.25, 0.25, 4)
    assert found["locality", "plain"].value == 0 and found["locality", "plain"].n == 3
    expected = 3 / (1 + 1 + 2) - 3 / (4 / 3 + 1 + 2)
    assert found[HARMONIC, "plain"].value == pytest.approx(expected)  # float
    back = {(one.metric, one.query): one.value for one in differences(right, left)}
    assert all(back[key] == pytest.approx(-one.value) for key, one in found.items())
