"""Algebra of low-rank updates against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ie.patch import lowrank
from ie.patch.lowrank import energy_kept, norm, select, side_by_side, stack


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compress(a: Tensor, b: Tensor, energy: float = 0.999, max_rank: int | None = None) -> tuple[Tensor, Tensor]:
    """An edit of one module."""
    low_a, low_b = lowrank.compress({"m": (a[None], b[None])}, energy, max_rank)["m"]
    return low_a[0], low_b[0]


def with_spectrum(values: list[float], rank: int) -> tuple[Tensor, Tensor]:
    """Factors of `rank` rows whose product has the given singular values."""
    q_a = torch.linalg.qr(draw(20, len(values), seed=1).double())[0]
    q_b = torch.linalg.qr(draw(12, len(values), seed=2).double())[0]
    mix = draw(rank, len(values), seed=3).double()  # more rows than values: A = M S Vᵀ, B = pinv(M)ᵀ Uᵀ
    a = mix @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q_a.T
    b = torch.linalg.pinv(mix).T @ q_b.T
    return a.float(), b.float()


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.9, 2), (0.98, 2), (0.99, 3), (0.9999, 4), (1.0, 5)])
def test_compress_keeps_the_energy_with_the_smallest_rank(energy: float, rank: int) -> None:
    values = [4.0, 2.0, 0.5, 0.1, 0.01]  # squares: 16, 4, 0.25, 0.01, 0.0001; cumulated shares .790 .987 .9995 .99999
    a, b = with_spectrum(values, rank=8)
    low_a, low_b = compress(a, b, energy)
    if energy == 1.0:  # rounding of the factors to float32 leaves a little of the other ranks
        assert len(low_a) >= rank
    else:
        assert len(low_a) == rank
    change = b.T.double() @ a.double()
    lost = (change - low_b.T.double() @ low_a.double()).square().sum() / change.square().sum()
    assert lost <= 1 - energy + 1e-6  # float32 factors


def test_by_default_it_keeps_999_of_1000() -> None:
    a, b = draw(10, 30), draw(10, 25, seed=1)
    low_a, low_b = compress(a, b)
    change = b.T @ a
    lost = (change - low_b.T @ low_a).square().sum() / change.square().sum()
    assert lost <= 1e-3 + 1e-6  # float32
    fewer = compress(a, b, max_rank=len(low_a) - 1)
    assert (change - fewer[1].T @ fewer[0]).square().sum() / change.square().sum() > 1e-3 or len(low_a) == 10


def test_it_is_exact_when_nothing_can_be_left_out() -> None:
    a, b = draw(6, 20), draw(6, 12, seed=1)
    low_a, low_b = compress(a, b, energy=1.0)
    assert low_a.shape == (6, 20) and low_b.shape == (6, 12)
    torch.testing.assert_close(low_b.T @ low_a, b.T @ a, atol=1e-5, rtol=1e-5)  # float32 factors


def test_more_rows_than_features() -> None:
    """An edit of many tokens on a narrow module."""
    a, b = draw(50, 8), draw(50, 6, seed=1)
    low_a, low_b = compress(a, b, energy=1.0)
    assert len(low_a) <= 6
    torch.testing.assert_close(low_b.T @ low_a, b.T @ a, atol=1e-4, rtol=1e-5)  # float32 sums of 50 terms


def test_modules_share_what_may_be_lost() -> None:
    """All of the loss falls where it costs least: on the module that is a small part of the edit."""
    large, small = with_spectrum([4.0, 3.0, 2.0], rank=5), with_spectrum([0.1, 0.05, 0.04], rank=5)
    update = {"large": (large[0][None], large[1][None]), "small": (small[0][None], small[1][None])}
    low = lowrank.compress(update)
    assert {name: a.shape[1] for name, (a, _) in low.items()} == {"large": 3, "small": 1}
    assert energy_kept(update, low) >= 0.999
    ranks = [len(compress(*one)[0]) for one in (large, small)]
    assert ranks == [3, 3]  # each for itself would keep all


def test_every_module_of_an_edit_stays() -> None:
    large, tiny = with_spectrum([4.0], rank=2), with_spectrum([1e-4], rank=2)
    low = lowrank.compress({"large": (large[0][None], large[1][None]), "tiny": (tiny[0][None], tiny[1][None])})
    assert [a.shape[1] for a, _ in low.values()] == [1, 1]


def test_repeated_rows_take_no_rank() -> None:
    a, b = draw(1, 20).repeat(5, 1), draw(1, 12).repeat(5, 1)
    assert len(compress(a, b)[0]) == 1


def test_max_rank_bounds_it() -> None:
    a, b = draw(6, 20), draw(6, 12, seed=1)
    low_a, low_b = compress(a, b, max_rank=2)
    assert (low_a.shape, low_b.shape) == ((2, 20), (2, 12))


@pytest.mark.parametrize("rank", [0, 1, 4])
def test_a_zero_update_has_rank_zero(rank: int) -> None:
    low_a, low_b = compress(draw(rank, 20), torch.zeros(rank, 12))
    assert (low_a.shape, low_b.shape) == ((0, 20), (0, 12))
    assert low_a.dtype == low_b.dtype == torch.float32


def test_tiny_and_huge_updates_keep_their_size() -> None:
    for size in (1e-15, 1e15):
        a, b = draw(3, 20) * size, draw(3, 12, seed=1) * size
        low_a, low_b = compress(a, b)
        change = b.T.double() @ a.double()
        assert ((low_b.T.double() @ low_a.double() - change).norm() / change.norm()) < 0.04  # sqrt(1e-3) of the norm


def test_select_takes_one_edit_without_its_zero_rows() -> None:
    a, b = draw(2, 3, 5), draw(2, 3, 4, seed=1)
    a[1, 2], b[1, 2] = 0, 0
    chosen = select({"m": (a, b)}, 1)["m"]
    assert torch.equal(chosen[0], a[1:, :2]) and torch.equal(chosen[1], b[1:, :2])
    assert select({"m": (a, torch.zeros_like(b))}, 0)["m"][0].shape == (1, 0, 5)


def test_stack_is_the_sum_and_fills_gaps() -> None:
    one = {"m": (draw(1, 2, 5), draw(1, 2, 4))}
    two = {"m": (draw(1, 3, 5, seed=1), draw(1, 3, 4, seed=1)), "n": (draw(1, 1, 7), draw(1, 1, 6))}
    both = stack([one, two])
    assert set(both) == {"m", "n"}
    dense = both["m"][1][0].T @ both["m"][0][0]
    expected = sum(u["m"][1][0].T @ u["m"][0][0] for u in (one, two))
    torch.testing.assert_close(dense, expected, atol=1e-6, rtol=1e-6)  # the order of a float32 sum of five
    assert all(torch.equal(x, y) for x, y in zip(both["n"], two["n"], strict=True))
    assert stack([]) == {}


@pytest.mark.parametrize("rank", [0, 1, 3, 40])  # 40: more rows than a product has, where the product itself is formed
def test_norm_is_the_dense_one(rank: int) -> None:
    a, b = draw(rank, 20), draw(rank, 12, seed=1)
    assert float(norm(a, b)) == pytest.approx(float((b.double().T @ a.double()).norm()), rel=1e-12)


def test_energy_kept_counts_truncation_and_rounding() -> None:
    a, b = with_spectrum([4.0, 2.0, 0.5], rank=5)
    low = {"m": tuple(one[None] for one in compress(a, b, max_rank=2))}
    before = {"m": (a[None], b[None])}
    assert energy_kept(before, low) == pytest.approx(20 / 20.25, abs=1e-6)  # float32 factors
    assert energy_kept(before, before) == pytest.approx(1, abs=1e-12)
    coarse = {"m": (low["m"][0].bfloat16().float(), low["m"][1].bfloat16().float())}
    dense = [one["m"][1][0].double().T @ one["m"][0][0].double() for one in (before, coarse)]
    lost = ((dense[0] - dense[1]).norm() / dense[0].norm()) ** 2
    assert energy_kept(before, coarse) == pytest.approx(1 - float(lost), abs=1e-12) != energy_kept(before, low)
    assert energy_kept({"m": (a[None], 0 * b[None])}, low) == 1.0


def test_side_by_side_keeps_each_edit_and_fills_gaps() -> None:
    one = {"m": (draw(1, 2, 5), draw(1, 2, 4))}
    two = {"m": (draw(1, 3, 5, seed=1), draw(1, 3, 4, seed=1)), "n": (draw(1, 1, 7), draw(1, 1, 6))}
    both = side_by_side([one, two])
    assert {name: (tuple(a.shape), tuple(b.shape)) for name, (a, b) in both.items()} == {
        "m": ((2, 3, 5), (2, 3, 4)),
        "n": ((2, 1, 7), (2, 1, 6)),
    }
    for i, edit in enumerate((one, two)):
        for name, (a, b) in both.items():
            expected = edit[name][1][0].T @ edit[name][0][0] if name in edit else torch.zeros(b.shape[2], a.shape[2])
            torch.testing.assert_close(b[i].T @ a[i], expected, atol=0, rtol=0)
