"""What is damped in keys, against dense second moments."""

from __future__ import annotations

import torch
from torch import Tensor

from ie.editor.whitener import Whitener, add_moment

D = 24


def inputs(n: int = 400) -> Tensor:
    """A few strong directions, a mean far from zero, and noise."""
    generator = torch.Generator().manual_seed(0)
    strong = torch.randn(n, 3, generator=generator) @ torch.randn(3, D, generator=generator) * 4
    return strong + torch.randn(n, D, generator=generator) + 5


def fitted(n_directions: int, std: Tensor, values: Tensor) -> Whitener:
    whitener = Whitener(D, n_directions)
    for part in values.split(130):  # type: ignore[no-untyped-call]
        whitener.observe(part)
    whitener.fit(std)
    return whitener


def unit(rows: Tensor) -> Tensor:
    return (rows / rows.norm(dim=-1, keepdim=True)).float()


def test_with_every_direction_it_is_the_inverse_of_the_second_moment() -> None:
    values = inputs()
    std = values.std(0)
    scaled = (values / std).double()
    moment = scaled.T @ scaled
    shrunk = moment + 0.05 * moment.trace() / D * torch.eye(D, dtype=torch.float64)
    keys = scaled[:7] @ torch.linalg.inv(shrunk)
    found = fitted(D, std, values)(scaled[:7].float())
    torch.testing.assert_close(unit(found), unit(keys), atol=1e-4, rtol=1e-3)


def test_with_some_directions_the_others_share_one_eigenvalue() -> None:
    values = inputs()
    own, vectors = torch.linalg.eigh(values.double().T @ values.double())
    own[:-4] = own[:-4].mean()  # three strong directions and the mean's
    shrunk = (vectors * (own + 0.05 * own.mean())) @ vectors.T
    keys = values[:7].double() @ torch.linalg.inv(shrunk)
    found = fitted(4, torch.ones(D), values)(values[:7])
    torch.testing.assert_close(unit(found), unit(keys), atol=1e-4, rtol=1e-3)


def test_the_root_applied_twice_points_the_same_way() -> None:
    values = inputs()
    whitener = fitted(4, torch.ones(D), values)
    torch.testing.assert_close(unit(whitener.root(whitener.root(values))), unit(whitener(values)), atol=1e-4, rtol=1e-3)
    root = whitener.root(torch.eye(D))
    torch.testing.assert_close(root, root.T, atol=1e-6, rtol=1e-5)
    assert torch.equal(Whitener(D, 4).root(values), values)  # unfitted


def test_a_key_answers_its_own_input_as_before() -> None:
    values = inputs()
    found = fitted(4, torch.ones(D), values)(values)
    torch.testing.assert_close((found * values).sum(-1), values.square().sum(-1), atol=0, rtol=1e-4)


def test_it_answers_other_inputs_less() -> None:
    values = inputs()
    keys = fitted(4, torch.ones(D), values)(values)
    others = ~torch.eye(len(values), dtype=torch.bool)
    before, after = ((left @ values.T)[others].square().mean() for left in (values, keys))
    assert after < 0.4 * before


def test_unfitted_it_is_the_identity_and_fitted_it_keeps_no_large_matrix() -> None:
    values = inputs()
    assert torch.equal(Whitener(D, 4)(values), values)
    whitener = fitted(4, torch.ones(D), values)
    assert whitener.moment is None and whitener.state_dict().keys() == {"directions"}


def test_observing_keeps_one_large_matrix() -> None:
    first, second = inputs().double().split(200)  # type: ignore[no-untyped-call]
    moment = add_moment(None, first)
    assert add_moment(moment, second).data_ptr() == moment.data_ptr()
    values = torch.cat((first, second))
    torch.testing.assert_close(moment, values.T @ values)


def test_fitting_draws_nothing_from_the_run() -> None:
    state = torch.random.get_rng_state()
    fitted(4, torch.ones(D), inputs())
    assert torch.equal(torch.random.get_rng_state(), state)
