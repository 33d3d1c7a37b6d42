"""The hypernetwork and the normaliser against slow references, token by token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ie.editor.network import Hypernetwork
from ie.editor.normaliser import Normaliser

D_SIGNAL, D_TOLD, N_MODULES, RANK = 7, 5, 3, 4


def trained(n_layers: int = 2) -> Hypernetwork:
    """A hypernetwork whose every parameter counts."""
    torch.manual_seed(0)
    network = Hypernetwork(D_SIGNAL, N_MODULES, RANK, n_layers, D_TOLD)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter))
    return network


def reference(network: Hypernetwork, signal: Tensor, module: int, told: Tensor) -> Tensor:
    """s = silu(scale_m * (V h + T c) + shift_m), h <- (1 + tanh(gate_m · s)) h + U s + b, entry by entry, in double."""
    h, c = ([float(value) for value in one] for one in (signal, told))
    for layer in network.layers:
        p = {name: value.double().tolist() for name, value in layer.named_parameters()}
        low = [sum(v * w[k] for v, w in zip(h + c, p["down"] + p["steer"], strict=True)) for k in range(RANK)]
        bent = [p["scale"][module][k] * low[k] + p["shift"][module][k] for k in range(RANK)]
        active = [x / (1 + math.exp(-x)) for x in bent]
        weight = 1 + math.tanh(sum(p["gate"][module][k] * active[k] for k in range(RANK)))
        added = [sum(active[k] * p["up"][k][j] for k in range(RANK)) + p["bias"][j] for j in range(D_SIGNAL)]
        h = [weight * one + other for one, other in zip(h, added, strict=True)]
    return torch.tensor(h)


def test_it_is_the_slow_reference_token_by_token() -> None:
    network = trained()
    signal, told = torch.randn(11, D_SIGNAL), torch.randn(4, D_TOLD)
    module, row = torch.arange(11) % N_MODULES, torch.arange(11) % 4
    with torch.no_grad():
        found, untold = network(signal, module, told, row), network(signal, module)
    each = zip(signal, module, told[row], strict=True)
    expected = torch.stack([reference(network, h, int(m), c) for h, m, c in each])
    nothing = torch.zeros(D_TOLD)
    torch.testing.assert_close(untold[0], reference(network, signal[0], 0, nothing), atol=1e-4, rtol=1e-5)
    # Float32 against double; two layers that multiply sizes by some ten.
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert (found - signal).abs().max() > 0.1


def test_it_starts_as_the_identity() -> None:
    signal = torch.randn(5, D_SIGNAL)
    fresh, first = Hypernetwork(D_SIGNAL, N_MODULES, RANK, 2, D_TOLD), torch.zeros(5, dtype=torch.long)
    assert torch.equal(fresh(signal, first, torch.randn(5, D_TOLD), torch.arange(5)), signal)
    none = Hypernetwork(D_SIGNAL, N_MODULES, RANK, 0)
    assert torch.equal(none(signal, torch.zeros(5, dtype=torch.long)), signal)


def test_it_can_leave_the_identity() -> None:
    """U starts at zero, and must have a gradient there: without one nothing would ever train."""
    torch.manual_seed(1)
    fresh = Hypernetwork(D_SIGNAL, N_MODULES, RANK, 2)
    fresh(torch.randn(5, D_SIGNAL), torch.zeros(5, dtype=torch.long)).square().sum().backward()
    for layer in fresh.layers:
        for name in ("up", "bias", "gate"):
            gradient = layer.get_parameter(name).grad
            assert gradient is not None and gradient.abs().max() > 0, name


def test_what_it_is_told_can_matter_from_the_first_step() -> None:
    """Where an instruction's part started at zero behind the zeros of U and the gates, neither would ever move it."""
    torch.manual_seed(1)
    network, first = Hypernetwork(D_SIGNAL, N_MODULES, RANK, 1, D_TOLD), torch.zeros(1, dtype=torch.long)
    gradients = []
    for told in torch.randn(2, 1, D_TOLD):
        out = network(torch.ones(1, D_SIGNAL), first, told, first).square().sum()
        gradients.append(torch.autograd.grad(out, network.layers[0].get_parameter("up"))[0])
    assert not torch.allclose(*gradients, rtol=0.1)


def test_tokens_do_not_see_each_other() -> None:
    network = trained()
    signal, module = torch.randn(6, D_SIGNAL), torch.tensor([0, 1, 2, 0, 1, 2])
    changed = signal.clone()
    changed[3] += 1
    others = torch.arange(6) != 3
    assert torch.equal(network(signal, module)[others], network(changed, module)[others])


class TestNormaliser:
    def test_unfitted_it_is_the_identity(self) -> None:
        values = torch.randn(4, 3)
        assert torch.equal(Normaliser(3)(values), values)

    def test_fitted_it_gives_mean_zero_and_deviation_one(self) -> None:
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(500, 4, generator=generator) * torch.tensor([1.0, 5.0, 0.2, 2.0]) + 3
        normaliser = Normaliser(4)
        for part in values.split(120):  # type: ignore[no-untyped-call]
            normaliser.observe(part)
        normaliser.fit()
        found = normaliser(values)
        # Float32 statistics of 500 values.
        torch.testing.assert_close(found.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(found.std(0, correction=0), torch.ones(4), atol=1e-5, rtol=0)

    def test_sums_are_kept_in_double_precision(self) -> None:
        """A variance that is a difference of large numbers: in float32 nothing of it would be left."""
        values = 10_000 + torch.tensor([[-1.0], [1.0]]).repeat(1000, 1)
        normaliser = Normaliser(1)
        normaliser.observe(values)
        normaliser.fit()
        torch.testing.assert_close(normaliser.std, torch.ones(1), atol=1e-4, rtol=0)  # double: 16 digits less 8

    def test_a_dead_feature_is_not_blown_up(self) -> None:
        values = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
        values[:, 1] = 0.25
        normaliser = Normaliser(3)
        normaliser.observe(values)
        normaliser.fit()
        found = normaliser(values + 1e-6)
        assert found.isfinite().all() and found[:, 1].abs().max() < 1e-4

    def test_statistics_are_buffers_and_sums_are_not_saved(self) -> None:
        normaliser = Normaliser(2)
        assert set(normaliser.state_dict()) == {"mean", "std"}
        assert not list(normaliser.parameters())
