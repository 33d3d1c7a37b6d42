"""The hypernetwork: a residual low-rank MLP over normalised signals.

    s = silu(scale_m * V h + shift_m),    h <- (1 + tanh(gate_m · s)) h + U s + b,    h = [u, δ]

One network serves all edit targets of one shape; `scale`, `shift` and `gate` are one row for each of them. U and the
gates start at zero, so the network starts as the identity on the normalised signals. A gate weighs a token as a whole,
from leaving it out to twice its part: which tokens an edit is to hang on is most of what there is to learn, and what is
added to h in a low rank cannot take h away (docs/experiments.md).

Each layer has one such part for all edits, and a smaller one for each kind that training knows: what these add to the
gate and to h is weighed by how likely the edit's instruction tells of their kind (`ie.editor.kinds`). In a single part
kinds are in each other's way (docs/experiments.md).

MEND (arXiv 2110.11309, section 3.1) and InstructEdit put the non-linearity and the modules' rows behind U, in the
signal's own dimension: h + relu(scale_m * (U V h + b) + shift_m). Behind a U of zeros relu has no gradient, a residual
that can only add positive numbers wastes half of what it could say, and d_signal-wide rows cost more than the matrix
products. In V's low dimension all three are gone; the measured difference stands in docs/experiments.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Hypernetwork", "Route", "routes"]

_LEAST_WEIGHT = 1e-3  # of a kind, below which its part is not run


@dataclass(frozen=True)
class Route:
    """The tokens that a kind's part is run for.

    Attributes:
        kind: index of the kind.
        rows: (n,) int64, the tokens.
        weight: (n, 1) float32, how far the part counts for each.
    """

    kind: int
    rows: Tensor
    weight: Tensor


def routes(kinds: Tensor | None, edit: Tensor) -> list[Route]:
    """Where the tokens of a batch of edits go.

    Args:
        kinds: (n_edits, n_kinds) float32, the weights of each edit's kinds; None if there are none.
        edit: (n_tokens,) int64, the edit that each token belongs to.
    """
    if kinds is None:
        return []
    counts = kinds > _LEAST_WEIGHT
    out = []
    for kind in counts.any(0).nonzero()[:, 0].tolist():
        rows = counts[edit, kind].nonzero()[:, 0]
        out.append(Route(kind, rows, kinds[edit[rows], kind, None]))
    return out


class Hypernetwork(nn.Module):
    """Turns normalised activations and deltas into pseudo-activations and pseudo-deltas.

    Args:
        d_signal: d_in + d_out of the edit targets that it serves.
        n_modules: how many of them there are.
        rank: rank of each layer's part for all edits; a kind's part has half of it.
        n_layers: number of residual layers.
        n_kinds: number of kinds with parts of their own.
    """

    def __init__(self, d_signal: int, n_modules: int, rank: int, n_layers: int, n_kinds: int = 0) -> None:
        super().__init__()
        rank = min(rank, d_signal)
        self.layers = nn.ModuleList(_Layer(d_signal, n_modules, rank, n_kinds) for _ in range(n_layers))

    def forward(self, signal: Tensor, module: Tensor, routes: Sequence[Route] = ()) -> Tensor:
        """Map signals token by token.

        Args:
            signal: (n_tokens, d_signal) float32, normalised [u, δ].
            module: (n_tokens,) int64, which edit target each token's signal is from.
            routes: the tokens that kinds' parts are run for.

        Returns:
            (n_tokens, d_signal) float32, [ũ, δ̃].
        """
        for layer in self.layers:
            signal = layer(signal, module, routes)
        return signal


class _Layer(nn.Module):
    def __init__(self, d_signal: int, n_modules: int, rank: int, n_kinds: int) -> None:
        super().__init__()
        self.common = _Part(d_signal, n_modules, rank)
        self.kinds = nn.ModuleList(_Part(d_signal, n_modules, max(1, rank // 2)) for _ in range(n_kinds))

    def forward(self, signal: Tensor, module: Tensor, routes: Sequence[Route]) -> Tensor:
        gate, added = self.common(signal, module)
        for route in routes:
            parts = self.kinds[route.kind](signal[route.rows], module[route.rows])
            for whole, part in zip((gate, added), parts, strict=True):
                # Under autocast parts come in bf16 and their weights do not.
                whole.index_add_(0, route.rows, (route.weight * part).to(whole.dtype))
        return torch.addcmul(added, 1 + torch.tanh(gate), signal)


class _Part(nn.Module):
    def __init__(self, d_signal: int, n_modules: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(d_signal, rank) / d_signal**0.5)
        self.scale = nn.Parameter(torch.ones(n_modules, rank))
        self.shift = nn.Parameter(torch.zeros(n_modules, rank))
        self.gate = nn.Parameter(torch.zeros(n_modules, rank))
        self.up = nn.Parameter(torch.zeros(rank, d_signal))
        self.bias = nn.Parameter(torch.zeros(d_signal))

    def forward(self, signal: Tensor, module: Tensor) -> tuple[Tensor, Tensor]:
        """gate_m · s (n_tokens, 1), and U s + b (n_tokens, d_signal)."""
        hidden = nn.functional.silu(torch.addcmul(self.shift[module], self.scale[module], signal @ self.down))
        return (self.gate[module] * hidden).sum(-1, keepdim=True), torch.addmm(self.bias, hidden, self.up)
