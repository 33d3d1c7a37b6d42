"""The hypernetwork: a residual low-rank MLP over normalised signals.

    s = silu(scale_m * (V h + T c) + shift_m),    h <- (1 + tanh(gate_m · s)) h + U s + b,    h = [u, δ]

One network serves all edit targets of one shape; `scale`, `shift` and `gate` are one row for each of them. c is what
the base made of the instruction: it steers what is made of the request's tokens, for an editor that reads instructions.
U and the gates start at zero, so the network starts as the identity on the normalised signals; T does not, for behind
zeros it would have no gradient. A gate weighs a token as a whole, from leaving it out to twice its part: which tokens
an edit is to hang on is most of what there is to learn, and what is added to h in a low rank cannot take h away
(docs/experiments.md).

MEND (arXiv 2110.11309, section 3.1) and InstructEdit put the non-linearity and the modules' rows behind U, in the
signal's own dimension: h + relu(scale_m * (U V h + b) + shift_m). Behind a U of zeros relu has no gradient, a residual
that can only add positive numbers wastes half of what it could say, and d_signal-wide rows cost more than the matrix
products. In V's low dimension all three are gone; the measured difference stands in docs/experiments.md.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Hypernetwork"]


class Hypernetwork(nn.Module):
    """Turns normalised activations and deltas into pseudo-activations and pseudo-deltas.

    Args:
        d_signal: d_in + d_out of the edit targets that it serves.
        n_modules: how many of them there are.
        rank: rank of each layer.
        n_layers: number of residual layers.
        d_told: dimension of c; 0 where nothing steers.
    """

    def __init__(self, d_signal: int, n_modules: int, rank: int, n_layers: int, d_told: int = 0) -> None:
        super().__init__()
        rank = min(rank, d_signal)
        self.layers = nn.ModuleList(_Layer(d_signal, n_modules, rank, d_told) for _ in range(n_layers))

    def forward(self, signal: Tensor, module: Tensor, told: Tensor | None = None, row: Tensor | None = None) -> Tensor:
        """Map signals token by token.

        Args:
            signal: (n_tokens, d_signal) float32, normalised [u, δ].
            module: (n_tokens,) int64, which edit target each token's signal is from.
            told: (n_rows, d_told) float32, each c once; None where nothing steers.
            row: (n_tokens,) int64, which row of `told` is each token's c.

        Returns:
            (n_tokens, d_signal) float32, [ũ, δ̃].
        """
        for layer in self.layers:
            signal = layer(signal, module, told, row)
        return signal


class _Layer(nn.Module):
    def __init__(self, d_signal: int, n_modules: int, rank: int, d_told: int) -> None:
        super().__init__()
        if d_told:
            self.steer = nn.Parameter(torch.randn(d_told, rank) / d_told**0.5)
        self.down = nn.Parameter(torch.randn(d_signal, rank) / d_signal**0.5)
        self.scale = nn.Parameter(torch.ones(n_modules, rank))
        self.shift = nn.Parameter(torch.zeros(n_modules, rank))
        self.gate = nn.Parameter(torch.zeros(n_modules, rank))
        self.up = nn.Parameter(torch.zeros(rank, d_signal))
        self.bias = nn.Parameter(torch.zeros(d_signal))

    def forward(self, signal: Tensor, module: Tensor, told: Tensor | None, row: Tensor | None) -> Tensor:
        low = signal @ self.down
        if told is not None and row is not None:
            low = low + (told @ self.steer).index_select(0, row)
        hidden = nn.functional.silu(torch.addcmul(self.shift[module], self.scale[module], low))
        weight = 1 + torch.tanh((self.gate[module] * hidden).sum(-1, keepdim=True))
        return torch.addcmul(torch.addmm(self.bias, hidden, self.up), weight, signal)
