"""Which kind an instruction tells of, against Gaussians written out."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from ie.base.instructions import Readings
from ie.editor.kinds import Kinds, opened

D, N_KINDS = 12, 3
OF_NONE = torch.eye(N_KINDS + 1)[-1:]


def readings(values: Tensor) -> Readings:
    return Readings(values, torch.ones(len(values), dtype=torch.bool))


def observed(n: int = 200) -> list[Tensor]:
    """Readings of three kinds that spread alike, one direction five times as far as the others."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.ones(D).index_fill(0, torch.tensor([2]), 5.0)
    means = 4 * torch.randn(N_KINDS, D, generator=generator) + 7
    return [mean + spread * torch.randn(n, D, generator=generator) for mean in means]


def fitted(values: list[Tensor]) -> Kinds:
    kinds = Kinds(D, N_KINDS)
    for kind, told in enumerate(values):
        for part in told.split(90):  # type: ignore[no-untyped-call]
            kinds.observe(readings(part), kind)
    kinds.fit()
    return kinds


def covariance(values: list[Tensor]) -> Tensor:
    centred = torch.cat([one - one.mean(0) for one in values]).double()
    within = centred.T @ centred / len(centred)
    return within + 0.3 * within.trace() / D * torch.eye(D, dtype=torch.float64)


def test_shares_are_the_probabilities_of_gaussians_of_one_covariance() -> None:
    """What an instruction says across the discriminants is as likely of each, and of none."""
    values = observed()
    kinds, root = fitted(values), torch.linalg.cholesky(covariance(values))
    means = torch.stack([one.mean(0) for one in values]).double()
    middle = means.mean(0)
    outside = middle + 2.5 * (means - middle)
    asked = torch.cat([*(one[:40].double() for one in values), middle + torch.randn(40, D) / 3, outside])

    def deviations(points: Tensor) -> Tensor:  # from the middle, in the plane of the kinds' means
        apart = torch.linalg.solve(root, (points - middle).T).T
        plane = torch.linalg.solve(root, (means - middle).T).T
        return apart @ torch.linalg.pinv(plane) @ plane

    centres, at = deviations(torch.cat((means, middle[None]))), deviations(asked)
    nearest = min(float((centres[one] - centres[other]).norm()) for one in range(N_KINDS) for other in range(one))
    likely = (-0.5 * torch.cdist(at, centres) ** 2).exp()
    likely[:, -1] += math.exp(-0.5 * (nearest / 2) ** 2)
    found = kinds(readings(asked.float()))
    torch.testing.assert_close(found, (likely / likely.sum(-1, keepdim=True)).float(), atol=1e-4, rtol=1e-3)
    told = torch.arange(N_KINDS + 1).repeat_interleave(40)
    assert (found[: len(told)].argmax(-1) == told).float().mean() > 0.95
    assert (found[len(told) :].argmax(-1) == N_KINDS).all()


def test_of_no_kind_is_what_stands_between_all_or_far_from_all() -> None:
    values = observed()
    kinds = fitted(values)
    means = torch.stack([one.mean(0) for one in values])
    middle = means.mean(0, keepdim=True)
    across = torch.linalg.qr(torch.cat((kinds.directions, torch.randn(1, D))).T).Q[:, -1]  # of no discriminant
    torch.testing.assert_close(kinds(readings(middle + 100 * across)), OF_NONE, atol=1e-2, rtol=0)
    torch.testing.assert_close(
        kinds(readings(middle + 1e3 * (means - middle))), OF_NONE.expand(N_KINDS, -1), atol=0, rtol=0
    )
    one, other = min(itertools.combinations(range(N_KINDS), 2), key=lambda pair: _apart(kinds, *pair))
    halfway = kinds(readings((means[one] + means[other])[None] / 2))[0]  # the middle adds to what is of none there
    torch.testing.assert_close(halfway[one], halfway[other], atol=1e-3, rtol=1e-3)
    assert 1 / 3 < halfway[-1] < 1 / 2


def _apart(kinds: Kinds, one: int, other: int) -> float:
    return float((kinds.places[one] - kinds.places[other]).norm())


def test_what_is_of_none_opens_all_parts_alike() -> None:
    shares = torch.tensor([[0.5, 0.2, 0.0, 0.3], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    weights = torch.tensor([[0.6, 0.3, 0.1], [1 / 3, 1 / 3, 1 / 3], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(opened(shares), weights)


def test_without_an_instruction_shares_are_zero() -> None:
    kinds = fitted(observed())
    given = torch.tensor([False, True])
    found = kinds(Readings(observed()[0][:2] * given[:, None], given))
    assert not found[0].any() and found[1].any()


def test_unfitted_all_is_of_none() -> None:
    kinds = Kinds(D, N_KINDS)
    kinds.fit()
    torch.testing.assert_close(kinds(readings(torch.randn(4, D))), OF_NONE.expand(4, -1))
    for kind in range(N_KINDS):  # only one was told of
        told = torch.randn(5, D)
        kinds.observe(Readings(told, torch.full((5,), kind == 1)), kind)
    kinds.fit()
    torch.testing.assert_close(kinds(readings(torch.randn(4, D))), OF_NONE.expand(4, -1))


def test_a_kind_without_instructions_has_no_share() -> None:
    values = observed()
    kinds = Kinds(D, N_KINDS + 1)
    for kind, told in zip((0, 1, 3), values, strict=True):
        kinds.observe(readings(told), kind)
    kinds.fit()
    asked = torch.cat([one[:40] for one in values])
    found, expected = kinds(readings(asked)), fitted(values)(readings(asked))
    torch.testing.assert_close(found[:, [0, 1, 3, 4]], expected, atol=1e-4, rtol=1e-3)
    assert not found[:, 2].any()
    assert all(tensor.isfinite().all() for tensor in kinds.state_dict().values())


@pytest.mark.parametrize("largest", [1.0, 1e4])
def test_kinds_of_one_instruction_each_are_told_apart(largest: float) -> None:
    """No spread at all within a kind, and some features larger than all others, as large models have them."""
    values = torch.randn(N_KINDS, 256, generator=torch.Generator().manual_seed(0))
    values[:, :3] *= largest
    kinds = Kinds(256, N_KINDS)
    for _ in range(4):  # batch after batch, so that sums are rounded
        for kind, value in enumerate(values):
            kinds.observe(readings(value.repeat(64, 1)), kind)
    kinds.fit()
    torch.testing.assert_close(kinds(readings(values)), torch.eye(N_KINDS, N_KINDS + 1))


def test_sums_are_not_saved() -> None:
    assert Kinds(D, N_KINDS).state_dict().keys() == {"mean", "directions", "places"}
