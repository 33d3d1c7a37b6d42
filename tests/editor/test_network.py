"""The hypernetwork and the normaliser against slow references, token by token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ie.editor.network import Hypernetwork, routes
from ie.editor.normaliser import Normaliser

D_SIGNAL, N_MODULES, RANK, N_KINDS = 7, 3, 4, 2


def trained(n_layers: int = 2) -> Hypernetwork:
    """A hypernetwork whose every parameter counts."""
    torch.manual_seed(0)
    network = Hypernetwork(D_SIGNAL, N_MODULES, RANK, n_layers, N_KINDS)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter))
    return network


def reference(network: Hypernetwork, signal: Tensor, module: int, kinds: Tensor) -> Tensor:
    """s = silu(scale_m * V h + shift_m), h <- (1 + tanh(Σ w gate_m · s)) h + Σ w (U s + b) over the part of all kinds,
    of weight 1, and those of each, entry by entry, in double.
    """
    h = [float(value) for value in signal]
    for layer in network.layers:
        gate, added = 0.0, [0.0] * D_SIGNAL
        for part, w in ((layer.common, 1.0), *zip(layer.kinds, kinds.tolist(), strict=True)):  # type: ignore[arg-type]
            p = {name: value.double().tolist() for name, value in part.named_parameters()}  # type: ignore[union-attr]
            n = len(p["up"])
            low = [sum(v * row[k] for v, row in zip(h, p["down"], strict=True)) for k in range(n)]
            bent = [p["scale"][module][k] * low[k] + p["shift"][module][k] for k in range(n)]
            active = [x / (1 + math.exp(-x)) for x in bent]
            gate += w * sum(p["gate"][module][k] * active[k] for k in range(n))
            for j in range(D_SIGNAL):
                added[j] += w * (sum(active[k] * p["up"][k][j] for k in range(n)) + p["bias"][j])
        h = [(1 + math.tanh(gate)) * one + other for one, other in zip(h, added, strict=True)]
    return torch.tensor(h)


def test_it_is_the_slow_reference_token_by_token() -> None:
    network = trained()
    signal, kinds = torch.randn(11, D_SIGNAL), torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.3, 0.6], [0.0, 0.9]])
    module, edit = torch.arange(11) % N_MODULES, torch.arange(11) % 4
    with torch.no_grad():
        found, untold = network(signal, module, routes(kinds, edit)), network(signal, module)
    each = zip(signal, module, kinds[edit], strict=True)
    expected = torch.stack([reference(network, h, int(m), w) for h, m, w in each])
    nothing = torch.zeros(N_KINDS)
    torch.testing.assert_close(untold[0], reference(network, signal[0], 0, nothing), atol=1e-4, rtol=1e-5)
    # Float32 against double; two layers that multiply sizes by some ten.
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert (found - untold)[edit != 1].abs().amax(-1).min() > 0.1


def test_a_kinds_part_is_run_for_its_tokens_alone() -> None:
    edit = torch.tensor([0, 0, 1, 2, 2])
    made = routes(torch.tensor([[0.9995, 4e-4], [0.0, 0.0], [0.25, 0.75]]), edit)
    assert [(one.kind, one.rows.tolist()) for one in made] == [(0, [0, 1, 3, 4]), (1, [3, 4])]
    assert [one.weight[:, 0].tolist()[-1] for one in made] == [0.25, 0.75]
    assert routes(None, edit) == []


def test_it_starts_as_the_identity() -> None:
    signal = torch.randn(5, D_SIGNAL)
    fresh, first = Hypernetwork(D_SIGNAL, N_MODULES, RANK, 2, N_KINDS), torch.zeros(5, dtype=torch.long)
    assert torch.equal(fresh(signal, first, routes(torch.rand(5, N_KINDS), torch.arange(5))), signal)
    none = Hypernetwork(D_SIGNAL, N_MODULES, RANK, 0)
    assert torch.equal(none(signal, torch.zeros(5, dtype=torch.long)), signal)


def test_it_can_leave_the_identity() -> None:
    """U starts at zero, and must have a gradient there: without one nothing would ever train."""
    torch.manual_seed(1)
    fresh = Hypernetwork(D_SIGNAL, N_MODULES, RANK, 2, N_KINDS)
    to_kinds = routes(torch.full((5, N_KINDS), 0.5), torch.arange(5))
    fresh(torch.randn(5, D_SIGNAL), torch.zeros(5, dtype=torch.long), to_kinds).square().sum().backward()
    for layer in fresh.layers:
        for part in (layer.common, *layer.kinds):  # type: ignore[misc]
            for name in ("up", "bias", "gate"):
                gradient = part.get_parameter(name).grad  # type: ignore[union-attr]
                assert gradient is not None and gradient.abs().max() > 0, name


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
